"""LoRAs of image and video models, as their trainers store them: one file, no configuration.

A module goes by its component in a pipeline of diffusers and its path there (``unet.mid_block.attentions.0.proj_in``),
whatever name the file has for it (`pcb_peft.images.names`).
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import PIPELINE_TYPE, Tensors, read_finite
from pcb_peft.formats.config import PipelineConfig, checked_config
from pcb_peft.formats.lazy_delta import AdapterContents, Config, LazyDelta
from pcb_peft.formats.lora_parts import pattern_value
from pcb_peft.formats.lora_variants import init_residual
from pcb_peft.formats.registry import Format, register
from pcb_peft.images.names import ImageLora, canonical_names, is_canonical, stored_name

PARTS = {  # part to the end of its tensor's name, perhaps with the adapter's name; the first that fits counts
    "A": r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.[^.]+)?\.weight|_lora\.down\.weight",
    "B": r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)(\.[^.]+)?\.weight|_lora\.up\.weight",
    "alpha": r"\.alpha",
}


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the deltas of a file.

    Raises:
        UnsupportedError: A tensor does not belong to a LoRA.
        AdapterError: Two factors do not fit each other.
    """
    del base
    stored: dict[str, dict[str, str]] = {}
    for name in tensors.names():
        module, part = _parsed(name)
        if part in stored.setdefault(module, {}):
            raise AdapterError(f"{module} has both {stored[module][part]} and {name}")
        stored[module][part] = name
    stated = {c: _stated(config, c) for c in {m.partition(".")[0] for m in stored}}
    entries = {
        module: _entry(stated[module.partition(".")[0]], tensors, module, parts)
        for module, parts in stored.items()
    }
    shapes = {module: entry.shape for module, entry in entries.items()}
    names, image = canonical_names(shapes, config.get("file_metadata") or {})
    _refuse_bare_names(names, image)
    modules = {names[module]: entry for module, entry in entries.items()}
    return AdapterContents(modules, {}, image=image)


def _parsed(name: str) -> tuple[str, str]:
    """Return the module and the part (A, B, alpha) of a tensor."""
    for part, ending in PARTS.items():
        match = re.fullmatch(f"(.+?)(?:{ending})", name)
        if match:
            return _without_processor(match[1]), part
    raise UnsupportedError(
        f"tensor {name} does not belong to a LoRA that is read (lora_down, lora_up, lora_A, lora_B, alpha of a unet, a "
        "transformer or a text encoder): DoRA, LoHa, LoKr and a lora_mid in this form are not; it will not be dropped"
    )


def _refuse_bare_names(names: Mapping[str, str], image: ImageLora) -> None:
    """Refuse modules that say neither what they belong to nor are known."""
    for name, canonical in names.items():
        if not (stored_name(name).prefix or is_canonical(canonical)):
            models = ", ".join(image.architectures) or "an image model that is known"
            raise UnsupportedError(
                f"{name} is no name of a module of {models}, and the file does not say which component it belongs to: "
                "write the component before it (transformer., unet., text_encoder.)"
            )


def _without_processor(path: str) -> str:
    """Rename LoRAs of attention processors, as in the first diffusers: ``processor.to_out`` is ``to_out.0``."""
    path, count = re.subn(r"\.processor\.to_(\w+)$", r".to_\1", path)
    return f"{path}.0" if count and path.endswith(".to_out") else path


def _stated(config: Config, component: str) -> Config:
    """Return what diffusers' metadata in the file say of one component of the pipeline.

    Raises:
        AdapterError: A field holds something that it may not hold.
    """
    metadata: Mapping[str, Any] = config.get("metadata") or {}
    prefix = f"{component}."
    fields = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    return checked_config(fields, f"lora_adapter_metadata of {component}", PipelineConfig)


def _entry(stated: Config, tensors: Tensors, module: str, names: Mapping[str, str]) -> LazyDelta:
    """Return the change of one module; `names` are its tensors by part."""
    if not {"A", "B"} <= names.keys():
        raise AdapterError(f"{module} has {', '.join(names.values())}; it must have both factors")
    shape_A, shape_B = (tensors.shape(names[part]) for part in "AB")
    kernel = shape_A[2:]
    if (
        len(shape_A) < 2
        or len(shape_B) < 2
        or 0 in (*shape_A, *shape_B)
        or shape_B != (shape_B[0], shape_A[0], *[1] * len(kernel))
    ):
        raise AdapterError(
            f"{module}: {names['A']} {shape_A} and {names['B']} {shape_B} do not fit"
        )
    if "alpha" in names and math.prod(tensors.shape(names["alpha"])) != 1:
        raise AdapterError(
            f"{names['alpha']} has shape {tensors.shape(names['alpha'])}; it must be one number"
        )
    rank = shape_A[0]
    layout = Layout(shape=(shape_B[0], *shape_A[1:])) if kernel else LINEAR
    load = functools.partial(_load, tensors, names, _scaling(stated, module, rank), layout)
    return LazyDelta(LowRank, (shape_B[0], math.prod(shape_A[1:])), load, rank)


def _load(
    tensors: Tensors, names: Mapping[str, str], stated_scaling: float, layout: Layout
) -> LowRank:
    lora_A, lora_B = (read_finite(tensors, names[part]).flatten(1) for part in "AB")
    scaling = stated_scaling
    if "alpha" in names:
        scaling = float(read_finite(tensors, names["alpha"])) / len(lora_A)
    return LowRank(lora_A, lora_B, scaling, layout=layout)


def _scaling(stated: Config, module: str, rank: int) -> float:
    """Return the scaling that diffusers' metadata in the file say; 1 where there are none.

    Raises:
        UnsupportedError: The LoRA depends on W.
    """
    component, _, path = module.partition(".")
    if stated.get("lora_alpha") is None:
        return 1.0
    if init_residual(stated) or stated.get("use_dora"):
        raise UnsupportedError(
            f"{component}: a LoRA whose change depends on W is not supported in this form; convert it with PEFT"
        )
    alpha = pattern_value(stated, "alpha_pattern", path, stated["lora_alpha"])
    return alpha / (rank**0.5 if stated.get("use_rslora") else rank)


register(Format(PIPELINE_TYPE, read))
