"""Recipes, in YAML and in JSON, and mergekit's files."""

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzz import examples
from fuzz.cases import Attempt, WrongAnswerError
from fuzz.values import Steps, damaged, mutated
from pcb_peft import merge, read_recipe

RECIPES: list[dict[str, Any]] = [
    {"adapters": ["A", "B"], "method": "ties", "weights": [1, 0.5], "rank": 4, "seed": 3},
    {
        "adapters": [{"path": "A", "weight": 0.5}, {"path": "B", "subfolder": None}],
        "heads": "keep-each",
    },
    {
        "adapters": ["A", "B"],
        "method": "pcb",
        "options": {"density": 0.3, "formula": "es"},
        "overrides": [
            {"modules": "*.up", "method": "linear", "weights": [1, 2]},
            {"modules": "re:.*mix", "options": {"density": 0.5}, "scope": "module", "rank": 2},
        ],
        "before": ["norm"],
        "after": [{"spectral": {}}],
        "space": "knots",
        "scope": "global",
        "rank": 0.9,
    },
    {
        "adapters": ["A", "B"],
        "weights": [[0.1, 1], {"up": 1, "default": 0.5}],
        "scale": 2,
        "chain": False,
    },
    {"adapters": ["A"], "base_model": "BASE", "rank": "full", "format": "peft", "tied": "refuse"},
]
MERGEKIT: list[dict[str, Any]] = [
    {
        "merge_method": "ties",
        "base_model": "BASE",
        "models": [
            {"model": "BASE+A", "parameters": {"weight": 1.0, "density": 0.5}},
            {"model": "BASE+B", "parameters": {"weight": [{"filter": "up", "value": 0.3}, 1.0]}},
        ],
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "bfloat16",
    },
    {
        "merge_method": "linear",
        "models": [{"model": "BASE+A", "parameters": {"weight": [0.1, 1.0]}}, {"model": "BASE+B"}],
    },
    {
        "merge_method": "dare_ties",
        "base_model": "BASE+A",
        "models": [{"model": "BASE+B", "parameters": {"weight": 1, "density": 0.2, "lambda": 2}}],
    },
    {
        "merge_method": "slerp",
        "base_model": "BASE",
        "slices": [{"sources": [{"model": "BASE+A", "layer_range": [0, 2]}]}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]},
    },
]


def prepare(directory: Path) -> Attempt:
    """Prepare the surface of recipes."""
    return _surface(directory, RECIPES)


def prepare_mergekit(directory: Path) -> Attempt:
    """Prepare the surface of mergekit's files."""
    return _surface(directory, MERGEKIT)


def _surface(directory: Path, originals: list[dict[str, Any]]) -> Attempt:
    names = {"A": str(examples.adapter("LoRA")), "B": str(examples.adapter("LoRA", 2))}
    names["BASE"] = str(examples.base("mlp"))
    file, again = directory / "recipe.yaml", directory / "again.yaml"

    def attempt(rng: Random, steps: Steps) -> Any:
        content = mutated(rng.choice(originals), rng, steps) if rng.random() < 0.9 else originals[0]
        text = _text(_named(content, names), rng)
        file.write_bytes(damaged(text, rng, steps) if rng.random() < 0.3 else text)
        recipe = read_recipe(file)
        written = recipe.to_yaml()
        again.write_text(written, "utf-8")
        if read_recipe(again).to_yaml() != written:
            raise WrongAnswerError("a recipe that was written is read as another one")
        if rng.random() < 0.3:
            merged = merge(recipe, progress=False)
            return [merged.delta(module) for module in merged.modules]
        return "read"

    return attempt


def _text(content: Any, rng: Random) -> bytes:
    if rng.random() < 0.5:
        try:
            return yaml.safe_dump(content, allow_unicode=rng.random() < 0.5).encode()
        except (yaml.YAMLError, ValueError):  # half characters
            pass
    return json.dumps(content).encode()


def _named(content: Any, names: dict[str, str]) -> Any:
    """The content with the paths of adapters that there are."""
    if isinstance(content, dict):
        return {key: _named(value, names) for key, value in content.items()}
    if isinstance(content, list):
        return [_named(value, names) for value in content]
    if isinstance(content, str):
        return "+".join(names.get(part, part) for part in content.split("+"))
    return content
