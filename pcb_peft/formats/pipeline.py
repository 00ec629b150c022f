"""LoRAs of image and video models, as their trainers store them: one file, no configuration.

A module goes by its component in a pipeline of diffusers and its path there (``unet.mid_block.attentions.0.proj_in``),
whatever name the file has for it (`pcb_peft.images.names`).
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pcb_peft.deltas.delta import Dense
from pcb_peft.deltas.replacements import ReplacedParameter
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.files.adapter_config import PipelineConfig, checked_config
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import PIPELINE_TYPE, Tensors, read_finite
from pcb_peft.formats.fused import exchanged_entry, split_entry
from pcb_peft.formats.lazy_delta import AdapterContents, Config, LazyDelta
from pcb_peft.formats.pipeline_changes import as_dora, bias_change, weight_change, with_kernel
from pcb_peft.formats.pipeline_scalings import multiplies_weight, scaling_change
from pcb_peft.formats.registry import Format, register
from pcb_peft.formats.tuner import ModuleTensors
from pcb_peft.images.names import (
    EMBEDDING,
    ImageLora,
    canonical_names,
    halves_exchanged,
    is_canonical,
    stored_name,
)

PARTS = {  # end of a tensor's name, perhaps with the adapter's name, to the part; the first that fits counts
    r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.[^.]+)?\.weight|_lora\.down\.weight": "A",
    r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)(\.[^.]+)?\.weight|_lora\.up\.weight": "B",
    r"\.lora_mid\.weight": "mid",
    r"(?<=_lora\d)\.down\.weight": "A",
    r"(?<=_lora\d)\.up\.weight": "B",
    r"\.alpha": "alpha",
    r"\.dora_scale|\.lora_magnitude_vector(\.[^.]+)?(\.weight)?": "dora_scale",
    r"\.lora_B(\.[^.]+)?\.bias": "lora_bias",
    r"\.(diff|w_norm)": "diff",
    r"\.(diff_b|b_norm)": "bias",
    r"\.(?P<part>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2)(\.[^.]+)?": "",  # what it says
    r"\.(?P<part>oft_blocks|rescale|on_input)": "",
    r"\.(?P<part>[ab][12])\.weight": "",
}

REFUSED = {  # what else files of image models hold: part of a tensor's name, and what it is
    r"string_to_param|emb_params|^clip_[lg]$|\*": (
        "an embedding of new words (textual inversion), which is no change of a weight: move it to a file of its own"
    ),
    r"\.oft_diag$": "of an older OFT of LyCORIS: extract the LoRA from a model that it is merged into",
    r"\.bm\.weight$": "of a GLoRA with a core: extract the LoRA from a model that it is merged into",
    r"\.(set_weight|reshape_weight)$": "a new weight, not the change of one: ComfyUI alone knows such files",
    r"(^|\.)(ip_adapter|image_proj|to_[kv]_ip)\.": "of an IP-Adapter, which adds layers to the model",
    r"^lllite_|(^|\.)control_model\.|controlnet": "of a ControlNet, which adds layers to the model",
    r"norm\w*\.(weight|scale|bias)$": "a norm itself, not its change: the file replaces weights of the model",
}


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the deltas of a file.

    Raises:
        UnsupportedError: A tensor belongs to nothing that is read.
        AdapterError: Tensors of a module are missing, or do not fit each other.
    """
    embeddings = [name for name in tensors.names() if name.startswith(EMBEDDING)]
    modules = {
        path: ModuleTensors(path, _stated(config, path), tensors, names, None, ())
        for path, names in _by_module(
            name for name in tensors.names() if name not in embeddings
        ).items()
    }
    changes = {
        path: None if multiplies_weight(module) else weight_change(module)
        for path, module in modules.items()
    }
    biases = {path: bias_change(module) for path, module in modules.items()}
    shapes = {path: entry.shape for path, entry in changes.items() if entry is not None}
    names, image = canonical_names(shapes, config.get("file_metadata") or {}, modules)
    _refuse_bare_names(names, image)
    entries: dict[str, LazyDelta] = {}
    for path, module in modules.items():
        name, entry, bias = names[path], changes[path], biases[path]
        if multiplies_weight(module):
            entry = scaling_change(module, name, base)
            shapes[path] = entry.shape
        whole: dict[str, LazyDelta] = {}
        if halves_exchanged(path, name, shapes.get(path)):
            _refuse_exchanged_dora(module)
            entry, bias = (one and exchanged_entry(one) for one in (entry, bias))
        if entry is not None:
            whole[name] = _on_weight(entry, module, name, image, base)
        if bias is not None:
            whole[f"{name}.bias"] = bias
        for each, change in whole.items():
            entries |= split_entry(each, change) if image.splits(name) else {each: change}
    saved = {name: _embedding(tensors, name) for name in embeddings}
    return AdapterContents(entries, saved, image=image)


