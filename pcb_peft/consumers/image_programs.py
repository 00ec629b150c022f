"""Programs that load LoRAs of image and video models: diffusers, ComfyUI, kohya's sd-scripts."""

import re

from pcb_peft.consumers.consumer import Consumer, Rule
from pcb_peft.consumers.files import OutputFiles
from pcb_peft.images.names import COMFYUI, KOHYA, ImageLora, canonical_names

_PART = re.compile(r"(?:\.processor)?\.(?:\w*lora|alpha|diff|hada_|lokr_|dora_|default)|_lora\.")


def _image(files: OutputFiles) -> ImageLora:
    """Return what the names of a file say about it."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in files.tensors.items():
        module = _PART.split(name, maxsplit=1)[0]
        rows, columns = shapes.get(module, (0, 0))
        if re.search(r"lora_(B|up)|lora\.up", name) and tensor.shape:
            rows = tensor.shape[0]
        elif re.search(r"lora_(A|down)|lora\.down", name) and len(tensor.shape) > 1:
            columns = tensor.shape[1]
        shapes[module] = rows, columns
    return canonical_names(shapes, {}, shapes)[1]


def _models(image: ImageLora) -> str:
    return " or ".join(image.architectures) or "a model that is not known here"


def _not_in_diffusers(files: OutputFiles) -> str:
    """Return names that diffusers does not load, for the report; empty where it loads them."""
    image = _image(files)
    if image.dialect == KOHYA and not any(one.loads_kohya for one in image.candidates):
        return f"kohya's names of {_models(image)}"
    if image.dialect == COMFYUI and not any(one.loads_comfyui for one in image.candidates):
        return f"ComfyUI's names of {_models(image)}"
    return ""


def _not_in_comfyui(files: OutputFiles) -> str:
    found = any(re.match(r"unet\..*\.to_\w+(\.0)?\.lora_A", name) for name in files.tensors)
    return "attention layers of a UNet in PEFT's names" if found else ""


def _not_in_kohya(files: OutputFiles) -> str:
    image = _image(files)
    return "" if image.dialect == KOHYA else f"names of {image.dialect}"


DIFFUSERS = Consumer(
    "diffusers",
    "diffusers",
    "0.42",
    ("pipeline",),
    (
        Rule(
            _not_in_diffusers,
            "ignores",
            "finds no module of that name; pcb-peft export … --to diffusers",
            "run with 0.42.1",
            form="pipeline",
        ),
    ),
)
COMFYUI_PROGRAM = Consumer(
    "comfyui",
    "ComfyUI",
    "0.3",
    ("pipeline",),
    (
        Rule(
            _not_in_comfyui,
            "ignores",
            "has no such key in its map; pcb-peft export … --to comfyui",
            "comfy/lora.py, model_lora_keys_unet",
            form="pipeline",
        ),
    ),
)
KOHYA_PROGRAM = Consumer(
    "kohya",
    "kohya's sd-scripts",
    "0.9",
    ("pipeline",),
    (
        Rule(
            _not_in_kohya,
            "ignores",
            "looks up lora_unet_ and lora_te names only; pcb-peft export … --to kohya",
            "networks/lora.py, create_network_from_weights",
            form="pipeline",
        ),
    ),
)
