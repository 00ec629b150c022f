"""Adapters of every kind: configuration, tensors and pickled files, read, merged, saved and folded."""

import json
from pathlib import Path
from random import Random
from typing import Any

from test_every_adapter import CASES

from fuzz import examples, folders
from fuzz.cases import Attempt, WrongAnswerError
from fuzz.folders import Files
from fuzz.tensors import mutated_safetensors, pickled, read_table
from fuzz.values import Steps, json_bytes, mutated
from pcb_peft import list_methods, list_spaces, load_adapter, merge_adapters

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
COMMON = ("LoRA", "DoRA", "LoRA on all of these", "experts", "bias=all", "LoHa", "LoKr", "VeRA")


def prepare(directory: Path) -> Attempt:
    """Prepare the surface; all adapters of PEFT are made once."""
    originals = {name: examples.adapter_files(name) for name in CASES}
    names = sorted(CASES)
    methods = sorted(list_methods())

    def attempt(rng: Random, steps: Steps) -> Any:
        name = rng.choice(COMMON) if rng.random() < 0.3 else rng.choice(names)
        steps.append(name)
        path = folders.write(directory / "adapter", broken(originals[name], rng, steps))
        if rng.random() < 0.03:
            folders.spoil(path, rng, steps)
        base = examples.base(CASES[name].kind) if rng.random() < 0.8 else None
        return use(path, examples.adapter(name, 2), base, directory, rng, steps, methods)

    return attempt


def broken(files: Files, rng: Random, steps: Steps) -> Files:
    """The files of an adapter, of which one or both are different."""
    files = dict(files)
    which = rng.random()
    if which < 0.45:
        config = mutated(json.loads(files[CONFIG]), rng, steps)
        files[CONFIG] = json_bytes(config, rng, steps)
    if which > 0.4:
        if rng.random() < 0.12:
            table, _ = read_table(files.pop(TENSORS))
            files[PICKLE] = pickled(table, rng, steps)
        else:
            files[TENSORS] = mutated_safetensors(files[TENSORS], rng, steps)
    return files


def use(
    path: Path,
    other: Path,
    base: Path | None,
    directory: Path,
    rng: Random,
    steps: Steps,
    methods: list[str],
) -> str:
    """Do with an adapter what people do with adapters."""
    how = rng.random()
    if how < 0.3:
        adapter = load_adapter(path, base_model=base)
        for module in adapter.modules:
            finite(adapter.delta(module), module)
        return "read"
    inputs = [path, other] if rng.random() < 0.8 else [path]
    method = rng.choice(methods) if rng.random() < 0.3 else rng.choice(("linear", "ties", "auto"))
    space = rng.choice(("auto", *list_spaces())) if rng.random() < 0.3 else "auto"
    steps.append(f"{len(inputs)} adapters merged by {method} in {space}")
    merged = merge_adapters(inputs, method, space=space, base_model=base, progress=False)
    for module in merged.modules:
        finite(merged.delta(module), module)
    if how < 0.6:
        return "merged"
    if how < 0.85 or base is None:
        merged.save_pretrained(directory / "out", overwrite="all")
        return "saved"
    merged.fold(base, directory / "model", overwrite="all")
    return "folded"


def finite(values: Any, module: str) -> None:
    """Raise WrongAnswerError where a delta is none."""
    if not values.isfinite().all():
        raise WrongAnswerError(f"{module} has values that are not finite")
