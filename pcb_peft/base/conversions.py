"""Parameters whose values transformers arranges in another way when it loads a checkpoint, and back again.

The files of a Nomic BERT hold one ``attn.Wqkv.weight``; in memory it is ``q_proj.weight``, ``k_proj.weight`` and
``v_proj.weight``. The rules and the operations (chunk, concatenate, stack, transpose, permute …) are transformers' own.
An operation moves values, and computes none, so that a change in memory is a change of the files.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.base.architecture import Skeleton
from pcb_peft.errors import BaseModelError


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """One use of a rule of transformers: tensors of the files to parameters in memory, and back.

    Attributes:
        rule: Transformers' `WeightConverter`.
        sources: For each of its source patterns, the names in the files, in their order.
        parameters: For each of its target patterns, the name in memory.
        skeleton: The architecture, whose sizes some operations look at.
    """

    rule: Any
    sources: tuple[tuple[str, ...], ...]
    parameters: tuple[str, ...]
    skeleton: Skeleton

    @property
    def files(self) -> tuple[str, ...]:
        """Names in the files of all its tensors."""
        return tuple(name for names in self.sources for name in names)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters in memory, by name.

        Args:
            tensors: The tensors of the files, by name.

        Raises:
            BaseModelError: Transformers' operations do not give these parameters.
        """
        patterns = self.rule.source_patterns
        values: dict[str, Any] = {
            pattern: [tensors[name] for name in names]
            for pattern, names in zip(patterns, self.sources, strict=True)
        }
        values = self._run(values, self.rule.operations, self.rule)
        found = {
            name: _one(values.get(pattern))
            for pattern, name in zip(self.rule.target_patterns, self.parameters, strict=True)
        }
        return self._checked(found, {name: self.skeleton.shape(name) for name in found})

    def rows(self, outputs: int) -> dict[str, Tensor]:
        """Return the rows of the tensor in the files that each parameter in memory is made of, by name.

        Args:
            outputs: Number of rows of the only tensor in the files.
        """
        numbers = torch.arange(outputs)[:, None]
        values = self._run(
            {self.rule.source_patterns[0]: [numbers]}, self.rule.operations, self.rule
        )
        found = {
            name: _one(values.get(pattern))
            for pattern, name in zip(self.rule.target_patterns, self.parameters, strict=True)
        }
        return {name: rows[:, 0] for name, rows in found.items() if rows is not None}

    def store(
        self, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """Return the tensors of the files, by name.

        Args:
            parameters: All its parameters in memory, by name.
            shapes: Shapes of the tensors in the files.

        Raises:
            BaseModelError: Transformers has no way back.
        """
        back = self.rule.reverse_transform()
        values: dict[str, Any] = {
            pattern: [parameters[name]]
            for pattern, name in zip(back.source_patterns, self.parameters, strict=True)
        }
        values = self._run(values, self._back(shapes), back)
        found = {
            name: _one(values.get(_numbered(pattern, number)))
            for pattern, names in zip(back.target_patterns, self.sources, strict=True)
            for number, name in enumerate(names)
        }
        return self._checked(found, dict(shapes))

    def _back(self, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[Any]:
        """Return the operations that lead back; one that depends on shapes is done if it was done on loading."""
        steps: list[Any] = []
        for step in reversed(self.rule.operations):
            depends = getattr(step, "check_dims", False)
            if depends and shapes[self.files[0]] == self.skeleton.shape(self.parameters[0]):
                continue
            back = step.reverse_op
            if depends:
                back.check_dims = False
            steps.append(back)
        return steps

    def _run(self, values: dict[str, Any], steps: Iterable[Any], rule: Any) -> dict[str, Any]:
        model: Any = self.skeleton.layers[""]
        done = False
        for step in steps:
            done = True
            values = step.convert(
                values,
                source_patterns=rule.source_patterns,
                target_patterns=rule.target_patterns,
                full_layer_name=self.parameters[0],
                model=model,
                config=model.config,
                missing_keys=None,
            )
        if done:
            return values
        return dict(zip(rule.target_patterns, values.values(), strict=True))

    def _checked(
        self, found: Mapping[str, Tensor | None], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        for name, values in found.items():
            if values is None or tuple(values.shape) != shapes[name]:
                shape = None if values is None else tuple(values.shape)
                raise BaseModelError(
                    f"{name}: the conversion of transformers ({', '.join(self.files[:2])} …) gives {shape}, and the "
                    f"model holds {shapes[name]}; load the model with transformers and save it again with "
                    "save_pretrained"
                )
        return {name: values for name, values in found.items() if values is not None}


def conversions_of(skeleton: Skeleton, files: Iterable[str]) -> dict[str, Conversion]:
    """Return the parameters in memory that are made of tensors of the files by computation.

    Args:
        skeleton: The architecture.
        files: Names of the tensors in the files.

    Returns:
        Name in memory to its conversion, which other parameters may share.
    """
    found: dict[tuple[int, str], tuple[Any, dict[int, list[str]]]] = {}
    for file in files:
        name, rule, position = skeleton.converted_name(file)
        if rule is not None:
            _, sources = found.setdefault((id(rule), name), (rule, {}))
            sources.setdefault(position, []).append(file)
    conversions: dict[str, Conversion] = {}
    for (_, first), (rule, sources) in found.items():
        targets = [
            first.replace(rule.target_patterns[0], target) for target in rule.target_patterns
        ]
        names = [skeleton.in_model(target) for target in targets]
        if None in names or len(sources) != len(rule.source_patterns):
            continue
        in_order = tuple(tuple(sorted(sources[i], key=skeleton.natural)) for i in sorted(sources))
        conversion = Conversion(rule, in_order, tuple(filter(None, names)), skeleton)
        conversions |= dict.fromkeys(conversion.parameters, conversion)
    return conversions


def _numbered(pattern: str, number: int) -> str:
    return pattern.replace("*", str(number))


def _one(values: Any) -> Tensor | None:
    return values[0] if isinstance(values, list) else values
