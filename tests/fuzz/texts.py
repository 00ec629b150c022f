"""Surfaces of bytes: what parses a text or a header, without a model; also for atheris.

Each is a list of texts to start from, and a function of bytes.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from fuzz.cases import Attempt
from fuzz.recipes import MERGEKIT, RECIPES
from fuzz.rows import ROWS
from fuzz.tensors import mutated_safetensors, pickled, read_table
from fuzz.values import Steps, damaged, json_bytes, mutated
from pcb_peft.base.files import SINGLE_FILE, read_tensor_infos
from pcb_peft.data.batches import read_rows
from pcb_peft.errors import AdapterError, PcbPeftError
from pcb_peft.files.adapter_config import checked_config
from pcb_peft.files.patterns import Expression, Patterns
from pcb_peft.files.pickled import open_pickled
from pcb_peft.files.tensors import SafetensorsFile, read_finite, refuse_empty, refuse_other_numbers
from pcb_peft.formats.checkpoint import PICKLE, read_config
from pcb_peft.recipes.recipe import read_recipe
from pcb_peft.writing.model_card import read_card

Read = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Texts:
    """A surface of bytes.

    Attributes:
        examples: Texts that are in order.
        read: Reads a file.
        change: Makes another file of one, in a way that knows its structure.
        file: Name of the file.
    """

    examples: Sequence[bytes]
    read: Read
    change: Callable[[bytes, Random, Steps], bytes] = damaged
    file: str = SINGLE_FILE


def _changed_json(content: bytes, rng: Random, steps: Steps) -> bytes:
    return json_bytes(mutated(json.loads(content), rng, steps), rng, steps)


def _changed_lines(content: bytes, rng: Random, steps: Steps) -> bytes:
    rows = [json.loads(line) for line in content.splitlines()]
    place = rng.randrange(len(rows))
    rows[place] = mutated(rows[place], rng, steps)
    text = b"\n".join(json.dumps(row).encode() for row in rows)
    return damaged(text, rng, steps) if rng.random() < 0.3 else text


def _changed_pickle(content: bytes, rng: Random, steps: Steps) -> bytes:
    return pickled(read_table(content)[0], rng, steps)


def _configuration(path: Path) -> None:
    checked_config(read_config(path), str(path))


def _tensors(path: Path) -> None:
    file = SafetensorsFile(path)
    refuse_other_numbers(file)
    refuse_empty(file)
    for name in file.names():
        read_finite(file, name)


def _pickled(path: Path) -> None:
    tensors = open_pickled(path)
    for name in tensors.names():
        read_finite(tensors, name)


def _base(path: Path) -> None:
    read_tensor_infos(path.parent, [SINGLE_FILE])


def _expression(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", errors="replace")
    Expression(text, "here", AdapterError).fits("model.layers.0.mlp.up_proj" * 3)
    Patterns({text: 1, "x": 2}, "here", AdapterError).value("model.layers.0.mlp.up_proj", None)


CONFIGS = [
    {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q"],
        "rank_pattern": {"q": 2},
    },
    {
        "peft_type": "IA3",
        "target_modules": ".*q",
        "feedforward_modules": [],
        "modules_to_save": None,
    },
    {"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [True]}, "alpha_pattern": {"^a|b$": 1.5}},
    {"peft_type": "LORA", "use_bdlora": {"nblocks": 2}, "trainable_token_indices": {"e": [1]}},
]
TENSORS = {"base_model.model.q.lora_A.weight": torch.ones(2, 3), "a.alpha": torch.tensor(2)}
CARD = b"---\ntags:\n- pcb_peft\nbase_model: a/b\n---\n# T\n\n## Use\n\n```\n# x\n```\n"

TEXTS: Mapping[str, Texts] = {
    "configurations": Texts(
        [json.dumps(c).encode() for c in CONFIGS], _configuration, _changed_json
    ),
    "recipe texts": Texts(
        [json.dumps(c, indent=1).encode() for c in (*RECIPES, *MERGEKIT)], read_recipe
    ),
    "row texts": Texts(
        ["\n".join(map(json.dumps, ROWS)).encode()],
        lambda p: read_rows(p, ("text", "prompt")),
        _changed_lines,
    ),
    "tensor files": Texts([save(TENSORS, {"format": "pt"})], _tensors, mutated_safetensors),
    "base tensor files": Texts([save(TENSORS, {"format": "pt"})], _base, mutated_safetensors),
    "pickled files": Texts(
        [save({"a": torch.ones(2, 3), "b": torch.ones(3)})], _pickled, _changed_pickle, PICKLE
    ),
    "expressions": Texts(
        [b"(.*\\.)?q_proj", b"model\\.layers\\.[0-9]+\\.mlp", b"a{2,9}|(b|c)*$"], _expression
    ),
    "cards": Texts([CARD], read_card),
}


def prepare(name: str, directory: Path) -> Attempt:
    """Prepare one of these surfaces."""
    surface = TEXTS[name]
    file = directory / surface.file

    def attempt(rng: Random, steps: Steps) -> Any:
        content = surface.change(rng.choice(surface.examples), rng, steps)
        file.write_bytes(content)
        return surface.read(file)

    return attempt


def target(name: str, directory: Path) -> Callable[[bytes], None]:
    """Return the function of bytes for atheris; it raises for what is a finding."""
    surface = TEXTS[name]
    file = directory / surface.file

    def read(content: bytes) -> None:
        file.write_bytes(content)
        with contextlib.suppress(PcbPeftError):
            surface.read(file)

    return read
