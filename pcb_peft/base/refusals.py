"""Changes that a base model has no place for, and why."""

from pcb_peft.errors import BaseModelError, MismatchError


def tied_error(source: str, module: str, tied: tuple[str, ...]) -> BaseModelError:
    """Return the error that says why one end of tied weights cannot be changed, and the way out."""
    others = ", ".join(name.removesuffix(".weight") for name in tied)
    return BaseModelError(
        f"{source}: {module} is tied to the embeddings or another weight ({others}): a change of one would change the "
        "other; tied='untie' (--tied untie) gives each its own weights when it is folded, tied='both' changes both, or "
        "leave the module out"
    )


def no_bias_error(source: str, layer: str) -> MismatchError:
    """Return the error for a trained bias of a layer that has none."""
    return MismatchError(
        f"{layer}.bias was trained, and {layer} has no bias in the base model {source}: there is nothing to add it "
        "to, nor would PEFT merge it; load the adapter with PEFT as it is, or give the base that it was trained on"
    )
