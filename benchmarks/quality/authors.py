"""Merges by other people's code, run as it is: KnOTS and Core Space by their authors, and mergekit on folded models.

    git clone https://github.com/gstoica27/KnOTS
    git clone https://github.com/apanariello4/core-space-merging
    python -m venv mergekit && mergekit/bin/pip install mergekit
    python benchmarks/quality/run.py -o results.jsonl --code knots=KnOTS "knots:ties topK=20"
    python benchmarks/quality/run.py -o results.jsonl --code core=core-space-merging "core:tsv isotropize=1"
    python benchmarks/quality/run.py -o results.jsonl --code mergekit=mergekit/bin/mergekit-yaml "mergekit:ties"

The options of a setting have the names that they have there. All weights are 1; the common weight is chosen on
validation texts, as with all other merges. Core Space needs einops. Both clones import OpenAI's CLIP, but no merge
uses it.
"""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pcb_peft import Adapter, extract_adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.deltas.delta import Dense
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.formats import in_memory

CODES = ("knots", "core", "mergekit")
MODULES = ("task_merger", "merging_functions", "masking_ops", "ft_handlers", "utils", "models")
"""Modules of the clones: both have them by these names."""

KNOTS = {"merging_type": "mean", "sign_resolve_mode": "sum_of_values", "concat_across_output": True}
"""What the authors' configurations of KnOTS have in common."""


def merged_by_authors(
    code: str,
    place: Path,
    method: str,
    adapters: Sequence[Adapter],
    base: Path,
    scratch: Path,
    **options: Any,
) -> Adapter:
    """Merge LoRA adapters by other people's code, every weight at 1.

    Args:
        code: One of `CODES`.
        place: A clone of the authors' repository; of mergekit the program mergekit-yaml.
        method: Its name there.
        adapters: The adapters; their heads are left out, as with all other merges.
        base: The base model.
        scratch: A folder for models.
        options: Options of the method, as they are called there.
    """
    if code == "mergekit":
        return _by_mergekit(place, method, adapters, base, scratch, options)
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.setdefault("clip", types.ModuleType("clip"))
    sys.path.insert(0, str(place))
    try:
        merged = (_by_knots if code == "knots" else _in_core_space)(method, adapters, options)
    finally:
        sys.path.remove(str(place))
    entries = {
        name.removesuffix(".weight"): in_memory(Dense(delta)) for name, delta in merged.items()
    }
    return Adapter(name=code, modules=DeltaMapping(entries), base_model=str(base))


class Weights:
    """Tensors by name: as much of a model as the clones ask for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def cpu(self) -> "Weights":
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def items(self) -> Any:
        return self.tensors.items()

    named_parameters = items


def _loras(adapter: Adapter) -> Weights:
    """An adapter as a state dict of PEFT, its scaling in lora_B."""
    tensors: dict[str, Tensor] = {}
    for module, entry in adapter.modules.entries.items():
        lora_B, lora_A = entry.load().factors()
        tensors[f"{module}.lora_A.default.weight"] = lora_A.float()
        tensors[f"{module}.lora_B.default.weight"] = lora_B.float()
    return Weights(tensors)


def _zeros(loras: Weights) -> Weights:
    """A base model of zeros with a LoRA of zeros, so that what is added to it is the merge."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in loras.items()}
    for name in loras.tensors:
        if ".lora_A." in name:
            lora_A, lora_B = (zeros[name.replace("_A.", f"_{side}.")] for side in "AB")
            zeros = {**zeros, name.replace(".lora_A.default", ""): lora_B @ lora_A}
    return Weights(zeros)


def _merger(kind: str, adapters: Sequence[Adapter]) -> Any:
    """Merger of a clone, with the adapters in it."""
    handler = importlib.import_module("task_merger").get_merge_handler(kind)
    lora_handler = importlib.import_module("ft_handlers").LoRAHandler
    loras = [_loras(adapter) for adapter in adapters]
    return handler(loras, _zeros(loras[0]), lora_handler, device="cpu")


def _by_knots(
    method: str, adapters: Sequence[Adapter], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    merger = _merger("svd-vector", adapters)
    config = {**KNOTS, "merge_method": method, **options}
    merger.transform(config)
    return _whole(merger.merge(config))


def _in_core_space(
    method: str, adapters: Sequence[Adapter], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    merger = _merger("matrix_per_layer", adapters)
    merger.set_scaling_coeffs(1.0)
    return _whole(merger.merge({"merge_space": "core", "merge_method": method, **options}))


def _whole(merged: Weights) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in merged.items() if ".lora_" not in name}


def _by_mergekit(
    program: Path,
    method: str,
    adapters: Sequence[Adapter],
    base: Path,
    scratch: Path,
    options: Mapping[str, Any],
) -> Adapter:
    """Fold each adapter into the base model, merge the models, and take the base model away again."""
    start, merged = scratch / "base", scratch / "merged by mergekit"
    shutil.copytree(base, start)
    _rename_bert(start)
    models: list[dict[str, Any]] = []
    for adapter in adapters:
        folder = scratch / adapter.name
        headless = dataclasses.replace(adapter, head=Replacements())
        headless.fold(base, folder, progress=False)
        _rename_bert(folder)
        models.append({"model": str(folder), "parameters": {"weight": 1.0, **options}})
    config = {"merge_method": method, "base_model": str(start), "models": models}
    file = scratch / "mergekit.yaml"
    file.write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")  # JSON is YAML
    subprocess.run([program, file, merged, "--random-seed", "0"], check=True)
    return extract_adapter(merged, base, progress=False)


def _rename_bert(folder: Path) -> None:
    """Name an encoder's weights as a language model's: mergekit 0.1.5 fails on its own table of BERT's weights."""
    file, weights = folder / "config.json", folder / "model.safetensors"
    config = json.loads(file.read_text("utf-8"))
    if config["model_type"] == "bert":
        file.write_text(json.dumps({**config, "architectures": ["BertLMHeadModel"]}), "utf-8")
        tensors = {f"bert.{name}": tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
