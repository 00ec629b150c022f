"""The plan of a fold: for every parameter that changes, the edit that makes its new values."""

import dataclasses
from collections.abc import Mapping

from pcb_peft.base.conversions import Conversion
from pcb_peft.base.model import BaseModel
from pcb_peft.base.names import split_parameter_name
from pcb_peft.base.places import WeightSlice
from pcb_peft.deltas.delta import Delta
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import MismatchError
from pcb_peft.writing.converted_edits import ConvertedEdits, ReplaceFile
from pcb_peft.writing.edits import (
    AddDeltas,
    ChangeBias,
    FittedDeltas,
    InTurn,
    ReplaceParameter,
    ReplaceRows,
    TensorEdit,
)
from pcb_peft.writing.tied_weights import ParameterChange


def plan_fold(
    deltas: Mapping[str, Delta], base: BaseModel, head: Replacements
) -> dict[str, ParameterChange]:
    """Return the change of every parameter, by its name in memory; no delta is read yet.

    A parameter is replaced first, then rows of it, then a delta is added.

    Args:
        deltas: Module to delta.
        base: The base model.
        head: Parameters and rows that take the place of the base model's.

    Raises:
        MismatchError: A module is not in the base model, or two modules are one weight.
        BaseModelError: The files store a weight in another form.
    """
    parameters = {
        base.name_in_memory(*split_parameter_name(name)): new
        for name, new in head.parameters.items()
    }
    rows = {base.name_in_memory(module): new for module, new in head.rows.items()}
    edits = _delta_edits(deltas, base, {name: new.shape for name, new in parameters.items()})
    asked_for = {*edits, *parameters, *rows}
    # where ends are tied, PEFT lets both have the rows of the first, and the matrix below rows or a delta
    if base.input_embeddings in rows:
        tied = _tied_in_memory(base, base.input_embeddings)
        rows = dict.fromkeys(tied, rows[base.input_embeddings]) | rows
    for name in sorted(parameters.keys() & {*edits, *rows}):
        parameters = dict.fromkeys(_tied_in_memory(base, name), parameters[name]) | parameters
    changes: dict[str, ParameterChange] = {}
    for name in dict.fromkeys([*edits, *parameters, *rows]):
        steps: list[TensorEdit] = []
        shape = base.parameter_shape(name)
        if name in parameters:
            steps.append(ReplaceParameter(parameters[name]))
            shape = parameters[name].shape
        if name in rows:
            steps.append(ReplaceRows(name, rows[name]))
        if name in edits:
            steps.append(edits[name])
        edit = steps[0] if len(steps) == 1 else InTurn(steps)
        changes[name] = ParameterChange(name, edit, shape, name in asked_for)
    return _in_files(changes, base)


def _in_files(
    changes: Mapping[str, ParameterChange], base: BaseModel
) -> dict[str, ParameterChange]:
    """Return changes of parameters in memory with the tensors of the files that they change."""
    in_files: dict[str, ParameterChange] = {}
    converted: dict[Conversion, dict[str, TensorEdit]] = {}
    for name, change in changes.items():
        conversion = None if base.names.in_files(name) else base.names.conversion(name)
        if conversion is None:
            in_files[name] = dataclasses.replace(change, parameter=base.parameter(name))
        else:
            converted.setdefault(conversion, {})[name] = change.edit
    for conversion, edits in converted.items():
        arranged = ConvertedEdits(conversion, edits, base)
        for file in conversion.files:
            edit = ReplaceFile(arranged, file)
            in_files[file] = ParameterChange(file, edit, base.tensors[file].shape)
    return in_files


def _tied_in_memory(base: BaseModel, name: str) -> list[str]:
    """Return the parameters that share the values of one, if their names are known."""
    return [other for other in base.names.tied(name) if base.names.has(other)]


def _delta_edits(
    deltas: Mapping[str, Delta], base: BaseModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorEdit]:
    """Return the edits that add deltas, by the parameter's name in memory.

    Args:
        deltas: Module to delta.
        base: The base model.
        shapes: Name in memory to shape, of the parameters that the adapter replaces.
    """
    slices = {module: base.slices(module) for module in deltas}
    names = {
        module: base.name_in_memory(module)
        for module, places in slices.items()
        if places[0].is_whole_parameter
    }
    own_shapes = {module: shapes[name] for module, name in names.items() if name in shapes}
    fitted_deltas = FittedDeltas(deltas, base, own_shapes)
    modules: dict[str, dict[WeightSlice, str]] = {}
    for module, places in slices.items():
        for place in places:
            name = names.get(module, place.parameter)
            other = modules.setdefault(name, {}).setdefault(place, module)
            if other != module:
                raise MismatchError(
                    f"{module} and {other} are two names for {name}; leave one of them out"
                )
    edits: dict[str, TensorEdit] = {
        name: AddDeltas(fitted_deltas, by_place) for name, by_place in modules.items()
    }
    for module in deltas:
        if base.bias_parameter(module) is not None:
            bias = base.name_in_memory(module, "bias")
            edits.setdefault(bias, ChangeBias(fitted_deltas, module))
    return edits
