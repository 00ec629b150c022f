"""A look at an adapter through PEFT before it is written: it is loaded on the base model's skeleton, without weights.

PEFT drops tensors whose names its model does not have, with a warning at most. So the files are looked up before they
are written, by the installed PEFT itself, in the model as transformers builds it.

Some layers must be targeted in another way than by their names. PEFT wraps no router (its weight is a parameter of
`target_parameters`). And where the experts of an architecture became a stack, PEFT takes every ``up_proj`` among the
targets for theirs, also that of a shared expert or of a layer without experts.
"""

import copy
import dataclasses
import importlib.metadata
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pcb_peft.base.canonical import ModelClass, canonical_names
from pcb_peft.base.hub import configuration_directory
from pcb_peft.base.rules import stacks_experts
from pcb_peft.errors import MismatchError
from pcb_peft.formats import AdapterFiles
from pcb_peft.formats.keys import PREFIX
from pcb_peft.formats.lora_experts import AS_IT_IS, installed_peft
from pcb_peft.runtime.shown import some_of

SHOWN_OF_ERROR = 500  # characters of PEFT's message
_ADAPTER = "default"
_MATRIX = 2  # dimensions
_PART = re.compile(r"(\.base_layer)*\.(lora_|ia3_l).*$")
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
_BESIDE = ("peft_type", "task_type", "modules_to_save", "trainable_token_indices", "bias")


def loaded_on(
    base_model: str | None,
    revision: str | None,
    task_type: str | None,
    modules: Collection[str],
) -> ModelClass | None:
    """Return the class of the base model that an adapter is loaded on; None where its configuration is not known.

    Args:
        base_model: Path or hub id of the base model. Nothing is fetched.
        revision: Its revision.
        task_type: PEFT's task type.
        modules: Modules that have a delta, or that the adapter replaces.
    """
    directory = configuration_directory(base_model, revision) if base_model else None
    if directory is None:
        return None
    return canonical_names(directory, [task_type]).loaded_as(modules)


def with_parameter_targets(files: AdapterFiles, modules: Collection[str]) -> AdapterFiles:
    """Return the same adapter with some modules targeted as parameters (PEFT's `target_parameters`)."""
    config = dict(files.config)
    targets: list[str] = config.get("target_modules") or []
    moved = {target: f"{target}.weight" for target in targets if target in modules}
    if not moved or config.get("peft_type", "LORA") != "LORA":  # no other kind targets parameters
        return files
    config["target_modules"] = [target for target in targets if target not in moved]
    config["target_parameters"] = sorted([*config.get("target_parameters", []), *moved.values()])
    config["peft_version"] = importlib.metadata.version("peft")
    for field in ("rank_pattern", "alpha_pattern"):
        if field in config:
            config[field] = {_moved(key, moved): value for key, value in config[field].items()}
    return dataclasses.replace(files, config=config)


def _moved(pattern: str, moved: Mapping[str, str]) -> str:
    module = pattern.removeprefix("^")
    return pattern if module not in moved else pattern + ".weight"


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """An adapter's files, and what the installed PEFT finds of them.

    Attributes:
        files: The files, with targets for PEFT.
        model_class: The class that they are loaded on.
        lost: Modules whose tensors PEFT has no place for.
        unfilled: Modules that PEFT adapts too, and for which the files hold nothing.
        error: PEFT's error, if it raises one.
    """

    files: AdapterFiles
    model_class: ModelClass
    lost: frozenset[str] = frozenset()
    unfilled: frozenset[str] = frozenset()
    error: str = ""

    @property
    def is_exact(self) -> bool:
        """True if PEFT adapts exactly the modules of the adapter."""
        return not (self.lost or self.unfilled or self.error)

    def note(self, count: int) -> str:
        """Return a sentence for the report.

        Args:
            count: Number of the adapter's modules.

        Raises:
            MismatchError: PEFT would raise an error, or not find a module.
        """
        version, where = importlib.metadata.version("peft"), self.model_class.name
        if self.error:
            raise MismatchError(
                f"PEFT {version} would not load the adapter on {where}: {self.error}; nothing was written. Give the "
                "base model that the adapters were trained on (base_model=…, --base-model …), or fold the adapter into "
                "it"
            )
        given = set(map(_module_of, _deltas(self.files)))
        if (renamed := sorted(self.unfilled & given)) and not self.lost & given:
            raise MismatchError(
                f"PEFT {version} gives {some_of(renamed)} another name while it loads an adapter, and {where} has no "
                "module of that name: it loses them of the adapters that are merged, too; nothing was written. Fold "
                "the adapter into the base model: that is exact"
            )
        if self.lost:
            raise MismatchError(
                f"PEFT {version} would not find {some_of(sorted(self.lost))} in {where}, as transformers builds the "
                "base model; nothing was written. Give the base model that the adapters were trained on "
                "(base_model=…, --base-model …), or fold the adapter into it"
            )
        more = ""
        if self.unfilled:
            more = f"; PEFT adapts {len(self.unfilled)} more, which stay as they are"
        library = f"transformers {importlib.metadata.version('transformers')}"
        found = f"{count} of {count} modules load in PEFT {version} on {where} of {library}"
        return found + more + self._other_versions()

    def _other_versions(self) -> str:
        """Return which other versions of PEFT and transformers would not find the experts, or misread them."""
        stacked = any(map(stacks_experts, self.model_class.skeleton.conversions))
        if self.files.config.get("target_parameters"):
            others = "before" if installed_peft() >= AS_IT_IS else "since"
            border = ".".join(map(str, AS_IT_IS))
            turned = f"; PEFT {others} {border} may read its experts the other way round"
            if not stacked:
                return turned
            return f"{turned}; transformers 4 has these experts one by one, and would not find them"
        if stacked or not any(map(_SINGLE_EXPERT.search, self.files.tensors)):
            return ""
        return (
            "; transformers 5 has experts as stacks: to use the adapter there, save it again there (load_adapter, "
            "save_pretrained)"
        )


