"""Profiles: the form of an adapter that a program, or a group of programs, reads right."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.saving import RECIPE_FILE, REPORT_FILE
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.replacements import Tied
from pcb_peft.errors import OptionError
from pcb_peft.exporting.contents import Kind
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import Track
from pcb_peft.writing.targets import Inputs, Overwrite, check_file_target, check_target


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A form of output, and the way in which it is written.

    Attributes:
        adapter: The adapter, with nothing in it that the profile cannot hold.
        output: The directory, or the file, to write.
        base: The base model; None where none was given, and the adapter names none that is on this machine.
        config: ``config.json`` of the base model; empty where it is not known.
        dtype: Dtype of the tensors.
        tied: Policy of a fold for tied weights.
        dequantize: Take a quantised base model.
        overwrite: Replace what is there.
        track: Shows progress.
    """

    adapter: Adapter
    output: Path
    base: Callable[[], BaseModel] | None
    config: Mapping[str, Any]
    dtype: torch.dtype | None
    tied: Tied | None
    dequantize: bool
    overwrite: Overwrite
    track: Track

    def beside(self) -> dict[str, bytes]:
        """Return the recipe and the report of a merge, by their file names."""
        made = self.adapter.companion_files()
        return {name: made[name] for name in (RECIPE_FILE, REPORT_FILE) if name in made}


FILES = (".gguf", ".safetensors")
"""Ends of names that stand for single files."""

Write: TypeAlias = Callable[[Request], Sequence[str]]
"""Writes the files, and returns lines that say how to use them."""


def in_one_process(write: Write) -> Write:
    """Make a function that writes in the first of several processes, while the others wait."""

    def written(request: Request) -> Sequence[str]:
        lines = write(request) if current().is_main else ()
        current().barrier()
        return lines

    return written


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """A form of an adapter.

    Attributes:
        name: The word for it on the command line.
        summary: Who reads it.
        holds: The contents beside plain LoRAs that it can hold.
        write: Writes the files, and returns lines that say how to use them.
        cut: True if it can be cut to a rank and padded.
        max_rank: The highest rank that its programs take; None where there is no limit.
        tolerance: Largest difference of log-probabilities that rounding may make.
        suffix: The end of a name that asks for one file; empty where only directories are written.
        is_ours: Tells whether this package wrote such a file.
        wider: Name of a profile of the same format that can hold more, and that fewer programs read.
    """

    name: str
    summary: str
    holds: frozenset[Kind]
    write: Write
    cut: bool = True
    max_rank: int | None = None
    tolerance: float = 1e-3
    suffix: str = ""
    is_ours: Callable[[Path], bool] = lambda _: False
    wider: str = ""

    def check_output(self, output: Path, *, overwrite: Overwrite, inputs: Inputs) -> None:
        """Raise an error where an output cannot be written.

        Args:
            output: The directory, or the file.
            overwrite: What may be replaced.
            inputs: What the output is made from.

        Raises:
            OptionError: It has the name of a file that this profile does not write.
            OutputError: Something is there that must not be replaced.
        """
        if self.suffix and output.suffix == self.suffix:
            check_file_target(output, overwrite=overwrite, inputs=inputs, is_ours=self.is_ours)
        elif output.suffix in FILES and not output.is_dir():
            raise OptionError(
                f"{output} is the name of a file, and the profile {self.name} is a directory: name a directory"
            )
        else:
            check_target(output, overwrite=overwrite, inputs=inputs)
