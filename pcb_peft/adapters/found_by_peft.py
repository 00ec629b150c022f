"""What PEFT will find of an adapter that is written: it is loaded on the base model's skeleton, which needs no weights.

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
from pcb_peft.errors import MismatchError
from pcb_peft.formats import AdapterFiles
from pcb_peft.formats.keys import PREFIX

SHOWN = 3  # names in a message
_ADAPTER = "default"
_MATRIX = 2  # dimensions
_PART = re.compile(r"(\.base_layer)*\.(lora_|ia3_l).*$")
_BESIDE = ("peft_type", "task_type", "modules_to_save", "trainable_token_indices", "bias")


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """What PEFT did with an adapter.

    Attributes:
        lost: Modules whose tensors it did not find a place for.
        unfilled: Modules that it adapts, and for which the files hold nothing.
    """

    lost: frozenset[str]
    unfilled: frozenset[str]


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
    if not moved:
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


def as_peft_finds_it(
    files: AdapterFiles, model_class: ModelClass, count: int
) -> tuple[AdapterFiles, str]:
    """Return the adapter with targets that PEFT resolves to its modules, and a sentence for the report.

    Args:
        files: The adapter's deltas, as they would be written.
        model_class: The class that it is loaded on.
        count: Number of its modules, for the sentence.

    Raises:
        MismatchError: PEFT would not find a module.
    """
    modules = set(map(_module_of, _deltas(files)))
    layers = model_class.skeleton.layers
    files = with_parameter_targets(files, {m for m in modules if _is_no_layer(layers.get(m))})
    loaded = _load(files, model_class)
    if loaded.lost:
        files = with_parameter_targets(files, loaded.lost)
        loaded = _load(files, model_class)
    if loaded.lost:
        lost = sorted(loaded.lost)
        more = f" and {len(lost) - SHOWN} others" if len(lost) > SHOWN else ""
        raise MismatchError(
            f"PEFT {importlib.metadata.version('peft')} would not find {', '.join(lost[:SHOWN])}{more} in "
            f"{model_class.name}, as transformers builds the base model; nothing was written. Give the base model that "
            "the adapters were trained on (base_model=…, --base-model …), or fold the adapter into it"
        )
    note = f"{count} of {count} modules load in PEFT on {model_class.name}"
    if loaded.unfilled:
        note += f"; PEFT adapts {len(loaded.unfilled)} more, which stay as they are"
    return files, note


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


def _load(files: AdapterFiles, model_class: ModelClass) -> _Loaded:
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
        raise MismatchError(
            f"PEFT {importlib.metadata.version('peft')} would not load the adapter on {model_class.name}: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error
    missing = [name for name in result.missing_keys if f".{_ADAPTER}" in name]
    lost = frozenset(map(_module_of, result.unexpected_keys))
    return _Loaded(lost, frozenset(map(_module_of, missing)) - lost)
