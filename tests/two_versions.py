"""Adapters and merges that one version of transformers writes, read by another.

``.ci/transformers-4`` runs it: ``python tests/two_versions.py write DIRECTORY`` in the one environment, and
``python tests/two_versions.py read DIRECTORY`` in the other.
"""

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from architectures import ARCHITECTURES, VERSION, Architecture
from safetensors.torch import load_file, save_file
from test_every_architecture import built, output

from pcb_peft import PcbPeftError, merge_adapters

TOLERANCE = 1e-5
MISTAKEN = ("Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")
STACKED = (*MISTAKEN, "MixtralForCausalLM", "Qwen3MoeForCausalLM")
TOWERS = ("LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration")
EXCEPT = {  # what the reading version does not read, by its main number; folds are read by both
    # experts one by one, beside layers of the same names: PEFT takes those for experts
    5: dict.fromkeys(MISTAKEN, ("its merge",)),
    # experts that became stacks, and layers of vision towers that got other names
    4: dict.fromkeys((*STACKED, *TOWERS), ("its merge", "a merge here", "a fold here")),
}
UNREADABLE = (
    *("DbrxForCausalLM", "Mamba2ForCausalLM", "Qwen3MoeForCausalLM"),
    "Qwen2VLForConditionalGeneration",
)
"""Classes whose config.json of transformers 5 does not load in transformers 4."""


def is_exchanged(architecture: Architecture) -> bool:
    """True if both versions have the same layers under the same names, or convert them."""
    targets = {**architecture.targets}
    return architecture.before is None and "target_parameters" not in targets


def adapted(model: torch.nn.Module, architecture: Architecture, seed: int) -> peft.PeftModel:
    targets = copy.deepcopy(dict(architecture.installed_targets))
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **targets))
    for name, values in model.named_parameters():
        if "default" in name.split("."):
            torch.nn.init.normal_(values, std=0.5)
    return model


def with_adapter(base: Path, adapter: Path, architecture: Architecture) -> torch.Tensor:
    model = getattr(transformers, architecture.name).from_pretrained(base)
    return output(peft.PeftModel.from_pretrained(model, adapter), architecture)


def merged(directory: Path):
    adapters = [directory / "adapter1", directory / "adapter2"]
    base = str(directory / "base")
    return merge_adapters(adapters, "linear", [1.0, 0.0], base_model=base, heads="first")


def write(architecture: Architecture, directory: Path) -> None:
    base, model = directory / "base", built(architecture)
    model.save_pretrained(base)
    for seed in (1, 2):
        loaded = adapted(type(model).from_pretrained(base), architecture, seed)
        loaded.peft_config["default"].base_model_name_or_path = str(base)
        loaded.save_pretrained(directory / f"adapter{seed}")
    logits = with_adapter(base, directory / "adapter1", architecture)
    save_file({"logits": logits}, directory / "logits.safetensors")
    merged(directory).save_pretrained(directory / "merged").fold(base, directory / "folded")


def distance(wanted: torch.Tensor, compute: Callable[[], torch.Tensor]) -> str:
    """How far logits are, relative to the norm of those that are wanted; empty if they are the same."""
    try:
        found = float((compute() - wanted).norm() / wanted.norm())
    except (PcbPeftError, RuntimeError, ValueError) as error:
        return str(error)
    return "" if found < TOLERANCE else f"{found:.1e}"


def differences(architecture: Architecture, directory: Path) -> dict[str, str]:
    """What does not compute what the other version computed: its files, and merges of its adapters made here."""
    wanted, base = load_file(directory / "logits.safetensors")["logits"], directory / "base"

    def whole(path: Path) -> torch.Tensor:
        model_class = getattr(transformers, architecture.name)
        return output(model_class.from_pretrained(path), architecture)

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)

        def merge_here() -> torch.Tensor:
            merged(directory).save_pretrained(scratch / "merged")
            return with_adapter(base, scratch / "merged", architecture)

        def fold_here() -> torch.Tensor:
            merged(directory).fold(base, scratch / "folded")
            return whole(scratch / "folded")

        found = {
            "its fold": distance(wanted, lambda: whole(directory / "folded")),
            "its merge": distance(
                wanted, lambda: with_adapter(base, directory / "merged", architecture)
            ),
            "a merge here": distance(wanted, merge_here),
            "a fold here": distance(wanted, fold_here),
        }
    return {what: difference for what, difference in found.items() if difference}


def main(command: str, root: Path) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wrong = 0
    for architecture in filter(is_exchanged, ARCHITECTURES):
        directory, name = root / architecture.name, architecture.name
        if not architecture.is_installed or (VERSION == 4 and name in UNREADABLE):
            continue
        if command == "write":
            write(architecture, directory)
        elif directory.is_dir():
            found = differences(architecture, directory)
            bad = {what: found[what] for what in found if what not in EXCEPT[VERSION].get(name, ())}
            sys.stdout.write(f"{name}: {json.dumps(bad) if bad else 'as expected'}\n")
            wrong += bool(bad)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
