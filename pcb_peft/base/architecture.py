"""What transformers knows about an architecture: its parameters, layers and ties, without their values."""

import contextlib
import dataclasses
import gc
import re
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pcb_peft.deltas.layout import held_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, slots=True)
class Skeleton:
    """What transformers knows about an architecture; empty where it does not know it.

    Attributes:
        parameters: The names of all parameters in memory.
        layers: Module → layer, on the meta device.
        tied: Parameter → the others that are the same tensor.
        prefix: The module that is the bare model, ``bert`` in a ``BertForMaskedLM``.
        inputs: The name of the input embeddings, if the model has some.
        embeddings: The parameters of the input embeddings and of the output layer.
        conversions: How names and tensors of a file become those in memory (transformers 5).
    """

    parameters: frozenset[str]
    layers: Mapping[str, nn.Module]
    tied: Mapping[str, tuple[str, ...]]
    prefix: str
    conversions: tuple[Any, ...]
    inputs: str | None = None
    embeddings: frozenset[str] = frozenset()

    def known(self, name: str) -> str | None:
        """`name` as this model has it: as it is, without its prefix, or with it."""
        candidates = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((name for name in candidates if name in self.parameters), None)

    def renamed(self, name: str) -> str:
        """The name in memory of a parameter of a file; `name` itself if there is none."""
        return self.known(self._convert(name)[0]) or self.known(name) or name

    def converts(self, name: str) -> bool:
        """Whether the values of a parameter of a file are computed with when it is loaded."""
        renamed, computation, _ = self._convert(name)
        return computation is not None and self.known(renamed) is not None

    def layer(self, module: str) -> nn.Module | None:
        """The layer of a module, or None where the model has none of that name."""
        known = self.known(f"{module}.weight")
        return None if known is None else self.layers.get(known.removesuffix(".weight"))

    def held(self, module: str) -> dict[str, tuple[tuple[int, ...], bool]]:
        """The parameters that a module holds itself, in their order: shape, and whether its matrices are (in, out)."""
        names = (module, module.removeprefix(f"{self.prefix}."), f"{self.prefix}.{module}")
        return held_by(next((self.layers[name] for name in names if name in self.layers), None))

    def sources(self, files: Iterable[str]) -> dict[str, list[list[str]]]:
        """The stacks in memory that are put together from parameters of the files, which are not stacks.

        Returns:
            Parameter in memory to, for each matrix of its stack, the parameters that are its rows, from top to bottom.
        """
        found: dict[str, dict[int, list[str]]] = {}
        for file in files:
            name, conversion, position = self._convert(file)
            known = self.known(name)
            if known and conversion is not None and _stacks(conversion):
                found.setdefault(known, {}).setdefault(position, []).append(file)
        return {
            name: [
                list(rows)
                for rows in zip(
                    *(sorted(parts[i], key=_natural) for i in sorted(parts)), strict=True
                )
            ]
            for name, parts in found.items()
        }

    def _convert(self, name: str) -> tuple[str, Any, int]:
        """As transformers does it: all renamings in turn, then the first computation that fits.

        Returns:
            The name in memory, that computation if there is one, and which of its patterns fits.
        """
        found, position = None, 0
        for conversion in self.conversions:
            computes = hasattr(conversion, "operations")
            if not (computes and found):
                name, pattern = conversion.rename_source_key(name)
                if computes and pattern is not None:
                    found, position = conversion, conversion.source_patterns.index(pattern)
        return name, found, position


def _stacks(conversion: Any) -> bool:
    """Whether a computation stacks matrices, after it has put some on top of each other if there are several."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in conversion.operations]
    merge, join = ("MergeModulelist", 0), ("Concatenate", 1)
    return steps == ([merge, join] if len(conversion.source_patterns) > 1 else [merge])


def _natural(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def build_skeleton(directory: Path) -> Skeleton:
    """The skeleton of the checkpoint in a directory."""
    with _uncollected():
        model = _build_on_meta(directory)
    if model is None:
        return Skeleton(frozenset(), layers={}, tied={}, prefix="", conversions=())
    inputs, embeddings = _ends(model)
    return Skeleton(
        inputs=inputs,
        embeddings=embeddings,
        parameters=frozenset(model.state_dict()),
        layers=dict(model.named_modules(remove_duplicate=False)),
        tied=_tied_names(model),
        prefix=model.base_model_prefix,
        conversions=_conversions(model),
    )


@contextlib.contextmanager
def _uncollected() -> Generator[None]:
    """Without the garbage collector: while transformers is imported it would look through all of it over and over."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _build_on_meta(directory: Path) -> "PreTrainedModel | None":
    """The model, without memory, or None where transformers has no code of its own for it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)
    except (ImportError, OSError, ValueError):
        return None


def _ends(model: "PreTrainedModel") -> tuple[str | None, frozenset[str]]:
    """The name of the input embeddings; and all parameters of these and of the output layer."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # a model without words
        return None, frozenset()
    names = {
        f"{path}.{name}": layer is inputs
        for path, layer in model.named_modules(remove_duplicate=False)
        if layer is inputs or layer is outputs
        for name, _ in layer.named_parameters(recurse=False)
    }
    return next((name for name, first in names.items() if first), None), frozenset(names)


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in groups.values()
        for name in names
        if len(names) > 1
    }


def _conversions(model: "PreTrainedModel") -> tuple[Any, ...]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4 loads the files' names as they are
        return ()
    conversions = get_model_conversion_mapping(model)
    return tuple(sorted(conversions, key=lambda conversion: hasattr(conversion, "operations")))
