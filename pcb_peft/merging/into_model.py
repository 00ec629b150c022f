"""Merging inside a live PeftModel, for people who have one in hand."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapter
from pcb_peft.adapters.saving import adapter_files
from pcb_peft.base.live import LiveBase
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.merging.engine import merge_adapters
from pcb_peft.plugins.options import did_you_mean

SVD_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")  # torch.linalg.svd's


def add_weighted_adapter(  # noqa: PLR0913  (PEFT's own arguments, in PEFT's order)
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    **options: Any,
) -> None:
    """Add to a PeftModel the merge of some of its adapters: PEFT's method of that name, computed on ΔW.

    Works where PEFT's refuses (different ranks, patterns, targets, experts) or is wrong (rsLoRA, DoRA, PiSSA, biases,
    alpha patterns, (IA)³). Its errors about arguments and adapters are ValueErrors, as PEFT's are.

    Args:
        model: A PeftModel that holds the adapters.
        adapters: Their names.
        weights: One per adapter.
        adapter_name: Name of the result, which the model must not have yet. (PEFT's method does nothing if it has.)
        combination_type: One of PEFT's names (``cat``, ``svd``, ``ties_svd`` …), or a method of this package.
        svd_rank: Rank of the result; default: the one that the name stands for, else lossless where the space allows
            it.
        svd_clamp: Refused unless None: PEFT clamps the factors of its decomposition, which are others here.
        svd_full_matrices: No effect: the result is the same, and the small decomposition is always enough.
        svd_driver: No effect: decompositions are made on the CPU.
        density: Fraction of the entries that is kept, for methods that drop entries.
        majority_sign_method: "total", the sign of the sum. "frequency" is refused.
        **options: Further arguments of `merge_adapters`, such as ``heads="first"``.

    Raises:
        OptionError: The name is taken, or an argument is not allowed. Nothing is added then.
        UnsupportedError: Several adapters have heads of their own.

    Example:
        add_weighted_adapter(model, ["math", "code"], [1.0, 0.5], "both", combination_type="ties_svd", density=0.3)
        model.set_adapter("both")
    """
    _check_names(model, adapters, adapter_name)
    _check_svd(svd_clamp, svd_full_matrices, svd_driver)
    if majority_sign_method != "total":
        raise OptionError(
            f"majority_sign_method is {majority_sign_method!r}; only 'total' is supported: the sign of the sum decides"
        )
    given: dict[str, Any] = options if density is None else {**options, "density": density}
    base = LiveBase(model)
    loaded = [load_adapter((model, name), base_model=base) for name in adapters]
    merged = merge_adapters(loaded, combination_type, weights, rank=svd_rank, **given)
    if merged.heads:
        raise UnsupportedError(
            f"{', '.join(merged.heads)} have heads of their own (modules_to_save), and one adapter holds one head: "
            "heads='first' or 'average' makes one; merge_adapters(...).save_pretrained(...) keeps each in a file"
        )
    add_adapter(model, merged, adapter_name)


def _check_names(model: Any, adapters: Sequence[str], adapter_name: str) -> None:
    """Raises OptionError where an adapter is not there, or the result's name is taken."""
    held = list(model.peft_config)
    if isinstance(adapters, str):
        raise OptionError(f"adapters is {adapters!r}; it must be a list: [{adapters!r}]")
    for name in adapters:
        if name not in held:
            raise OptionError(
                f"the model has no adapter {name!r}{did_you_mean(str(name), held)}; its adapters are {', '.join(held)}"
            )
    if adapter_name in held:
        raise OptionError(
            f"the model already has an adapter {adapter_name!r}; delete it or choose another name"
        )


def _check_svd(clamp: float | None, full_matrices: object, driver: str | None) -> None:
    """Raises OptionError for an argument of PEFT's decomposition that would change the result, or is none."""
    if clamp is not None:
        raise OptionError(
            f"svd_clamp is {clamp!r}, and only None is supported: PEFT clamps the factors of its own decomposition; "
            "leave it out"
        )
    if not isinstance(full_matrices, bool):
        raise OptionError(f"svd_full_matrices is {full_matrices!r}; it must be True or False")
    if driver not in SVD_DRIVERS:
        raise OptionError(
            f"svd_driver is {driver!r}; it must be one of {', '.join(map(str, SVD_DRIVERS))}"
        )


def add_adapter(model: Any, adapter: Adapter, adapter_name: str) -> None:
    """Add an adapter to a PeftModel, as if it was loaded from files."""
    from peft import PeftConfig, set_peft_model_state_dict

    files = adapter_files(adapter, torch.float32)
    fields = dict(files.config)
    named = [getattr(other, "target_parameters", None) for other in model.peft_config.values()]
    if "target_parameters" in fields and any(named):  # PEFT wants them alike in all adapters
        fields["target_parameters"] = next(filter(None, named))
    config = PeftConfig.from_peft_type(**fields)
    model.add_adapter(adapter_name, config)
    try:
        set_peft_model_state_dict(model, files.tensors, adapter_name=adapter_name)
    except BaseException:
        model.delete_adapter(adapter_name)
        raise