def _embedding(tensors: Tensors, name: str) -> ReplacedParameter:
    return ReplacedParameter(tensors.shape(name), functools.partial(read_finite, tensors, name))


def _refuse_exchanged_dora(module: ModuleTensors) -> None:
    """Refuse what depends on W in a layer whose halves diffusers exchanges."""
    if "dora_scale" in module.names or multiplies_weight(module):
        raise UnsupportedError(
            f"{module.path} is a change that depends on W, and diffusers has the halves of this layer in another "
            "order: such a change is not read; leave it out of the file"
        )


def _on_weight(
    entry: LazyDelta, module: ModuleTensors, name: str, image: ImageLora, base: Base
) -> LazyDelta:
    """Return the change of a weight in the shape that the layer has, rescaled as a DoRA where it is one."""
    kernel = image.kernel(name)
    has_its_shape = entry.kind is not Dense or multiplies_weight(module)  # of its factors, of W
    if kernel and not has_its_shape:
        entry = with_kernel(entry, kernel, name)
    return as_dora(entry, module, name, base) if "dora_scale" in module.names else entry


def _by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the tensors of each module: part (A, B, alpha …) to name.

    Raises:
        UnsupportedError: A tensor belongs to nothing that is read.
        AdapterError: Two tensors are the same part of a module.
    """
    modules: dict[str, dict[str, str]] = {}
    listed = list(names)
    vectors = {f"{name.removesuffix('.on_input')}.weight" for name in listed if "on_input" in name}
    for name in listed:
        module, part = (name.removesuffix(".weight"), "ia3") if name in vectors else _parsed(name)
        parts = modules.setdefault(module, {})
        if part in parts:
            raise AdapterError(f"{module} has both {parts[part]} and {name}")
        parts[part] = name
    return modules


def _parsed(name: str) -> tuple[str, str]:
    """Return the module and the part (A, B, alpha …) of a tensor."""
    plain = re.sub(r"\.diff_m$", ".modulation.diff", name)
    for ending, part in PARTS.items():
        match = re.fullmatch(f"(?P<module>.+?)(?:{ending})", plain)
        if match:
            return _without_processor(match["module"]), part or match["part"]
    for found, what in REFUSED.items():
        if re.search(found, name):
            raise UnsupportedError(
                f"tensor {name} is not read: it is {what}; it will not be dropped"
            )
    raise UnsupportedError(
        f"tensor {name} does not belong to a LoRA, LoHa, LoKr, DoRA or difference (diff, diff_b) of an image model; it "
        "will not be dropped"
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


def _stated(config: Config, path: str) -> Config:
    """Return what diffusers' metadata in the file say of a module's component of the pipeline.

    Raises:
        AdapterError: A field holds something that it may not hold.
    """
    component = path.partition(".")[0]
    metadata: Mapping[str, Any] = config.get("metadata") or {}
    prefix = f"{component}."
    fields = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    return checked_config(fields, f"lora_adapter_metadata of {component}", PipelineConfig)


register(Format(PIPELINE_TYPE, read))
