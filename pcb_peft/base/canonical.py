"""Canonical names: one weight goes by several names, and transformers' own code tells which of them mean the same.

A checkpoint of Gemma 3 is loaded by several classes, and by several versions of transformers, and an adapter's names
depend on both::

    model.language_model.layers.0.mlp.up_proj     Gemma3ForConditionalGeneration
    language_model.model.layers.0.mlp.up_proj     the same class before transformers 4.52
    model.layers.0.mlp.up_proj                    Gemma3ForCausalLM, the text model alone
    layers.0.mlp.up_proj                          Gemma3TextModel, the text model without its head

Names of older versions are converted as transformers converts the names in a checkpoint. Names of another class are
those of the same module: the text model of one class is a submodule of the other.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcb_peft.base.architecture import (
    TRANSFORMERS_ERRORS,
    Skeleton,
    built_on_meta,
    skeleton_of,
    text_config,
)
from pcb_peft.base.config import WAY_OUT, bounded_modules
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types, and the class of transformers that does each."""

CLASS_ENDS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Ends of the names of transformers' classes, and PEFT's task type for each."""

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
"""Task types whose models have a head with a row per class."""

LANGUAGE_MODELS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Task types whose models write."""


def task_type_of_class(name: str) -> str | None:
    """Return PEFT's task type for a class of transformers, by the end of its name; None if it says nothing."""
    return next((task for end, task in CLASS_ENDS.items() if name.endswith(end)), None)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelClass:
    """A class of transformers that loads a checkpoint, with the names that modules have in it.

    Attributes:
        name: Its name, such as "LlamaForCausalLM".
        skeleton: Its modules and parameters.
        paths: Path of a submodule to the path of the same submodule in the class that the checkpoint names.
    """

    name: str
    skeleton: Skeleton
    paths: tuple[tuple[str, str], ...] = ()

    def current_name(self, module: str) -> str | None:
        """Return the name that a module has in this class today, or None if the class has no such module.

        Args:
            module: A module's path, or a parameter's that is no module's weight, or an expert's (``experts.3.up_proj``,
                ``experts.gate_up_proj.3``), under its present name or one of an older transformers.
        """
        if self._has(module):
            return module
        renamed = self.skeleton.converted(f"{module}.weight").removesuffix(".weight")
        if self._has(renamed):
            return renamed
        renamed = self.skeleton.converted(module)
        if self._has(renamed):
            return renamed
        router = module.removesuffix(".linear")  # as some trainers wrap it for PEFT
        return router if router != module and self._has(router) else None

    def native_name(self, module: str) -> str | None:
        """Return the name of a module if it is the one that it has in this class today, else None."""
        return module if self._has(module) else None

    def in_checkpoint_class(self, module: str) -> str:
        """Return the name of one of this class's modules in the class that the checkpoint names."""
        for here, there in self.paths:
            prefix = f"{here}." if here else ""
            if module.startswith(prefix):
                rest = module.removeprefix(prefix)
                return f"{there}.{rest}" if there else rest
        return module

    def _has(self, name: str) -> bool:
        skeleton = self.skeleton
        stack, _, number = name.rpartition(".")
        expert = number.isdecimal() and stack in skeleton.parameters
        known = f"{name}.weight" in skeleton.parameters or name in skeleton.parameters
        place = None if known or expert else skeleton.place_in_stack(name)
        in_stack = place is not None and place.stack.split(".")[0] == name.split(".")[0]
        return known or expert or in_stack


@dataclasses.dataclass(frozen=True, slots=True)
class CanonicalNames:
    """The names of a base model's modules.

    Attributes:
        classes: Classes that load the checkpoint, built when they are asked for; the first is the one it names.
    """

    classes: Sequence[Callable[[], ModelClass | None]]

    def of(self, adapters: Sequence[Collection[str]]) -> list[dict[str, str | None]]:
        """Choose one name for every module that several adapters name.

        Adapters that agree on a class keep its names: adapters of the text model alone are loaded on that. Where they
        do not, the names are those of the class that the checkpoint names.

        Args:
            adapters: Names of the modules of each adapter.

        Returns:
            For each adapter, name to canonical name; None for a module that no class has.
        """
        classes: list[ModelClass] = []
        for model_class in self._built():
            own_name = model_class.native_name if classes else model_class.current_name
            classes.append(model_class)
            names = [{name: own_name(name) for name in adapter} for adapter in adapters]
            if all(None not in found.values() for found in names):
                return names
        return [{name: _in_first_class(classes, name) for name in adapter} for adapter in adapters]

    def find(self, module: str) -> str | None:
        """Return a module's name in the class that the checkpoint names; None if no class has it."""
        return _in_first_class(self._built(), module)

    @property
    def skeleton(self) -> Skeleton | None:
        """The architecture of the class that the checkpoint names; None if transformers does not know it."""
        first = next(self._built(), None)
        return None if first is None else first.skeleton

    def loaded_as(self, modules: Collection[str]) -> ModelClass | None:
        """Return the class that an adapter of these modules is loaded on: the first that has most of them.

        Args:
            modules: Names of modules as they are written, those that the adapter replaces included.
        """
        best: ModelClass | None = None
        most = -1
        for model_class in self._built():
            count = sum(model_class.native_name(module) is not None for module in modules)
            if count > most:
                best, most = model_class, count
            if count == len(modules):
                break
        return best

    def __bool__(self) -> bool:
        return next(self._built(), None) is not None

    def _built(self) -> Iterator[ModelClass]:
        return filter(None, (build() for build in self.classes))


