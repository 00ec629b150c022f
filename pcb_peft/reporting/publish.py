"""Publishing: the directory of an adapter or a model, as a repository on the Hugging Face Hub."""

import dataclasses
from pathlib import Path

from pcb_peft.errors import OptionError, OutputError
from pcb_peft.reporting.for_the_hub import report_files
from pcb_peft.runtime.tables import table
from pcb_peft.runtime.units import format_size

NEEDED = ("adapter_config.json", "config.json", "*.safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class Publication:
    """Files that are sent, or would be.

    Attributes:
        repo_id: The repository, such as "user/name".
        files: Path in the repository to size in bytes.
        url: Where it is; None after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None = None

    def __str__(self) -> str:
        rows = [(name, format_size(size)) for name, size in self.files.items()]
        total = format_size(sum(self.files.values()))
        words = f"sent to {self.url}" if self.url else f"would be sent to {self.repo_id}"
        return "\n".join([f"{len(rows)} files, {total}, {words}", table(("file", "size"), rows)])


def publish(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Send a directory that this package wrote to the Hub: weights, configuration, card, recipe, report, heads.

    With a merge go its report as a page, and a picture on the card (if matplotlib is installed); no local path is in
    them. Hidden files stay on this machine.

    It is made public unless the account says otherwise, or `private` does. You must be logged in: ``hf auth login``.

    Args:
        directory: An adapter or a folded model.
        repo_id: The repository, such as "user/name"; it is made if there is none.
        private: Make a new repository private.
        revision: Branch; default: main.
        message: Of the commit.
        dry_run: Send nothing, and say what would be sent.

    Returns:
        The files, and the address.

    Raises:
        OptionError: The directory holds no adapter and no model, or the name is no name of a repository.
        OutputError: The Hub cannot be reached, or refuses.

    Example:
        >>> from pcb_peft import publish
        >>> sorted(publish("math-lora", "me/math-lora", dry_run=True).files)[:2]
        ['README.md', 'adapter_config.json']
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    folder = Path(directory)
    files = _files(folder)
    made = report_files(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes |= {name: len(content) for name, content in made.items()}
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OptionError(f"{repo_id!r} is no name of a repository: {error}") from error
    if dry_run:
        return Publication(repo_id, dict(sorted(sizes.items())))
    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        contents: dict[str, Path | bytes] = {**files, **made}
        api.create_commit(
            repo_id=url.repo_id,
            operations=[CommitOperationAdd(name, one) for name, one in contents.items()],
            revision=revision,
            commit_message=message or f"Upload {folder.resolve().name}",
        )
    except (OSError, ValueError) as error:
        # HTTP errors, offline mode, no token: all are one of these
        reason = " ".join(str(error).split())
        raise OutputError(
            f"{repo_id} cannot be written on the Hub: {reason}; log in with a token that may write (hf auth login), "
            "or look at what would be sent: dry_run=True, --dry-run"
        ) from error
    return Publication(url.repo_id, dict(sorted(sizes.items())), str(url))


def _files(folder: Path) -> dict[str, Path]:
    """Return the files that are sent, by their path in the repository.

    Raises:
        OptionError: The directory holds no adapter and no model.
    """
    if not any(any(folder.glob(pattern)) for pattern in NEEDED):
        raise OptionError(
            f"{folder} holds no adapter and no model (none of {', '.join(NEEDED)}); name a directory that pcb-peft "
            "merge or fold wrote"
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
