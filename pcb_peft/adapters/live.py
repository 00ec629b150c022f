"""Adapters of models in memory: of PEFT's own models, of models with injected layers, of diffusers' pipelines."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from pcb_peft.adapters.beside import labels_in
from pcb_peft.adapters.source import NESTED, OpenedAdapter
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.formats.checkpoint import PIPELINE_TYPE, TensorsInMemory
from pcb_peft.formats.keys import PREFIX

FIELDS = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights")
"""Fields of a LoRA's configuration that diffusers keeps in the metadata of its files, and that are read."""


def files_of_model(model: Any, adapter_name: str) -> OpenedAdapter:
    """Return what would be written for one adapter of a model in memory.

    Args:
        model: A PeftModel; a PeftMixedModel; a model that adapters were injected into (PEFT's
            `inject_adapter_in_model`, `add_adapter` of transformers and diffusers); or a pipeline of diffusers
            (`load_lora_weights`).
        adapter_name: Name of the adapter.

    Raises:
        OptionError: The model has no adapter of that name.
    """
    components = dict(_components(model))
    if components:
        return _files_of_pipeline(components, adapter_name)
    if adapter_name not in getattr(model, "peft_config", {}):
        raise _no_adapter(adapter_name, getattr(model, "peft_config", {}))
    from peft import PeftModel

    base = _base_of(model)
    if isinstance(base, PeftModel):
        raise UnsupportedError(
            f"adapter {adapter_name!r} is in a PeftModel around another PeftModel; {NESTED}"
        )
    config = model.peft_config[adapter_name].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    config["task_type"] = getattr(config.get("task_type"), "value", config.get("task_type"))
    if config.get("base_model_name_or_path") is None:
        config["base_model_name_or_path"] = getattr(base, "name_or_path", None)
    if config["task_type"] is None:  # what PEFT writes when it saves
        names = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config["auto_mapping"] = names
    tensors = _tensors(model, adapter_name)
    if not isinstance(model, PeftModel):
        tensors = {PREFIX + name.removeprefix(PREFIX): values for name, values in tensors.items()}
    labels = labels_in({"id2label": getattr(getattr(base, "config", None), "id2label", None)})
    return OpenedAdapter(
        config, TensorsInMemory(tensors, f"adapter {adapter_name!r}"), labels=labels
    )


def _files_of_pipeline(components: Mapping[str, nn.Module], adapter_name: str) -> OpenedAdapter:
    """Return an adapter of a pipeline's components as diffusers would save it."""
    configs: dict[str, Any] = {
        name: cast("Any", model).peft_config for name, model in components.items()
    }
    having = [name for name, config in configs.items() if adapter_name in config]
    if not having:
        raise _no_adapter(adapter_name, {key: 0 for config in configs.values() for key in config})
    metadata: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in having:
        stated = configs[name][adapter_name].to_dict()
        kind = str(getattr(stated["peft_type"], "value", stated["peft_type"]))
        if kind != "LORA":
            raise UnsupportedError(
                f"adapter {adapter_name!r} of {name} is a {kind}, and diffusers' files hold LoRAs: give the model that "
                "PEFT wrapped, (PeftModel, name)"
            )
        metadata |= {f"{name}.{field}": stated[field] for field in FIELDS if field in stated}
        parts = _tensors(components[name], adapter_name)
        tensors |= {f"{name}.{part}": values for part, values in parts.items()}
    config = {"peft_type": PIPELINE_TYPE, "metadata": metadata, "file_metadata": {}}
    return OpenedAdapter(config, TensorsInMemory(tensors, f"adapter {adapter_name!r}"))


def _tensors(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter at the strength that it has in the model (diffusers' `set_adapters`)."""
    from peft import PeftModel, get_peft_model_state_dict

    tensors: dict[str, Tensor] = dict(get_peft_model_state_dict(model, adapter_name=adapter_name))
    strengths = {} if isinstance(model, PeftModel) else dict(_strengths(model, adapter_name))
    for path, strength in strengths.items():
        for part in ("lora_B.weight", "lora_B.bias", "lora_embedding_B"):
            if f"{path}.{part}" in tensors:
                tensors[f"{path}.{part}"] = tensors[f"{path}.{part}"] * strength
    return tensors


def _strengths(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, float]]:
    """Yield the modules whose LoRA has another scaling than its configuration says, and how many times as much."""
    for path, layer in model.named_modules():
        scaling = getattr(layer, "scaling", None)
        alphas = getattr(layer, "lora_alpha", None)
        if not isinstance(scaling, dict) or not isinstance(alphas, dict):
            continue
        if adapter_name not in scaling or adapter_name not in alphas:
            continue
        details = cast("Any", layer)
        rank = details.r[adapter_name]
        rank = math.sqrt(rank) if details.use_rslora.get(adapter_name) else rank
        strength = scaling[adapter_name] / (details.lora_alpha[adapter_name] / rank)
        if strength != 1:
            yield path, strength


def _components(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the components of a pipeline of diffusers that have adapters; a component alone is one, too."""
    parts = getattr(model, "components", None)
    if isinstance(parts, Mapping):
        for name, part in parts.items():  # pyright: ignore[reportUnknownVariableType]
            if isinstance(part, nn.Module) and getattr(part, "peft_config", None):
                yield str(name), part  # pyright: ignore[reportUnknownArgumentType]
    elif getattr(model, "peft_config", None) and _of_diffusers(model):
        yield ("unet" if "UNet" in type(model).__name__ else "transformer"), model


def _of_diffusers(model: object) -> bool:
    return any(kind.__module__.startswith("diffusers.models.") for kind in type(model).__mro__)


def _base_of(model: Any) -> Any:
    """Return the model without PEFT's own around it."""
    from peft import PeftMixedModel, PeftModel

    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.base_model.model if isinstance(model, PeftMixedModel) else model


def _no_adapter(name: str, others: Mapping[str, Any]) -> OptionError:
    listed = ", ".join(others) or "none (is it a PeftModel?)"
    return OptionError(f"the model has no adapter {name!r}; its adapters are {listed}")
