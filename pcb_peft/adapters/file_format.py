"""The format in which an adapter is saved, and the library that loads it."""

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from pcb_peft.adapters.saving import PEFT, FileFormat
from pcb_peft.images.names import ImageLora
from pcb_peft.writing.base_gap import BaseGap

Same = TypeVar("Same", bound="HasFormat")

LOADING = """```python
pipeline.load_lora_weights("DIRECTORY_OR_FILE")  # a pipeline of diffusers for the base model
```

Web UIs and ComfyUI read the file from their folder of LoRAs, if it has their names."""


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

    def files_at_end(self, gap: BaseGap | None) -> Mapping[str, bytes]:
        """Return the files of a fold that can be written only when all deltas have been read."""
        del gap
        return {}

    def noted(self: Same, notes: Sequence[str]) -> Same:
        """Return the same adapter with more sentences in its report, if it has one."""
        del notes
        return self
