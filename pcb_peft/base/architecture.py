"""An architecture as transformers builds it: its parameters, layers and ties, without their values."""

import contextlib
import dataclasses
import functools
import gc
import re
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.errors
import torch
from torch import nn

from pcb_peft.base.config import WAY_OUT, bounded_modules, read_config
from pcb_peft.base.rules import conversion_rules, stacks_experts
from pcb_peft.deltas.layout import ParameterForm, own_parameters_of
from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_bytes
from pcb_peft.runtime.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SPLIT_STACK = re.compile(r"(.+)\.(\w+)s\.(\d+)")
_SINGLE_EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)")
_PARTS = {  # name of an expert's matrix to the stack that holds it, its place there, and the number of places
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}

FUSED = {  # layer that some architectures have in place of several, and those, from top to bottom
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceInStack:
    """The place of a matrix in a parameter that holds several: those of all experts, or of a fused layer.

    Attributes:
        stack: Name of the parameter in memory.
        index: Number of the expert; None in a fused layer.
        rows: First row, last row + 1 and step in the expert's matrix (out, in) there; None for the whole matrix.
        transposed: True if the stack holds its matrices as (in, out).
    """

    stack: str
    index: int | None
    rows: tuple[int, int, int] | None
    transposed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Skeleton:
    """An architecture as transformers builds it; empty where transformers does not know it.

    Attributes:
        parameters: Names of all parameters in memory.
        layers: Module to layer, on the meta device.
        tied: Parameter to the other names of the same tensor.
        tie_sources: Parameter to the one whose values it gets where the files do not say otherwise (transformers 5).
        prefix: Module that is the bare model, ``bert`` in a ``BertForMaskedLM``.
        conversions: Transformers' own rules from names and tensors of files to those in memory (transformers 5).
        input_embeddings: Name of the input embeddings; None if the model has none.
        embeddings: Parameters of the input embeddings and of the output layer.
        reads_tokens: True if the model's main input is a sequence of tokens.
    """

    parameters: frozenset[str]
    layers: Mapping[str, nn.Module]
    tied: Mapping[str, tuple[str, ...]]
    prefix: str
    conversions: tuple[Any, ...]
    input_embeddings: str | None = None
    embeddings: frozenset[str] = frozenset()
    tie_sources: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    reads_tokens: bool = False

    def in_model(self, name: str) -> str | None:
        """Return a name as this model has it: as it is, without the prefix, or with it; None if it has none of them."""
        candidates = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((name for name in candidates if name in self.parameters), None)

    def in_memory(self, name: str) -> str:
        """Return the name in memory of a parameter of a file; the same name if there is none."""
        return self.in_model(self.converted_name(name)[0]) or self.in_model(name) or name

    def is_converted(self, name: str) -> bool:
        """Return whether the values of a parameter of a file are fused, split or permuted when it is loaded."""
        in_memory, computation, _ = self.converted_name(name)
        return computation is not None and self.in_model(in_memory) is not None

    def layer(self, module: str) -> nn.Module | None:
        """Return the layer of a module, or None where the model has none of that name."""
        weight = self.in_model(f"{module}.weight")
        return None if weight is None else self.layers.get(weight.removesuffix(".weight"))

    def own_parameters(self, module: str) -> dict[str, ParameterForm]:
        """Return the parameters that a module holds itself, in their order."""
        names = (module, module.removeprefix(f"{self.prefix}."), f"{self.prefix}.{module}")
        return own_parameters_of(
            next((self.layers[name] for name in names if name in self.layers), None)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter in memory."""
        module, _, kind = name.rpartition(".")
        return tuple(getattr(self.layers[module], kind).shape)

    @staticmethod
    def natural(name: str) -> list[int]:
        """Return the numbers in a name, by which names are sorted: the tenth layer after the ninth."""
        return [int(number) for number in re.findall(r"\d+", name)]

    def stack_sources(self, files: Iterable[str]) -> dict[str, list[list[str]]]:
        """Return the stacks in memory that are made of parameters of the files that are not stacks.

        Args:
            files: Names of the parameters in the files.

        Returns:
            Stack in memory to the parameters that are the rows, from top to bottom, of each of its matrices.
        """
        parts_of: dict[str, dict[int, list[str]]] = {}
        for file in files:
            name, conversion, position = self.converted_name(file)
            stack = self.in_model(name)
            if stack and conversion is not None and stacks_experts(conversion):
                parts_of.setdefault(stack, {}).setdefault(position, []).append(file)
        return {stack: _by_matrix(parts) for stack, parts in parts_of.items()}

    def converted(self, name: str) -> str:
        """Return a parameter's name of an older transformers under today's name; other names as they are.

        A name that stays a part of a parameter in memory (an expert's) is converted as far as it is one of its own.
        """
        for conversion in self.conversions:
            if not hasattr(conversion, "operations"):
                name, _ = conversion.rename_source_key(name)
        return name

    def place_in_stack(self, module: str) -> PlaceInStack | None:
        """Return the place of an expert's matrix in the stack that holds it in memory; None for other modules.

        Args:
            module: Its path where experts are stored one by one (``experts.3.up_proj``); or as some trainers split a
                stack (``experts.gate_up_projs.3``).
        """
        if split := _SPLIT_STACK.fullmatch(module):
            return self._place(split[1], split[2], int(split[3]), 0, 1)
        name, rule, position = self.converted_name(f"{module}.weight")
        if rule is not None and stacks_experts(rule) and (stack := self.in_model(name)):
            numbers = self.natural(module)
            for number in self.natural(stack):  # of the layer
                if number in numbers:
                    numbers.remove(number)
            index = numbers[0] if numbers else -1
            container, _, leaf = stack.rpartition(".")
            return self._place(container, leaf, index, position, len(rule.source_patterns))
        single = _SINGLE_EXPERT.fullmatch(module)
        if single and single[3] in _PARTS:
            leaf, position, count = _PARTS[single[3]]
            return self._place(single[1], leaf, int(single[2]), position, count)
        return self._place_in_layer(module)

    def _place_in_layer(self, module: str) -> PlaceInStack | None:
        """Return the place of a projection in a layer that is fused in memory."""
        container, _, leaf = module.rpartition(".")
        for fused, parts in FUSED.items():
            stack = self.in_model(f"{container}.{fused}.weight") if leaf in parts else None
            if stack is None or self.in_model(f"{module}.weight"):
                continue
            heights = self._heights(fused, self.shape(stack)[0])
            if sum(heights) == self.shape(stack)[0]:
                start = sum(heights[: parts.index(leaf)])
                rows = (start, start + heights[parts.index(leaf)], 1)
                return PlaceInStack(stack, None, rows, transposed=False)
        return None

    def _heights(self, fused: str, outputs: int) -> list[int]:
        """Return the numbers of rows of the projections in a fused layer."""
        if fused != "qkv_proj":
            return [outputs // len(FUSED[fused])] * len(FUSED[fused])
        model: Any = self.layers[""]
        config = text_config(model.config)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return [heads * width, key_heads * width, key_heads * width]

    def _place(
        self, container: str, leaf: str, index: int, position: int, count: int
    ) -> PlaceInStack | None:
        """Return a place in a stack, unless the model has no such stack or no such expert."""
        stack = self.in_model(f"{container}.{leaf}")
        if stack is None or len(self.shape(stack)) != 3 or not 0 <= index < self.shape(stack)[0]:
            return None
        layer = self.layers[stack.rpartition(".")[0]]
        transposed = bool(getattr(layer, "is_transposed", False))
        outputs = self.shape(stack)[2 if transposed else 1]
        rows = (position * outputs // count, (position + 1) * outputs // count, 1)
        if not getattr(layer, "is_concatenated", True):
            rows = (position, outputs, count)
        return PlaceInStack(stack, index, None if count == 1 else rows, transposed)

    def converted_name(self, name: str) -> tuple[str, Any, int]:
        """Convert a name of a file as transformers does: by all renamings in turn, then by the first rule that fits.

        Returns:
            The name in memory (of several, the first), that rule if there is one, and the number of its pattern.
        """
        computation, position = None, 0
        for conversion in self.conversions:
            computes = hasattr(conversion, "operations")
            if not (computes and computation):
                name, pattern = conversion.rename_source_key(name)
                if computes and pattern is not None:
                    computation, position = conversion, conversion.source_patterns.index(pattern)
        return name, computation, position


def _by_matrix(parts: Mapping[int, list[str]]) -> list[list[str]]:
    """Return the parameters of each matrix, from those of all matrices by the part that they are (gate, up).

    Raises:
        BaseModelError: Some matrices have one of the parts and not the other.
    """
    in_order = [sorted(parts[position], key=Skeleton.natural) for position in sorted(parts)]
    if len({len(names) for names in in_order}) > 1:
        most = max(in_order, key=len)
        raise BaseModelError(
            f"the files hold {min(map(len, in_order))} of the {len(most)} matrices that stand beside {most[0]} and "
            "others: the checkpoint is damaged; fetch the model again"
        )
    return [list(rows) for rows in zip(*in_order, strict=True)]


NO_SKELETON = Skeleton(frozenset(), layers={}, tied={}, prefix="", conversions=())
"""The skeleton of an architecture that transformers does not know."""


def build_skeleton(directory: Path) -> Skeleton:
    """Return the skeleton of the checkpoint in a directory."""
    model = built_on_meta(directory)
    if model is None:
        return NO_SKELETON
    return skeleton_of(model)


def skeleton_of(model: "PreTrainedModel") -> Skeleton:
    """Describe a model that is on the meta device."""
    inputs, embeddings = _ends(model)
    return Skeleton(
        input_embeddings=inputs,
        embeddings=embeddings,
        parameters=frozenset(model.state_dict()),
        layers=dict(model.named_modules(remove_duplicate=False)),
        tied=_tied_names(model),
        tie_sources=dict(getattr(model, "all_tied_weights_keys", {})),
        prefix=model.base_model_prefix,
        conversions=conversion_rules(model),
        reads_tokens=model.main_input_name == "input_ids",
    )


TRANSFORMERS_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    AssertionError,
    getattr(huggingface_hub.errors, "StrictDataclassError", ValueError),  # older versions lack it
)
"""What transformers raises for a configuration that it cannot make sense of."""


@contextlib.contextmanager
def _without_garbage_collection() -> Generator[None]:
    """Pause the garbage collector, which would look through all of transformers repeatedly while it is imported."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def built_on_meta(directory: Path) -> "PreTrainedModel | None":
    """Build the model of a checkpoint without memory; None if transformers has no code of its own for it.

    Raises:
        BaseModelError: transformers knows the architecture, and cannot make sense of the configuration.
    """
    with _without_garbage_collection():
        import transformers

    if read_config(directory).get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    return _built(directory, read_bytes(directory / "config.json", BaseModelError, WAY_OUT))


@functools.lru_cache(maxsize=4)
def _built(directory: Path, _content: bytes) -> "PreTrainedModel | None":
    """Build a model once for a configuration of this content; nobody changes it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        named = _named_class(config)
        with torch.device("meta"), bounded_modules():
            if named is not None:
                return named(config)
            if type(config) not in transformers.MODEL_MAPPING:
                return None
            return transformers.AutoModel.from_config(config, trust_remote_code=False)
    except ImportError:  # of a library that this architecture needs, and that is not installed
        return None
    except TRANSFORMERS_ERRORS as error:
        raise unreadable_config(str(directory), error) from error


def text_config(config: Any) -> Any:
    """Return the configuration of a model's text part; the whole one where there is none, or two (MusicGen)."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def _named_class(config: Any) -> Any:
    """Return the class that a configuration names as its model's, or None.

    Transformers 4 writes the name of Qwen2-VL's class into the configuration of its text model.
    """
    import transformers

    for place in (config, text_config(config)):
        named = getattr(transformers, (place.architectures or [""])[0], None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            fits = place is config or named.config_class is type(config)
            return named if fits else None
    return None


def unreadable_config(source: str, error: Exception) -> BaseModelError:
    """Return the error that says why transformers cannot load a model, with the way out."""
    import transformers

    if isinstance(error, OSError | RuntimeError):  # no such model, no memory …
        return BaseModelError(f"{source} cannot be loaded with transformers: {shown(error)}")
    reason = shown(f"{type(error).__name__}: {error}")
    return BaseModelError(
        f"{source} cannot be loaded with transformers {transformers.__version__}: {reason}; its config.json is "
        "damaged, or was written for another version: install that version, or get the model again"
    )


def _ends(model: "PreTrainedModel") -> tuple[str | None, frozenset[str]]:
    """Return the name of the input embeddings, and all parameters of these and of the output layer."""
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