def _in_first_class(classes: Sequence[ModelClass] | Iterator[ModelClass], name: str) -> str | None:
    for model_class in classes:
        if (current := model_class.current_name(name)) is not None:
            return model_class.in_checkpoint_class(current)
    return None


def canonical_names(directory: Path, task_types: Collection[str | None] = ()) -> CanonicalNames:
    """Find the names of the modules of a checkpoint; no weights are needed.

    Args:
        directory: Where its ``config.json`` is.
        task_types: PEFT's task types of the adapters, whose classes are looked at, too.

    Returns:
        The names; false if transformers does not know the architecture.
    """
    path = directory / "config.json"
    content = read_bytes(path, BaseModelError, WAY_OUT) if path.is_file() else b""
    return _names(directory, content, tuple(dict.fromkeys(task_types)))


@functools.lru_cache(maxsize=4)
def _names(directory: Path, _content: bytes, task_types: tuple[str | None, ...]) -> CanonicalNames:
    """Find the names once for a configuration of this content."""

    @functools.cache
    def config() -> Any:
        import transformers

        try:
            return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except TRANSFORMERS_ERRORS:
            return None

    @functools.cache
    def first() -> "PreTrainedModel | None":
        try:
            return built_on_meta(directory)
        except BaseModelError:
            return None  # names can do without; whoever needs the model itself raises it again

    @functools.cache
    def checkpoint_class() -> ModelClass | None:
        model = first()
        return None if model is None else ModelClass(type(model).__name__, skeleton_of(model))

    @functools.cache
    def other(auto: str, text: bool) -> ModelClass | None:
        model = first()
        return None if model is None else _other_class(model, config(), auto, text=text)

    tasks = [AUTO_CLASSES[str(task)] for task in task_types if task in AUTO_CLASSES]
    autos = list(dict.fromkeys([*tasks, "AutoModelForCausalLM", "AutoModel"]))
    variants = [functools.partial(other, auto, text) for text in (False, True) for auto in autos]
    return CanonicalNames([checkpoint_class, *variants])


def _other_class(
    first: "PreTrainedModel", config: Any, auto: str, *, text: bool
) -> ModelClass | None:
    """Build another class that loads the checkpoint of `first`, for its whole configuration or for the text model's."""
    import torch
    import transformers

    own = text_config(config) if text else config
    if text and own is config:
        return None
    try:
        with torch.device("meta"), bounded_modules():
            model: Any = getattr(transformers, auto).from_config(own, trust_remote_code=False)
    except (ImportError, ValueError, AttributeError):
        return None
    if type(model) is type(first):
        return None
    return ModelClass(type(model).__name__, skeleton_of(model), tuple(_same_paths(model, first)))


def _same_paths(model: Any, first: Any) -> Iterator[tuple[str, str]]:
    """Yield the paths of the submodules that two classes share: the output layer, and the model without its head."""
    from transformers import PreTrainedModel

    heads = [_output_path(some) for some in (model, first)]
    if None not in heads:
        yield str(heads[0]), str(heads[1])
    classes = Counter(type(layer) for _, layer in first.named_modules())
    paths = {type(layer): path for path, layer in first.named_modules()}
    done: list[str] = []
    for path, layer in model.named_modules():
        inside = any(path.startswith(f"{outer}.") or not outer for outer in done)
        unique = classes[type(layer)] == 1  # of two of one class it is not known which is meant
        if unique and isinstance(layer, PreTrainedModel) and not inside:
            done.append(path)
            yield path, paths[type(layer)]


def _output_path(model: Any) -> str | None:
    try:
        output = model.get_output_embeddings()
    except NotImplementedError:
        return None
    return next((path for path, layer in model.named_modules() if layer is output), None)


def names_in_checkpoint(base: BaseModel, modules: Collection[str]) -> dict[str, str]:
    """Return the names in the checkpoint's class of modules that the checkpoint does not know by the given ones.

    Args:
        base: The base model.
        modules: Names of modules, of any class that loads it.

    Returns:
        Name to name in the class that the checkpoint names. Names that are right, or unknown, are left out.
    """
    unknown = [module for module in modules if not base.names.stores(f"{module}.weight")]
    unknown = [module for module in unknown if not base.names.stores(module)]
    names = canonical_names(base.directory, [*AUTO_CLASSES]) if unknown else CanonicalNames([])
    found = {module: names.find(module) for module in unknown}
    return {old: new for old, new in found.items() if new is not None and new != old}
