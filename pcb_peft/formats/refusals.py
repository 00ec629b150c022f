"""Adapters that cannot be read or written, and why."""

import re
from collections.abc import Iterable

from pcb_peft.errors import OptionError
from pcb_peft.images.names import ImageLora

NO_DELTA = "it acts on prompts or activations, not on weights: there is no ΔW"
NO_SINGLE_DELTA = "what it adds to a weight depends on the input: there is no single ΔW"
REASONS = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING"), NO_DELTA),
    **dict.fromkeys(("PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"), NO_DELTA),
    **dict.fromkeys(("XLORA", "POLY", "LILY", "SHADOW"), NO_SINGLE_DELTA),
    "FROD": "its factors come from a joint decomposition of all the base model's layers",
    "TINYLORA": "which of its vectors belongs to which module follows from the order of the model's layers",
    "UNILORA": "its file does not say which modules it changes",
}
"""PEFT's name of a tuner that is not read to the reason."""

PIPELINE_MODULE = re.compile(
    r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks)\.|lora_(unet|te\d?)_"
)
"""Matches modules of a diffusion pipeline, which consists of several models."""


def refuse_pipelines(modules: Iterable[str], image: ImageLora | None) -> None:
    """Raise OptionError for modules of a diffusion pipeline: PEFT loads adapters of one model only.

    Args:
        modules: Names of modules.
        image: What is known about an image LoRA; None for an adapter of PEFT, whose model may have such names, too
            (SeamlessM4T's ``text_encoder.layers.0``).
    """
    module = next(filter(PIPELINE_MODULE.match, modules), None)
    if image is not None and module is not None:
        raise OptionError(
            f"{module} belongs to a diffusion pipeline, and PEFT has no file for that: save it with "
            "format='diffusers', 'kohya' or 'comfyui' (--format)"
        )
