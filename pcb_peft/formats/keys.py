"""Tensor names in PEFT's files, and the modules and parameters of the base model that they belong to.

``base_model.model.layers.0.q_proj.lora_A.weight`` belongs to the module ``layers.0.q_proj``. A *module* is a path in
the base model whose ``weight`` changes; a parameter that is no module's weight goes by its own path (``norm.bias``,
``attn.in_proj_weight``).
"""

import re

from pcb_peft.errors import UnsupportedError

PREFIX = "base_model.model."
"""PEFT's prefix of every tensor that belongs to a module."""

AUTOMATIC_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""Task type to the modules that PEFT saves whole for it without being told."""

PLAIN_PARAMETER = re.compile(r".+\.(weight|bias)")
"""Matches parameters of the base model, which an adapter may replace."""

TUNER_PART = re.compile(
    r"(^|\.)(base_layer|token_adapter|original_module|modules_to_save|\w*lora_\w+|\w+_l)(\.|$)"
)
"""Finds parts of a path that only PEFT's own layers have, never the base model."""


def module_of(key: str) -> str:
    """Return the base model's module whose tensors have names that begin with `key`.

    Raises:
        UnsupportedError: The name is not one of PEFT's, or the module exists only inside one of PEFT's layers.
    """
    module = key.removeprefix(PREFIX)
    if module == key:
        raise UnsupportedError(
            f"tensors {key}… do not have PEFT's names, which begin with {PREFIX}; PEFT would not load them either"
        )
    if "base_layer" in module.split("."):
        raise UnsupportedError(f"{module}: an adapter inside a wrapped layer is not supported")
    return module


def parameter_of(name: str) -> str:
    """Return the base model's parameter that a tensor holds, without PEFT's prefix and wrappers."""
    name = name.removeprefix(PREFIX).replace(".token_adapter.base_layer.", ".")
    return name.replace(".base_layer.", ".")
