"""A base model with one adapter on it, loaded by transformers and PEFT."""

import contextlib
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.source import Source
from pcb_peft.base.canonical import CLASSIFIERS
from pcb_peft.data.live_heads import refuse_made_up
from pcb_peft.data.models import load_base
from pcb_peft.errors import MismatchError


@contextlib.contextmanager
def adapted_model(
    adapter: Adapter, source: Source, base_model: Any, *, dequantize: bool = False
) -> Generator[Any]:
    """Load the base model with the adapter, in evaluation mode.

    At the end the adapter is taken off a model that was given.

    Raises:
        BaseModelError: The base model cannot be loaded.
        MismatchError: PEFT found no place for a module of the adapter, or its head lacks a layer.
    """
    from peft import PeftModel

    given = not isinstance(base_model, str | Path)
    is_classifier = adapter.task_type in CLASSIFIERS
    classes = adapter.head.classes if is_classifier else None
    sized: dict[str, Any] = {} if classes is None else {"num_labels": classes}
    base = load_base(base_model, adapter.task_type, dequantize=dequantize, **sized)
    if is_classifier:
        refuse_made_up(base, adapter.head.parameters, adapter.name)
    with warnings.catch_warnings():  # peft asks transformers for this under its old name
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        try:
            model = PeftModel.from_pretrained(base, **source.for_peft(), is_trainable=True).eval()
        except (RuntimeError, ValueError) as error:
            raise MismatchError(f"{adapter.name} does not fit the base model: {error}") from error
    try:
        _check_layers(model, adapter)
        yield model
    finally:
        if given:
            model.unload()


def _check_layers(model: Any, adapter: Adapter) -> None:
    """Raise MismatchError if PEFT put no adapter of the right shape on a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers: dict[str, Any] = dict(base.named_modules())
    for module, entry in adapter.modules.entries.items():
        layer = layers.get(module)
        tuned = isinstance(layer, BaseTunerLayer)
        weight: Any = layers[module].get_base_layer().weight if tuned else None
        if weight is None or weight.numel() != entry.shape[0] * entry.shape[1]:
            raise MismatchError(
                f"{adapter.name}: PEFT put no adapter of shape {entry.shape} on {module} of {type(base).__name__}; "
                "give the model that the adapter was trained on"
            )
