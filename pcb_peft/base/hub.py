"""Repositories on the Hugging Face Hub, as directories in its cache."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from pcb_peft.errors import PcbPeftError
from pcb_peft.files.json_text import first_bytes
from pcb_peft.runtime.paths import current_directory, expanded, similar_path
from pcb_peft.runtime.shown import shown

SECONDS = 10  # until the Hub has to answer


def download(
    source: str,
    revision: str | None,
    *,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
    error_type: type[PcbPeftError],
) -> Path:
    """Return the directory of a repository in the Hub's cache; files that it lacks are downloaded, unless offline.

    Args:
        source: Id of the repository. A path that is no directory ends here too, and the message says so.
        revision: Branch, tag or commit.
        wanted: Globs of files to download.
        unwanted: Globs of files that are not downloaded though they are wanted.
        error_type: Type of the error.

    Raises:
        PcbPeftError: Of that type: there is no such repository, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    silent = not _answers(source, revision)
    try:
        root = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
            local_files_only=silent,
        )
    except (OSError, ValueError) as error:
        reason = f": the Hub did not answer within {SECONDS} s" if silent else f": {shown(error)}"
        if isinstance(error, HFValidationError):  # a path, which no repository can be called
            reason = ""
        raise error_type(not_found(source) + reason) from error
    return Path(root)


def not_found(source: str) -> str:
    """Say that something is neither a directory nor a repository."""
    here = current_directory()
    gone = "the current directory has been removed: go to another one"
    begin = "" if Path(source).is_absolute() else f"paths begin in {here}" if here else gone
    hints = "; ".join(hint for hint in (begin, similar_path(source)) if hint)
    return f"{source} is neither a directory{hints and f' ({hints})'} nor a hub repository that can be reached"


def listed(source: str, revision: str | None, root: Path) -> list[str]:
    """Return the names of a repository's files: all that the Hub has, or if it is not asked those in its cache.

    Args:
        source: Id of the repository.
        revision: Branch, tag or commit.
        root: Its directory in the cache.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import HfHubHTTPError

    if not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(HfHubHTTPError, OSError):
            files = HfApi().model_info(source, revision=revision, timeout=SECONDS).siblings
            return [file.rfilename for file in files or ()]
    return [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]


def configuration_directory(model: str, revision: str | None) -> Path | None:
    """Return the directory of a model's ``config.json``, which may lie in the Hub's cache; None if it is not here.

    Nothing is fetched.
    """
    directory = expanded(model)
    if (directory / "config.json").is_file():
        return directory
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # of huggingface_hub: no repository's name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _answers(source: str, revision: str | None) -> bool:
    """Return whether the Hub says anything about a repository; huggingface_hub would wait for it for ever."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return True  # nobody is asked
    try:
        HfApi().repo_info(source, revision=revision, timeout=SECONDS)
    except (HfHubHTTPError, HFValidationError):  # an answer, which comes again
        return True
    except Exception:  # noqa: BLE001  (of the library below, which has changed more than once)
        return False
    return True


def snapshot_in(directory: Path, revision: str | None) -> Path:
    """Return the files of a repository where a directory is its folder in the Hub's cache; the directory itself else.

    Args:
        directory: Any directory, such as ``~/.cache/huggingface/hub/models--owner--name``.
        revision: Branch, tag or commit; None for the main branch.
    """
    snapshots, name = directory / "snapshots", revision or "main"
    if not snapshots.is_dir():
        return directory
    branch = directory / "refs" / name
    commit = first_bytes(branch, 100).decode("ascii", "replace").strip() or name
    return snapshots / commit if (snapshots / commit).is_dir() else directory
