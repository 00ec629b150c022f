"""Names of an adapter's tensors as PEFT saves them, whatever the model was wrapped in when the file was written.

``torch.compile``, FSDP, DDP and activation checkpointing put a wrapper around a model or its layers, and the wrapper's
name into every name below it. A checkpoint of a whole model (``torch.save(model.state_dict())``) also keeps the name
of the adapter, which PEFT leaves out::

    _orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.lora_A.default.weight
              base_model.model.model.layers.0.mlp.up_proj.lora_A.weight

Tinker calls the output layer ``model.unembed_tokens``, of whatever model: it is transformers' ``lm_head``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.files.adapter_config import PATTERNS
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.keys import PREFIX

WRAPPERS = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_fpw_module",  # fairscale
        "_checkpoint_wrapped_module",
    }
)
_WHOLE_MODEL = "module"  # DistributedDataParallel, DeepSpeed; inside a layer it is the layer's own name (LeViT)
_TINKERS_OUTPUT, _OUTPUT = f"{PREFIX}model.unembed_tokens.", f"{PREFIX}lm_head."
_TUNER_PARTS = (
    r"(?:lora|ia3|hada|lokr|oft|boft|vera|pvera|hra|ln_tuning|c3a|miss|bone|delora|fourierft|waveft|randlora|road|"
    r"shira|vblora|hira|gralora|trainable_tokens)_\w+"
)
_WITH_ADAPTER = re.compile(rf"\.({_TUNER_PARTS})\.(?!weight$|bias$)([^.]+)(?=\.|$)")
_PLAIN = re.compile(rf".*\.{_TUNER_PARTS}(\.weight|\.bias)?")


class PlainNames:
    """Tensors of a file by their plain names; the file's own names do not matter any more."""

    def __init__(self, tensors: Tensors, stored: Mapping[str, str]) -> None:
        """Rename tensors.

        Args:
            tensors: The file's.
            stored: Plain name to the name in the file.
        """
        self._tensors, self._stored, self.where = tensors, stored, tensors.where

    def names(self) -> list[str]:
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(self._stored[name])

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self._stored[name])


def with_plain_names(tensors: Tensors) -> Tensors:
    """Return the tensors by their plain names; the same object where all names are plain.

    Raises:
        UnsupportedError: The file holds several adapters.
        AdapterError: Two tensors have one plain name.
    """
    names = tensors.names()
    unwrapped = {name: without_wrappers(name) for name in names}
    adapter = _only_adapter(unwrapped.values(), tensors.where)
    plain = {
        name: _without_adapter(unwrapped[name], adapter).replace(_TINKERS_OUTPUT, _OUTPUT)
        for name in names
    }
    if all(name == new for name, new in plain.items()):
        return tensors
    stored: dict[str, str] = {}
    for name, new in plain.items():
        if (other := stored.setdefault(new, name)) != name:
            raise AdapterError(
                f"{tensors.where}: {other} and {name} are one tensor under two names ({new}), and which one counts is "
                "not known; leave one of them out of the file"
            )
    return PlainNames(tensors, stored)


def with_plain_patterns(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration with no wrapper in the module names of its patterns."""
    renamed = {
        field: {without_wrappers(str(key)): value for key, value in config[field].items()}
        for field in PATTERNS
        if isinstance(config.get(field), Mapping)
    }
    return {**config, **renamed} if any(renamed[f] != config[f] for f in renamed) else config


def without_wrappers(name: str) -> str:
    """Return a dotted name without the wrappers in it."""
    parts = name.split(".")
    above = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(
        part
        for i, part in enumerate(parts)
        if part not in WRAPPERS and not (part == _WHOLE_MODEL and i < above)
    )


def _only_adapter(names: Iterable[str], where: str) -> str | None:
    """Return the name of the adapter in the names of PEFT's tensors; None if one tensor does without it."""
    peft_names = [name for name in names if name.startswith(PREFIX)]
    if any(map(_PLAIN.fullmatch, peft_names)):
        return None
    adapters = {match[2] for name in peft_names for match in _WITH_ADAPTER.finditer(name)}
    if len(adapters) > 1:
        raise UnsupportedError(
            f"{where} holds the adapters {', '.join(sorted(adapters))}, and one can be read at a time; load the file "
            "into a PeftModel and save each with save_pretrained(…, selected_adapters=[…])"
        )
    return next(iter(adapters), None)


def _without_adapter(name: str, adapter: str | None) -> str:
    if adapter is None:
        return name
    # PEFT saves a head under the name of its module, and a magnitude without "weight"
    short = _WITH_ADAPTER.sub(r".\1", name).replace(f".modules_to_save.{adapter}.", ".")
    return re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", short)
