"""An image model in one file, in the names of its original code: its weights, by the names that LoRAs have for them.

::

    model.diffusion_model.middle_block.1.proj_in.weight         unet.mid_block.attentions.0.proj_in.weight
    double_blocks.0.img_attn.qkv.weight                         transformer.….attn.{to_q,to_k,to_v}.weight
    conditioner.embedders.0.transformer.text_model.….weight     text_encoder.text_model.….weight

Tensors that no LoRA changes keep their names.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pcb_peft.base.files import TensorInfo, read_tensor_infos
from pcb_peft.base.places import EXCHANGED
from pcb_peft.errors import BaseModelError
from pcb_peft.images import text_encoders
from pcb_peft.images.names import canonical_names, halves_exchanged, is_canonical

HERE = "."
"""Name of the file for messages and paths: a checkpoint in one file is its own directory."""
MODEL = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
KINDS = ("weight", "bias")
ENCODERS = {  # beginning of names to the component of a pipeline
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
OTHER_PARTS = ("first_stage_model.", "vae.", "model_ema.", "cond_stage_model.", "conditioner.")


def tensors_of_file(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint in one file, each with its name in it.

    Raises:
        BaseModelError: It is none that can be read, or no image model that is known.
    """
    if path.suffix != ".safetensors":
        raise BaseModelError(
            f"{path} is not in safetensors (.safetensors); only this form is read: convert it, or give a directory"
        )
    stored = read_tensor_infos(path.parent, [path.name])
    names = _canonical(stored)
    if not any(map(is_canonical, names.values())):
        raise BaseModelError(
            f"{path} is no image model that is known: give the directory of a model of transformers or diffusers"
        )
    return {
        names[name]: dataclasses.replace(info, file=HERE, name=name)
        for name, info in stored.items()
    }


def _canonical(stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the names of parameters as LoRAs have them."""
    modules: dict[str, str] = {}  # parameter to module, and its kind
    model: dict[str, tuple[int, int]] = {}
    renamed: dict[str, str] = {}
    prefix = next((one for one in MODEL if any(name.startswith(one) for name in stored)), "")
    for name, info in stored.items():
        module, _, kind = _plain(name).rpartition(".")
        start = next((one for one in ENCODERS if name.startswith(one)), None)
        if start is not None:
            path = text_encoders.canonical(module.removeprefix(start), ".")
            component = _component(start, stored)
            renamed[name] = name if path is None else f"{component}.{path}.{kind}"
        elif name.startswith(prefix) and not name.startswith(OTHER_PARTS) and kind in KINDS:
            modules[name] = f"diffusion_model.{module.removeprefix(prefix)}"
            if kind == "weight" and len(info.shape) > 1:
                model[modules[name]] = (info.shape[0], info.shape[1])
    names, _ = canonical_names(model, {}, dict.fromkeys(modules.values()))
    for name, module in modules.items():
        if is_canonical(new := names[module]):
            exchanged = halves_exchanged(module, new, model.get(module, (1, 1)))
            ending = EXCHANGED if exchanged else ""
            renamed[name] = f"{new}.{_plain(name).rpartition('.')[2]}{ending}"
    return {name: renamed.get(name, name) for name in stored}


def _plain(name: str) -> str:
    """Return a parameter's name as that of a module's weight or bias: OpenCLIP's ``in_proj_weight`` is a parameter."""
    for kind in KINDS:
        if name.endswith(f".in_proj_{kind}"):
            return f"{name.removesuffix(f'_{kind}')}.{kind}"
    return name


def _component(start: str, stored: Mapping[str, TensorInfo]) -> str:
    """Return the component of a text encoder: T5 is the third in Stable Diffusion 3, the second in Flux."""
    component = ENCODERS[start]
    two = any(name.startswith("text_encoders.clip_g.") for name in stored)
    return "text_encoder_2" if component == "text_encoder_3" and not two else component
