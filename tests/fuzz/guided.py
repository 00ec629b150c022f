"""Fuzzing that is guided by coverage: atheris changes bytes, and keeps those that reach new code."""

import sys
from pathlib import Path
from typing import Any

from fuzz import folders


def run(name: str, seconds: float, seed: int) -> int:
    """Run atheris on a surface of texts; it ends the process, with a traceback if it finds something."""
    import atheris  # pyright: ignore[reportMissingImports]

    for module in [module for module in sys.modules if module.startswith(("pcb_peft", "fuzz.t"))]:
        del sys.modules[module]  # imported again below, instrumented
    with atheris.instrument_imports(
        include=["pcb_peft.files", "pcb_peft.recipes", "pcb_peft.formats", "yaml"]
    ):
        from fuzz.texts import TEXTS, target
    directory = folders.scratch()
    corpus = directory / "corpus"
    corpus.mkdir()
    for number, content in enumerate(TEXTS[name].examples):
        (corpus / str(number)).write_bytes(content)
    options: list[Any] = [
        f"-max_total_time={seconds:.0f}",
        f"-seed={seed + 1}",
        "-rss_limit_mb=4096",
    ]
    options += [
        "-timeout=10",
        "-print_final_stats=1",
        "-max_len=4096",
        f"-artifact_prefix={Path.cwd()}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target(name, directory))
    atheris.Fuzz()
    return 0