def looked_up(files: AdapterFiles, model_class: ModelClass) -> Found:
    """Return an adapter with targets that PEFT resolves to its modules, as far as there are such targets.

    Args:
        files: The adapter as it would be written.
        model_class: The class that it is loaded on.
    """
    layers = model_class.skeleton.layers
    modules = set(map(_module_of, _deltas(files)))
    files = with_parameter_targets(files, {m for m in modules if _is_no_layer(layers.get(m))})
    found = _load(files, model_class)
    taken = _named_like_experts(modules, model_class) if found.error else found.lost
    if taken:
        found = _load(with_parameter_targets(files, taken), model_class)
    if found.unfilled and not found.lost:
        exact = _load(_with_whole_paths(found.files), model_class)
        found = exact if exact.is_exact else found
    return found


def _named_like_experts(modules: Collection[str], model_class: ModelClass) -> set[str]:
    """Return layers with the names of experts' parts: if PEFT takes them for those, it doubles the experts' rank."""
    rules = filter(stacks_experts, model_class.skeleton.conversions)
    parts = {
        pattern.removesuffix(".weight").rpartition(".")[2]
        for rule in rules
        for pattern in rule.source_patterns
    }
    return {
        m for m in modules if m.rpartition(".")[2] in parts and m in model_class.skeleton.layers
    }


def _with_whole_paths(files: AdapterFiles) -> AdapterFiles:
    """Return the same adapter with targets that match whole paths, and no others that end alike."""
    targets = files.config["target_modules"]
    pattern = "|".join(map(re.escape, targets))
    return dataclasses.replace(files, config={**files.config, "target_modules": pattern or targets})


def _deltas(files: AdapterFiles) -> dict[str, Tensor]:
    """Return the tensors of deltas, without heads, biases and rows of embeddings."""
    return {name: values for name, values in files.tensors.items() if _PART.search(name)}


def _module_of(name: str) -> str:
    return _PART.sub("", name.removeprefix(PREFIX))


def _is_no_layer(layer: nn.Module | None) -> bool:
    """Return whether a module holds a matrix, and is of no class that PEFT wraps."""
    from transformers.pytorch_utils import Conv1D

    if layer is None or isinstance(layer, (nn.Linear, nn.Embedding, Conv1D)):
        return False
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.ndim == _MATRIX


def _load(files: AdapterFiles, model_class: ModelClass) -> Found:
    """Load an adapter without values on a model without values."""
    import peft

    config = {key: value for key, value in files.config.items() if key not in _BESIDE}
    kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[files.config["peft_type"]]
    tensors = {
        name: torch.empty_like(values, device="meta") for name, values in _deltas(files).items()
    }
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            skeleton: Any = copy.deepcopy(model_class.skeleton.layers[""])
            model = peft.PeftModel(skeleton, kind(**config), _ADAPTER, low_cpu_mem_usage=True)
            result = peft.set_peft_model_state_dict(
                model, tensors, _ADAPTER, low_cpu_mem_usage=True
            )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        return Found(files, model_class, error=" ".join(str(error).split())[:SHOWN_OF_ERROR])
    missing = [name for name in result.missing_keys if f".{_ADAPTER}" in name]
    lost = frozenset(map(_module_of, result.unexpected_keys))
    return Found(files, model_class, lost, frozenset(map(_module_of, missing)) - lost)
