"""Base models in memory, in the class that a task calls for."""

from pathlib import Path
from typing import Any

from pcb_peft.errors import BaseModelError

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""PEFT's task types to classes of transformers; models of other types have hidden states only."""


def load_base(base_model: str | Path | Any, task_type: str | None) -> Any:
    """Load a base model, in evaluation mode; a model in memory is used as it is.

    Args:
        base_model: Path or hub id, or a model of transformers.
        task_type: PEFT's.

    Raises:
        BaseModelError: It cannot be loaded.
    """
    import transformers
    from transformers.utils import logging

    if not isinstance(base_model, str | Path):
        return base_model.eval()
    loader: Any = getattr(transformers, CLASSES.get(str(task_type), "AutoModel"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report that a head is new: it is the adapters that have heads
    try:
        return loader.from_pretrained(base_model).eval()
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{base_model} cannot be loaded with transformers: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
