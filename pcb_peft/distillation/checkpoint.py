"""The state of a distillation in a file, from which an interrupted run goes on."""

import dataclasses
import json
from collections.abc import Mapping, Set
from pathlib import Path

import msgspec
from torch import Tensor

from pcb_peft.errors import AdapterError, OptionError
from pcb_peft.files.json_text import parse_json
from pcb_peft.files.schema import Count, Number, checked
from pcb_peft.files.tensors import SafetensorsFile, read_finite
from pcb_peft.runtime.shown import quoted, shown
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.leftovers import repair
from pcb_peft.writing.targets import Inputs, check_file_target, resolved, writing
from pcb_peft.writing.tensors_file import save_tensors

FORMAT = "pcb_peft distillation 1"
_WAY_OUT = "delete it, or name another checkpoint"


class _Facts(msgspec.Struct):
    """Facts that a checkpoint states beside its tensors."""

    step: Count
    history: list[tuple[Count, dict[str, Number]]]


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """State of a training, with which it can go on.

    Attributes:
        step: Number of updates.
        history: Step to task to the divergence.
        tensors: What is trained, its best state and the state of the optimiser, by name.
        where: Name of the file, for messages.
    """

    step: int
    history: Mapping[int, Mapping[str, float]]
    tensors: Mapping[str, Tensor]
    where: str = "the checkpoint"

    def check(self, tasks: Set[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise OptionError where a state is not one of a training of these tasks, with tensors of these shapes."""
        if 0 not in self.history or any(row.keys() != tasks for row in self.history.values()):
            raise OptionError(f"{self.where}: its history is not that of the tasks; {_WAY_OUT}")
        there = {name: tuple(values.shape) for name, values in self.tensors.items()}
        if differing := {n for n, _ in there.items() ^ shapes.items()}:
            raise OptionError(
                f"{self.where}: {quoted(min(differing))} is missing, or does not belong there, or has another shape; "
                f"{_WAY_OUT}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file with the state of one distillation.

    Attributes:
        path: The file; None keeps nothing.
        fingerprint: Hash of the adapters, texts and settings; a file of others is refused.
    """

    path: Path | None
    fingerprint: str

    def check(self, inputs: Inputs) -> None:
        """Refuse, before anything is computed, a file that cannot be written, or that belongs to something else.

        Args:
            inputs: What the result is made from, which the file must not replace.

        Raises:
            OptionError: The file belongs to other settings, adapters or texts, or is no checkpoint.
            OutputError: It cannot be written.
        """
        if self.path is not None:
            check_file_target(self.path, overwrite="all", inputs=inputs)
            with writing(self.path):
                repair(resolved(self.path))  # a run that has come to its end writes no more
            self.read()

    def read(self) -> State | None:
        """Return the state that an earlier run left; None where there is none.

        Raises:
            OptionError: The file belongs to other settings, adapters or texts, or is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            file = SafetensorsFile(self.path)
            metadata = file.metadata()
            if metadata.get("format") != FORMAT:
                raise OptionError(f"{self.path} is no checkpoint of a distillation; {_WAY_OUT}")
            if metadata.get("fingerprint") != self.fingerprint:
                raise OptionError(
                    f"{self.path} belongs to another distillation (other adapters, texts or settings); {_WAY_OUT}"
                )
            where = f"{self.path}: state"
            content = parse_json(metadata.get("state", ""), where, OptionError, _WAY_OUT)
            facts = checked(content, _Facts, where, OptionError, _WAY_OUT)
            tensors = {name: read_finite(file, name) for name in file.names()}
        except AdapterError as error:
            raise OptionError(
                f"the checkpoint cannot be read: {shown(error)}; {_WAY_OUT}"
            ) from error
        return State(facts.step, dict(facts.history), tensors, str(self.path))

    def write(self, state: State) -> None:
        """Write the state, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        if self.path is None:
            return
        facts = json.dumps({"step": state.step, "history": list(state.history.items())})
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "state": facts}
        write_file_atomically(
            self.path,
            lambda place: save_tensors(state.tensors, place, metadata),
            overwrite="all",
        )
