"""Facts about a LoRA in the files of llama.cpp or of mlx-lm; it has the same norms under their names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pcb_peft.consumers.files import MLX, OutputFiles, open_output
from pcb_peft.deltas.delta import LowRank
from pcb_peft.errors import AdapterError, AdapterNotFoundError
from pcb_peft.files.gguf import GgufFile
from pcb_peft.files.tensors import SafetensorsFile
from pcb_peft.inspection.facts import Inspection, ModuleFacts
from pcb_peft.inspection.geometry import effective_rank, singular_values
from pcb_peft.merging.report_file import read_report
from pcb_peft.runtime.paths import expanded, size_on_disk
from pcb_peft.runtime.shown import quoted


def inspect_converted(source: object) -> Inspection | None:
    """Return the facts about a GGUF file, a directory with one, or a directory of mlx-lm; None for anything else.

    Raises:
        AdapterError: It holds no LoRA, or is damaged.
    """
    place = expanded(source) if isinstance(source, str | Path) else None
    if place is None or not place.exists():
        return None
    try:
        files = open_output(place)
    except AdapterNotFoundError:
        return None
    if files.form not in ("gguf", "mlx"):
        return None
    modules, stated = _gguf(files.path) if files.form == "gguf" else _mlx(files)
    if not modules:
        raise AdapterError(
            f"{files.path} holds no LoRA; it may be a whole model: pcb-peft check says who loads it"
        )
    return Inspection(
        name=place.resolve().name,
        path=str(source),
        tuner=f"LORA ({'llama.cpp' if files.form == 'gguf' else 'mlx-lm'})",
        modules=modules,
        bytes=size_on_disk(place),
        made=read_report(files.path) or read_report(place),
        **stated,
    )


def _gguf(file: Path) -> tuple[dict[str, ModuleFacts], dict[str, Any]]:
    opened = GgufFile(file)
    alpha = _number(opened.fields.get("adapter.lora.alpha", 0.0), "adapter.lora.alpha", file)
    names = [name.removesuffix(".lora_a") for name in opened.names() if name.endswith(".lora_a")]
    modules: dict[str, ModuleFacts] = {}
    for name in names:
        lora_A = opened.read(f"{name}.lora_a")
        scale = alpha / max(1, len(lora_A)) if alpha else 1.0  # as llama.cpp reads them
        facts = _facts(name, lora_A, opened.read(f"{name}.lora_b"), scale)
        modules[name.removesuffix(".weight")] = facts
    ranks = {facts.rank for facts in modules.values()}
    config = {"r": ranks.pop(), "lora_alpha": alpha} if len(ranks) == 1 and alpha else {}
    url = opened.fields.get("general.base_model.0.repo_url", "")
    base = url.removeprefix("https://huggingface.co/") or opened.fields.get(
        "general.base_model.0.name"
    )
    return modules, {"config": config, "base_model": base}


def _mlx(files: OutputFiles) -> tuple[dict[str, ModuleFacts], dict[str, Any]]:
    opened = SafetensorsFile(files.path / MLX)
    stated = files.config.get("lora_parameters")
    given: Any = stated.get("scale", 1.0) if isinstance(stated, Mapping) else 1.0
    scale = _number(given, "lora_parameters.scale", files.path)
    names = [name.removesuffix(".lora_a") for name in opened.names() if name.endswith(".lora_a")]
    modules = {
        name: _facts(
            name,
            opened.read(f"{name}.lora_a").T,
            opened.read(f"{name}.lora_b").T,
            scale,
            "DoRA" if f"{name}.m" in files.tensors else "LoRA",
        )
        for name in names
    }
    return modules, {"base_model": files.config.get("model")}


def _number(value: Any, name: str, where: Path) -> float:
    if not isinstance(value, int | float):
        raise AdapterError(
            f"{where}: {name} is {quoted(value)}; it must be a number: write the file again"
        )
    return float(value)


def _facts(
    name: str, lora_A: Tensor, lora_B: Tensor, scale: float, kind: str = "LoRA"
) -> ModuleFacts:
    if lora_A.ndim != 2 or lora_B.ndim != 2 or len(lora_A) != lora_B.shape[1]:
        raise AdapterError(
            f"the factors of {name} have the shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, which are no "
            "LoRA; write the file again"
        )
    values = singular_values(LowRank(lora_A, lora_B)) * abs(scale)
    shape = (len(lora_B), lora_A.shape[1])
    return ModuleFacts(kind, shape, len(lora_A), float(values.norm()), effective_rank(values))
