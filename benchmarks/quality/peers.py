"""Merges of PEFT itself, by `add_weighted_adapter` of a live model."""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pcb_peft import Adapter, load_adapter

MERGED = "merged"


def merged_by_peft(
    name: str, folders: tuple[Path, ...], base: Path, target: Path, **options: Any
) -> Adapter:
    """Merge adapters with PEFT, every weight at 1.

    PEFT merges no adapters that bring a head of their own: they are given to it without, and each task is measured with
    its own head, as with all other merges.

    Args:
        name: PEFT's `combination_type`.
        folders: The adapters.
        base: The base model.
        target: Where the merge is saved.
        options: `density`, and `rank` for PEFT's `svd_rank`.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = json.loads((folders[0] / "adapter_config.json").read_text("utf-8"))
    causal = config["task_type"] == "CAUSAL_LM"
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    names = [folder.name for folder in folders]
    options["svd_rank"] = options.pop("rank", None)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        headless = [_without_head(folder, Path(scratch) / folder.name) for folder in folders]
        model = PeftModel.from_pretrained(kind.from_pretrained(base), headless[0], names[0])
        for adapter, folder in zip(names[1:], headless[1:], strict=True):
            model.load_adapter(folder, adapter)
        torch.manual_seed(0)  # PEFT draws what dare drops
        model.add_weighted_adapter(names, [1.0] * len(names), MERGED, name, **options)
        model.save_pretrained(target, selected_adapters=[MERGED])
    return load_adapter(target / MERGED)


def _without_head(folder: Path, target: Path) -> Path:
    """A copy of an adapter without the modules that it replaces."""
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config |= {"modules_to_save": None, "task_type": None}
    (target / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if ".lora_" in key or ".ia3_" in key}
    save_file(kept, target / "adapter_model.safetensors")
    return target
