"""Exports: what was written for one program, damaged since, and looked at again."""

from pathlib import Path
from random import Random
from typing import Any

from fuzz import examples, folders
from fuzz.cases import Attempt
from fuzz.tensors import damaged_file
from fuzz.values import Steps
from pcb_peft import check, export, inspect_adapter, load_adapter
from pcb_peft.consumers.known import CONSUMERS

PROFILES = ("portable", "peft", "gguf", "mlx", "transformers")


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    base, originals = examples.base("llama"), {}
    for profile in PROFILES:
        done = directory / profile
        export(examples.llama_adapter(), profile, done, base_model=base, progress=False)
        originals[profile] = folders.files_in(done)

    def attempt(rng: Random, steps: Steps) -> Any:
        profile = rng.choice(PROFILES)
        files = dict(originals[profile])
        name = rng.choice(sorted(files))
        steps += [profile, name]
        files[name] = damaged_file(name, files[name], rng, steps)
        path = folders.write(directory / "out", files)
        if rng.random() < 0.05:
            folders.spoil(path, rng, steps)
        how = rng.choice(("check", "check", "load", "inspect"))
        steps.append(how)
        if how == "check":
            return str(check(path, rng.choice(((), tuple(CONSUMERS)))))
        if how == "inspect":
            return str(inspect_adapter(path))
        loaded = load_adapter(path)
        return [loaded.delta(module) for module in loaded.modules]

    return attempt
