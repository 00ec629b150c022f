"""LoRAs of image and video models, in the names that diffusers, kohya's tools or ComfyUI look up."""

import functools
from collections.abc import Sequence

import torch

from pcb_peft.adapters.saving import FileFormat, is_our_file
from pcb_peft.exporting.profile import Profile, Request

_USAGE = {
    "diffusers": 'pipeline.load_lora_weights("{}")',
    "kohya": "copy {} into models/Lora of the web UI, or give it to sd-scripts as --network_weights",
    "comfyui": "copy {} into ComfyUI/models/loras, and choose it in Load LoRA",
}
_READERS: dict[FileFormat, str] = {
    "diffusers": "diffusers: a LoRA of an image or video model in its names",
    "kohya": "kohya's sd-scripts, web UIs: the same in kohya's names",
    "comfyui": "ComfyUI: the same in the names of the original checkpoint",
}


def _write(file_format: FileFormat, request: Request) -> Sequence[str]:
    request.adapter.save_pretrained(
        request.output,
        dtype=request.dtype or torch.float32,
        overwrite=request.overwrite,
        format=file_format,
    )
    return [_USAGE[file_format].format(request.output)]


PROFILES = tuple(
    Profile(
        name,
        summary,
        frozenset(),
        functools.partial(_write, name),
        suffix=".safetensors",
        is_ours=is_our_file,
    )
    for name, summary in _READERS.items()
)
