"""The format in which an adapter is saved, and the library that loads it."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from pcb_peft.adapters.saving import PEFT, FileFormat
from pcb_peft.images.names import ImageLora
from pcb_peft.writing.base_gap import BaseGap
from pcb_peft.writing.model_card import public_name

Same = TypeVar("Same", bound="HasFormat")

LOADING = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)  # {model}
pipeline.load_lora_weights("path/or/hub-id/of/this/adapter")
```

{readers}"""
READERS = {
    "diffusers": "For ComfyUI or a web UI, write it in their names: `pcb-peft export … --to comfyui`, or `--to kohya`.",
    "kohya": "Web UIs, ComfyUI and kohya's sd-scripts read the file, too: put it into their folder of LoRAs.",
    "comfyui": "ComfyUI reads the file, too: put it into `models/loras`.",
}
COMFYUI_ALONE = """Put the file into `models/loras` of ComfyUI. diffusers does not know these names of {model}: \
`pcb-peft export … --to diffusers` writes it in its own."""


def loading_text(image: ImageLora | None, file_format: FileFormat, base_model: str | None) -> str:
    """Return the code that loads a LoRA of an image model, for its card.

    Args:
        image: What is known about it.
        file_format: Format in which it is saved.
        base_model: Path or hub id of the base model; a path is not shown.
    """
    candidates = [] if image is None else image.candidates
    model = " or ".join(one.name for one in candidates) or "the base model"
    if file_format == "comfyui" and not any(one.loads_comfyui for one in candidates):
        return COMFYUI_ALONE.format(model=model)
    base = public_name(base_model) or "BASE_MODEL"
    return LOADING.format(base=base, model=model, readers=READERS.get(file_format, ""))


class HasFormat:
    """The steps of writing an adapter that its format, or a merge, does in its own way."""

    image: ImageLora | None

    def in_format(self: Same, file_format: FileFormat | None) -> Same:
        """Return the adapter as it is saved in a format; a merge notes it in its recipe."""
        del file_format
        return self

    @property
    def file_format(self) -> FileFormat:
        """Format in which the adapter is saved unless another is asked for: the one that it came in."""
        return PEFT if self.image is None else cast("FileFormat", self.image.dialect)

    @property
    def library(self) -> str:
        """Library that loads the adapter as it is saved, for the card."""
        return "peft" if self.file_format == PEFT else "diffusers"

    def tags(self, peft_type: str) -> list[str]:
        """Return the tags of the card."""
        return [peft_type.lower(), "transformers" if self.library == "peft" else self.library]

    def files_at_end(self, facts: dict[str, Any], gap: BaseGap | None) -> Mapping[str, bytes]:
        """Return the files of a fold that can be written only when all deltas have been read."""
        del facts, gap
        return {}

    def noted(self: Same, notes: Sequence[str]) -> Same:
        """Return the same adapter with more sentences in its report, if it has one."""
        del notes
        return self
