"""Two checkpoints side by side: the parameters that fine-tuning changed, added or left alone."""

import dataclasses
import fnmatch
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.errors import AdapterError, BaseModelError, MismatchError, UnsupportedError
from pcb_peft.runtime.progress import Track

STACK = 3  # dimensions of a parameter that holds one matrix for each expert


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints; parameters go by the names that they have in memory, matrices of a stack by their numbers.

    Attributes:
        tuned: The fine-tuned model.
        base: The base model.
        changed: Parameter that has changed to its name in the base model.
        added: Parameters that the base model does not have.
        left_out: Parameter whose change is not wanted to its name in the base model; None if it is not there.
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
        stack = stack_of(name)
        return self.tuned.parameter_shape(stack)[1:] if stack else self.tuned.parameter_shape(name)

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads a parameter in float32: the base model's values where the change is left out."""
        before = self.left_out.get(name)
        if before is not None:
            return functools.partial(_read, self.base, before)
        return functools.partial(_read, self.tuned, name)

    def change_reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that computes the change of a parameter in float32."""
        after = functools.partial(_read, self.tuned, name)
        return functools.partial(_difference, after, self.base, self.changed[name])


def stack_of(name: str) -> str | None:
    """Return the stack that a matrix is one of (``experts.down_proj`` of ``experts.down_proj.3``); else None."""
    stack, _, number = name.rpartition(".")
    return stack if number.isdecimal() else None


def parameter_names(model: BaseModel) -> list[str]:
    """Return the names in memory of all parameters that the files hold, each matrix of a stack for itself."""
    names: list[str] = []
    for name in model.names.in_model:
        shape = model.parameter_shape(name)
        is_stack = len(shape) == STACK and shape[0] > 1 and not _is_kernel(model, name)
        names += [f"{name}.{index}" for index in range(shape[0])] if is_stack else [name]
    return names


def _is_kernel(model: BaseModel, name: str) -> bool:
    """Return whether a parameter of three dimensions is that of a convolution, or of a layer that is not known."""
    layer = model.layer(name.rpartition(".")[0])
    in_stack = name.rpartition(".")[2] in model.own_parameters(name.rpartition(".")[0])
    return not in_stack or isinstance(layer, torch.nn.Conv1d)


def _values(model: BaseModel, name: str) -> Tensor:
    return model.weight(name) if stack_of(name) else model.values(name)


def _read(model: BaseModel, name: str) -> Tensor:
    return _values(model, name).float()


def _difference(after: Callable[[], Tensor], base: BaseModel, before: str) -> Tensor:
    change = after() - _read(base, before)
    if not all_finite(change):
        raise BaseModelError(
            f"{before} has values that are NaN or infinite, in {base.source} or in the fine-tuned model; fetch the "
            "model again"
        )
    return change


def compare_checkpoints(
    tuned: BaseModel, base: BaseModel, leave_out: Sequence[str], track: Track
) -> Comparison:
    """Compare two checkpoints parameter by parameter, as they are in memory.

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
    names = [name for name in parameter_names(tuned) if not _is_copy(tuned, base, name)]
    for name in track(names, "compare"):
        before = _counterpart(tuned, base, name)
        if before is not None and _is_same(tuned, base, name, before):
            continue
        if _is_left_out(name, leave_out):
            left_out[name] = before
        elif before is None:
            added.append(name)
        else:
            changed[name] = before
    _refuse_other_changes(tuned, base)
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


def _is_left_out(name: str, globs: Sequence[str]) -> bool:
    names = filter(None, (name, stack_of(name)))
    return any(fnmatch.fnmatchcase(each, glob) for each in names for glob in globs)


def _is_copy(tuned: BaseModel, base: BaseModel, name: str) -> bool:
    """Return whether a parameter is a copy of one that it is tied to, and is compared under that name."""
    return not base.holds(name) and any(map(tuned.holds, tuned.names.tied(name)))


def _counterpart(tuned: BaseModel, base: BaseModel, name: str) -> str | None:
    """Return the name in the base model of a parameter, or of one that both models tie it to."""
    ties = set(tuned.names.tied(name)).intersection(base.names.tied(name))
    return next(filter(base.holds, [name, *sorted(ties)]), None)


def _is_same(tuned: BaseModel, base: BaseModel, name: str, before: str) -> bool:
    """Return whether a parameter has not changed; raise where it cannot have a difference."""
    after, values = _values(tuned, name), _values(base, before)
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


def _refuse_other_changes(tuned: BaseModel, base: BaseModel) -> None:
    """Refuse changes of tensors whose place in memory is not known: adapters have no name for them."""
    known = set(tuned.names.files.values())
    for name in tuned.names.in_model:
        if conversion := tuned.names.conversion(name):
            known.update(conversion.files)
    for name in tuned.tensors.keys() & base.tensors.keys() - known:
        if not torch.equal(tuned.tensor(name), base.tensor(name)):
            raise UnsupportedError(
                f"{name} has changed, and is not in the files as it is in memory (it is fused, split or permuted when "
                "the model is loaded): an adapter has no name for it"
            )


def _missing(tuned: BaseModel, base: BaseModel) -> list[str]:
    """Return the parameters that only the base model has; raise where only the fine-tuned model has tied them.

    Tensors that transformers does not load, such as the ``position_ids`` of old checkpoints, are no parameters.
    """
    parameters = base.names.skeleton.parameters or base.names.in_model
    missing = [
        name
        for name in base.names.in_model
        if name in parameters and not tuned.holds(name)
        if not (tuned.names.tied(name) and base.names.tied(name))
    ]
    for name in missing:
        if tuned.names.tied(name):
            raise MismatchError(
                f"{tuned.source}: {name} is tied to another weight, in {base.source} it is not; save the fine-tuned "
                "model with tie_word_embeddings=false"
            )
    return missing
