"""Directories that this package wrote, damaged since: heads, recipes, cards, manifests, evaluations; read again."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz import examples, folders
from fuzz.cases import Attempt
from fuzz.folders import Files
from fuzz.tensors import damaged_file
from fuzz.values import Steps
from pcb_peft import inspect_adapter, load_adapter, merge_adapters
from pcb_peft.consumers.check import check
from pcb_peft.evaluation.card import write_to_card
from pcb_peft.evaluation.evaluation import Evaluation
from pcb_peft.merging.save_head import save_with_head
from pcb_peft.reporting.page import write_report
from pcb_peft.writing.model_card import read_card


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    pair = [examples.bert_adapter(seed) for seed in (1, 2)]
    merge_adapters(pair, "ties", progress=False).save_pretrained(directory / "original")
    (directory / "original" / "task.json").write_text('{"labels": ["a", "b", "c"]}')
    original = folders.files_in(directory / "original")

    def attempt(rng: Random, steps: Steps) -> Any:
        path = folders.write(directory / "merge", broken(original, rng, steps))
        if rng.random() < 0.05:
            folders.spoil(path, rng, steps)
        how = rng.choice(sorted(USES))
        steps.append(how)
        return USES[how](path, pair, directory / "out")

    return attempt


def broken(files: Files, rng: Random, steps: Steps) -> Files:
    """The files of a merge, one of them different."""
    files = dict(files)
    name = rng.choice(sorted(files))
    steps.append(name)
    files[name] = damaged_file(name, files[name], rng, steps)
    if rng.random() < 0.1:
        files[rng.choice(("config.json", "tokenizer.json", "evaluation.json"))] = b"[" * 100_000
    return files


def _head(path: Path, _: list[Path], out: Path) -> Any:
    return save_with_head(path, "h1", out, overwrite="all")


def _load(path: Path, _: list[Path], __: Path) -> Any:
    loaded = load_adapter(path)
    heads = [loaded.with_head(head).head.read() for head in loaded.heads]
    return heads, read_card(path / "README.md")


def _merge(path: Path, pair: list[Path], out: Path) -> Any:
    return merge_adapters([path, pair[0]], "linear", progress=False).save_pretrained(
        out, overwrite="all"
    )


def _replace(path: Path, pair: list[Path], _: Path) -> Any:
    return merge_adapters(pair, "linear", progress=False).save_pretrained(path, overwrite=True)


USES: dict[str, Callable[[Path, list[Path], Path], Any]] = {
    "head": _head,
    "load": _load,
    "merge": _merge,
    "overwrite": _replace,
    "check": lambda path, *_: str(check(path)),
    "inspect": lambda path, *_: str(inspect_adapter(path)),
    "card": lambda path, *_: write_to_card(Evaluation(name="merged", tasks=()), path),
    "page": lambda path, _, out: write_report(path, out.with_suffix(".html"), overwrite="all"),
}
