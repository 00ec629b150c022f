"""LoRAs of image models, as diffusers and as kohya's trainers store them: one file, no configuration.

A module goes by its component in a pipeline of diffusers and its path there (``unet.mid_block.attentions.0.proj_in``).
kohya's names have underscores for dots (``lora_unet_mid_block_attentions_0_proj_in``); they are spelled out where every
word is one of diffusers' names for Stable Diffusion 1 and 2 and for CLIP, and else kept as they are (SDXL, Flux).
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import PIPELINE, PIPELINE_TYPE, Tensors, read_finite
from pcb_peft.formats.config import PipelineConfig, checked_config
from pcb_peft.formats.lazy_delta import AdapterContents, AdapterFiles, Config, LazyDelta, is_vector
from pcb_peft.formats.lora_parts import pattern_value
from pcb_peft.formats.lora_variants import init_residual
from pcb_peft.formats.registry import Format, Writer, register

PARTS = {  # part to the end of its tensor's name; the first that fits counts
    "A": r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)\.weight|_lora\.down\.weight",
    "B": r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)\.weight|_lora\.up\.weight",
    "alpha": r"\.alpha",
}
COMPONENT = re.compile(r"(unet|transformer|text_encoder(_\d)?)\..+|lora_(unet|te\d?)_.+")
KOHYA_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
WORD = (
    r"\d+|attentions|attn[12]|conv_(?:in|out|shortcut)|conv[12]?|down_blocks|downsamplers|encoder|fc[12]|ff|"
    r"(?:k|out|q|v)_proj|layers|linear_[12]|mid_block|mlp|net|proj_(?:in|out)|proj|resnets|self_attn|text_model|"
    r"time_(?:emb_proj|embedding)|to_(?:k|out|q|v)|transformer_blocks|up_blocks|upsamplers"
)
WORDS = re.compile(f"(?:{WORD})(?:_(?:{WORD}))*")


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the deltas of a file.

    Raises:
        UnsupportedError: A tensor does not belong to a LoRA.
        AdapterError: Two factors do not fit each other.
    """
    del base
    modules: dict[str, dict[str, str]] = {}
    for name in tensors.names():
        module, part = _parsed(name)
        if part in modules.setdefault(module, {}):
            raise AdapterError(f"{module} has both {modules[module][part]} and {name}")
        modules[module][part] = name
    stated = {
        component: _stated(config, component)
        for component in {m.partition(".")[0] for m in modules}
    }
    entries = {
        module: _entry(stated[module.partition(".")[0]], tensors, module, parts)
        for module, parts in modules.items()
    }
    return AdapterContents(entries, {})


def _parsed(name: str) -> tuple[str, str]:
    """Return the module and the part (A, B, alpha) of a tensor."""
    for part, ending in PARTS.items():
        match = re.fullmatch(f"(.+?)(?:{ending})", name)
        if match and COMPONENT.fullmatch(match[1]):
            return _kohya_to_diffusers(_without_processor(match[1])), part
    raise UnsupportedError(
        f"tensor {name} does not belong to a LoRA that is read (lora_down, lora_up, lora_A, lora_B, alpha of a unet, a "
        "transformer or a text encoder): DoRA, LoHa, LoKr and a lora_mid in this form are not; it will not be dropped"
    )


def _without_processor(path: str) -> str:
    """Rename LoRAs of attention processors, as in the first diffusers: ``processor.to_out`` is ``to_out.0``."""
    path, count = re.subn(r"\.processor\.to_(\w+)$", r".to_\1", path)
    return f"{path}.0" if count and path.endswith(".to_out") else path


def _kohya_to_diffusers(path: str) -> str:
    """Return kohya's name as diffusers' path if all its words are known; any other name as it is."""
    for prefix, component in KOHYA_COMPONENTS.items():
        rest = path.removeprefix(prefix)
        if rest != path and WORDS.fullmatch(rest):
            return ".".join([component, *re.findall(f"(?:{WORD})(?=_|$)", rest)])
    return path


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


def write_diffusers(
    modules: Mapping[str, LowRank], dtype: torch.dtype, *, rank_pattern: bool = False
) -> AdapterFiles:
    """Return the deltas as diffusers stores them: one rank for all unless `rank_pattern`, and scaling 1.

    Raises:
        UnsupportedError: A module has no name that diffusers knows.
    """
    unknown = next(
        (name for name in modules if not re.match(r"(unet|transformer|text_)", name)), None
    )
    if unknown is not None:
        raise UnsupportedError(
            f"{unknown} is a name that diffusers does not know: save it as format='kohya' (--format kohya)"
        )
    highest = max(delta.rank for delta in modules.values())
    tensors: dict[str, Tensor] = {}
    for module, delta in modules.items():
        down, up = _factors(module, delta, dtype, delta.rank if rank_pattern else highest)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return AdapterFiles({}, tensors, PIPELINE)


def write_kohya(
    modules: Mapping[str, LowRank], dtype: torch.dtype, *, rank_pattern: bool = False
) -> AdapterFiles:
    """Return the deltas as kohya's trainers store them, each at its own rank, which is its alpha too.

    Raises:
        UnsupportedError: A module does not belong to a diffusion pipeline.
    """
    del rank_pattern
    several = any(name.startswith(("text_encoder_2.", "lora_unet_")) for name in modules)
    prefixes = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_", "transformer": "lora_unet_"}
    prefixes["text_encoder"] = "lora_te1_" if several else "lora_te_"
    tensors: dict[str, Tensor] = {}
    for module, delta in modules.items():
        component, _, path = module.partition(".")
        if not COMPONENT.fullmatch(module) or (path and component not in prefixes):
            raise UnsupportedError(
                f"{module} does not belong to a diffusion pipeline: save it in PEFT's format (without --format)"
            )
        name = prefixes[component] + path.replace(".", "_") if path else module
        down, up = _factors(module, delta, dtype, delta.rank)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(delta.rank))
    return AdapterFiles({}, tensors, PIPELINE)


def _factors(module: str, delta: LowRank, dtype: torch.dtype, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors at scaling 1, padded with zeros to a rank, as the layer stores them."""
    if is_vector(delta) or delta.layout.transposed:
        raise UnsupportedError(
            f"{module}: files of image models hold LoRAs of matrices and convolutions only"
        )
    kernel = () if delta.layout.shape is None else delta.layout.shape[2:]
    lora_A, lora_B = delta.padded(rank)
    down, up = lora_A.reshape(rank, -1, *kernel), lora_B[(..., *[None] * len(kernel))]
    return down.to(dtype), up.to(dtype)


register(Format(PIPELINE_TYPE, read))
register(Writer("diffusers", write_diffusers))
register(Writer("kohya", write_kohya))
