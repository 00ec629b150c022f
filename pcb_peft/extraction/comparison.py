"""Two checkpoints side by side: the parameters that fine-tuning changed, added or left alone."""

import dataclasses
import fnmatch
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pcb_peft.base.model import BaseModel
from pcb_peft.errors import AdapterError, MismatchError, UnsupportedError
from pcb_peft.runtime.progress import Track


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints; parameters go by the names that the fine-tuned model has in memory.

    Attributes:
        tuned: The fine-tuned model.
        base: The base model.
        changed: Parameter that has changed to its name in the base model's files.
        added: Parameters that the base model does not have.
        left_out: Parameter whose change is not wanted to its name in the base model's files; None if it is not there.
        notes: Sentences for the report on what is not extracted.
    """

    tuned: BaseModel
    base: BaseModel
    changed: Mapping[str, str]
    added: Sequence[str]
    left_out: Mapping[str, str | None]
    notes: Sequence[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter of the fine-tuned model."""
        return self.tuned.tensors[self.tuned.names.files[name]].shape

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads a parameter in float32: the base model's values where the change is left out."""
        before = self.left_out.get(name)
        if before is not None:
            return functools.partial(_read, self.base, before)
        return functools.partial(_read, self.tuned, self.tuned.names.files[name])

    def change_reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that computes the change of a parameter in float32."""
        after = functools.partial(_read, self.tuned, self.tuned.names.files[name])
        return functools.partial(_difference, after, self.base, self.changed[name])


def _read(model: BaseModel, parameter: str) -> Tensor:
    return model.tensor(parameter).float()


def _difference(after: Callable[[], Tensor], base: BaseModel, before: str) -> Tensor:
    return after() - _read(base, before)


def compare_checkpoints(
    tuned: BaseModel, base: BaseModel, leave_out: Sequence[str], track: Track
) -> Comparison:
    """Compare two checkpoints tensor by tensor.

    Args:
        tuned: The fine-tuned model.
        base: The base model.
        leave_out: Globs of parameters whose changes are not wanted.
        track: Shows progress.

    Raises:
        MismatchError: A parameter has another shape in one of them, or is tied in one of them only.
        UnsupportedError: A change is one for which adapters have no name.
        AdapterError: Nothing has changed.
    """
    changed: dict[str, str] = {}
    added: list[str] = []
    left_out: dict[str, str | None] = {}
    names = [name for name in tuned.names.files if not _is_copy(tuned, base, name)]
    for name in track(names, "compare"):
        before = _counterpart(tuned, base, name)
        if before is not None and _is_same(tuned, base, name, before):
            continue
        if any(fnmatch.fnmatchcase(name, glob) for glob in leave_out):
            left_out[name] = before
        elif before is None:
            added.append(name)
        else:
            changed[name] = before
    _refuse_converted_changes(tuned, base)
    missing = _missing(tuned, base)
    if not (changed or added):
        raise AdapterError(
            f"{tuned.source} and {base.source} hold the same values: nothing to extract"
        )
    notes = [f"left out, as asked for: {', '.join(left_out)}"] if left_out else []
    if missing:
        notes.append(f"{tuned.source} has no {', '.join(missing)}: nothing is extracted of it")
        warnings.warn(notes[-1], stacklevel=3)
    return Comparison(tuned, base, changed, added, left_out, notes)


def _is_copy(tuned: BaseModel, base: BaseModel, name: str) -> bool:
    """Return whether a parameter is a copy of one that it is tied to, and is compared under that name."""
    if base.names.in_files(name) is not None:
        return False
    return any(map(tuned.names.in_files, tuned.names.tied(name)))


def _counterpart(tuned: BaseModel, base: BaseModel, name: str) -> str | None:
    """Return the name in the base model's files of a parameter, or of one that both models tie it to."""
    ties = set(tuned.names.tied(name)).intersection(base.names.tied(name))
    return next(filter(None, map(base.names.in_files, [name, *sorted(ties)])), None)


def _is_same(tuned: BaseModel, base: BaseModel, name: str, before: str) -> bool:
    """Return whether a parameter has not changed; raise where it cannot have a difference."""
    after = tuned.tensor(tuned.names.files[name])
    values = base.tensor(before)
    if after.shape != values.shape:
        raise MismatchError(
            f"{name} has shape {tuple(after.shape)} in {tuned.source}, {tuple(values.shape)} in {base.source}; "
            "give the base that the model was trained from, its embeddings resized likewise"
        )
    same = torch.equal(after, values.to(after.dtype))
    if not same and not (after.is_floating_point() and after.ndim):
        raise UnsupportedError(
            f"{name} ({after.dtype}, shape {tuple(after.shape)}) has changed, and is not a weight: an adapter cannot "
            f"hold that; leave it out: leave_out=[{name!r}]"
        )
    return same


def _refuse_converted_changes(tuned: BaseModel, base: BaseModel) -> None:
    """Refuse changes of tensors that are fused, split or permuted on loading: adapters have no name for them."""
    for name in tuned.tensors.keys() & base.tensors.keys() - set(tuned.names.files.values()):
        if not torch.equal(tuned.tensor(name), base.tensor(name)):
            raise UnsupportedError(
                f"{name} has changed, and is not in the files as it is in memory (it is fused, split or permuted when "
                "the model is loaded): an adapter has no name for it"
            )


def _missing(tuned: BaseModel, base: BaseModel) -> list[str]:
    """Return the parameters that only the base model has; raise where only the fine-tuned model has tied them."""
    missing = [
        name
        for name in base.names.files
        if tuned.names.in_files(name) is None
        and not (tuned.names.tied(name) and base.names.tied(name))
    ]
    for name in missing:
        if tuned.names.tied(name):
            raise MismatchError(
                f"{tuned.source}: {name} is tied to another weight, in {base.source} it is not; save the fine-tuned "
                "model with tie_word_embeddings=false"
            )
    return missing
