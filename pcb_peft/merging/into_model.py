"""Merging inside a live PeftModel, for people who have one in hand."""

from collections.abc import Sequence
from typing import Any

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapter
from pcb_peft.adapters.saving import adapter_files
from pcb_peft.base.live import LiveBase
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.merging.engine import merge_adapters


def add_weighted_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    **options: Any,
) -> None:
    """Adds to a PeftModel the merge of some of its adapters: PEFT's method of that name, in the space of deltas.

    Works where PEFT's refuses (different ranks, patterns, targets, experts) or is wrong (rsLoRA, DoRA, PiSSA, biases,
    alpha patterns, (IA)³).

    Args:
        model: A PeftModel that holds the adapters.
        adapters: Their names.
        weights: One per adapter.
        adapter_name: Of the result, which the model must not have yet.
        combination_type: One of PEFT's names (``cat``, ``svd``, ``ties_svd`` …), or a method of this package.
        svd_rank: Rank of the result; default: what the name says, else lossless where the space allows it.
        density: Of methods that drop entries.
        **options: Further arguments of `merge_adapters`.

    Raises:
        OptionError: The name is taken, or an argument is not allowed. Nothing is added then.
    """
    if adapter_name in model.peft_config:
        raise OptionError(
            f"the model has an adapter {adapter_name!r} already; delete it or take another name"
        )
    if density is not None:
        options["density"] = density
    base = LiveBase(model)
    loaded = [load_adapter((model, name), base_model=base) for name in adapters]
    merged = merge_adapters(loaded, combination_type, weights, rank=svd_rank, **options)
    if merged.heads:
        raise UnsupportedError(
            f"{', '.join(merged.heads)} have heads of their own (modules_to_save), and one adapter has room for one; "
            "merge_adapters(...).save_pretrained(...) keeps each in a file; heads='first' or 'average' makes one"
        )
    add_adapter(model, merged, adapter_name)


def add_adapter(model: Any, adapter: Adapter, adapter_name: str) -> None:
    """Adds an adapter to a PeftModel, as it would be loaded from files."""
    from peft import PeftConfig, set_peft_model_state_dict

    written = adapter_files(adapter, torch.float32)
    fields = dict(written.config)
    named = [getattr(other, "target_parameters", None) for other in model.peft_config.values()]
    if "target_parameters" in fields and any(named):  # PEFT wants all adapters to say it alike
        fields["target_parameters"] = next(filter(None, named))
    config = PeftConfig.from_peft_type(**fields)
    model.add_adapter(adapter_name, config)
    try:
        set_peft_model_state_dict(model, written.tensors, adapter_name=adapter_name)
    except BaseException:
        model.delete_adapter(adapter_name)
        raise
