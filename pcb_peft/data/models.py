"""Base models in memory, in the class of transformers that a task calls for, and their tokenizers."""

import contextlib
import inspect
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from pcb_peft.base.architecture import TRANSFORMERS_ERRORS, unreadable_config
from pcb_peft.base.canonical import AUTO_CLASSES, task_type_of_class
from pcb_peft.base.config import bounded_modules, read_config, refuse_adapter
from pcb_peft.base.hub import configuration_directory
from pcb_peft.base.model import open_base_model
from pcb_peft.data.dequantised_model import dequantised_model
from pcb_peft.errors import BaseModelError, OptionError
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.shown import shown

WITH_LOGITS = frozenset({"CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"})
"""PEFT's task types whose models answer with logits; others have hidden states only."""

GIVE_ONE = (
    "give a directory of the base model that has one (--base-model), or in Python tokenizer=…"
)
"""The way out for a base model without a tokenizer."""

MADE_UP = "_made_up_parameters"  # attribute of a model


def load_base(
    base_model: str | Path | Any,
    task_type: str | None,
    dtype: torch.dtype | str = "auto",
    *,
    dequantize: bool = False,
    **options: Any,
) -> Any:
    """Load a base model whose weights are plain numbers, in evaluation mode; a model in memory is used as it is.

    Args:
        base_model: Path or hub id, or a model of transformers.
        task_type: PEFT's word for the model that an adapter needs; None, or another word than those of
            `AUTO_CLASSES`: the class that the checkpoint was saved from.
        dtype: Data type of the weights of a model that is loaded.
        dequantize: Compute the weights of a quantised checkpoint from their codes.
        **options: Further arguments of its ``from_pretrained``.

    Raises:
        BaseModelError: It cannot be loaded, or its weights are codes of a quantisation.
    """
    if isinstance(base_model, str | Path):
        name = AUTO_CLASSES.get(str(task_type)) or _class_of(load_config(str(base_model)))
        model = load_model(str(base_model), name, dtype, dequantize=dequantize, **options)
    else:
        model = base_model.eval()
    if _holds_codes(model):
        shown_name = base_model if isinstance(base_model, str | Path) else "the model in memory"
        raise _quantised_error(str(shown_name), "and its weights are needed as plain numbers")
    return model


def task_type_of(base_model: str | Path | Any) -> str:
    """PEFT's word for what a base model was built for, such as CAUSAL_LM.

    Args:
        base_model: Path or hub id, or a model of transformers or its configuration.

    Raises:
        BaseModelError: It cannot be loaded.
    """
    given = isinstance(base_model, str | Path)
    config = load_config(str(base_model)) if given else getattr(base_model, "config", base_model)
    stated = (getattr(config, "architectures", None) or [""])[0]
    if task_type := task_type_of_class(stated):
        return task_type
    is_pair = getattr(config, "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if is_pair else "FEATURE_EXTRACTION"


def load_config(source: str) -> Any:
    """Load a base model's configuration.

    Raises:
        BaseModelError: There is none.
    """
    import transformers

    refuse_adapter(expanded(source))
    if (place := configuration_directory(source, None)) is not None:
        read_config(place)  # transformers would build a model of any size
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except TRANSFORMERS_ERRORS as error:
        raise unreadable_config(source, error) from error


def _class_of(config: Any) -> str:
    """The class that a checkpoint was saved from, if transformers has it."""
    import transformers

    stated = (getattr(config, "architectures", None) or [""])[0]
    return stated if stated and hasattr(transformers, stated) else "AutoModel"


def load_model(
    source: str,
    class_name: str,
    dtype: torch.dtype | str = "auto",
    *,
    dequantize: bool = False,
    **options: Any,
) -> Any:
    """Load a model of transformers in evaluation mode, without the report that its head is new.

    Args:
        source: Path or hub id.
        class_name: The class of transformers.
        dtype: Data type of the weights.
        dequantize: Compute the weights of a quantised checkpoint from their codes. Otherwise transformers loads it with
            the library that made it.
        **options: Further arguments of its ``from_pretrained``.

    Raises:
        BaseModelError: It cannot be loaded.
    """
    import transformers

    base = open_base_model(source, dequantize=True) if dequantize else None
    config = load_config(source)
    with quiet_transformers(), bounded_modules():
        try:
            if base is not None and base.quantised:
                model = dequantised_model(base, class_name, dtype, **options)
            else:
                model_class = getattr(transformers, class_name)
                model, found = model_class.from_pretrained(
                    source,
                    dtype=dtype,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
                setattr(model, MADE_UP, frozenset(found["missing_keys"]))
        except (ImportError, *TRANSFORMERS_ERRORS) as error:
            if not dequantize and getattr(config, "quantization_config", None):
                reason = f"and transformers cannot compute with it on this machine ({shown(error)})"
                raise _quantised_error(source, reason) from error
            raise unreadable_config(source, error) from error
    return model.eval()


def made_up(model: Any) -> frozenset[str]:
    """Return the parameters that the files of a model lack: transformers gave them random values.

    Those of a model that was given in memory are not known, and none of a quantised one are.
    """
    return getattr(model, MADE_UP, frozenset[str]())


def _holds_codes(model: Any) -> bool:
    """True for a model in memory whose weights are codes of a quantisation."""
    codes = (".qweight", ".weight_packed")
    return any(
        not values.is_floating_point() or values.element_size() < 2 for values in model.parameters()
    ) or any(name.endswith(codes) for name, _ in model.named_buffers())


def _quantised_error(source: str, reason: str) -> BaseModelError:
    return BaseModelError(
        f"{source} is quantised, {reason}: give the model that it was made from, in bfloat16, float16 or float32; or "
        "its directory or hub id with dequantize=True (--dequantize), which computes its weights from their codes"
    )


def input_embeddings(model: Any) -> Any:
    """Return the layer that turns tokens into vectors; None for models of images or sounds, which have none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def accepted_arguments(model: Any) -> frozenset[str]:
    """Return the names of the arguments that a model takes; PEFT's wrapper does not count."""
    plain = getattr(model, "get_base_model", lambda: model)()
    return frozenset(inspect.signature(plain.forward).parameters)


def load_tokenizer(base_model: str | Path) -> Any:
    """Load a base model's tokenizer; one without a padding token pads with its last.

    Raises:
        OptionError: There is none. Where only its words are missing, transformers makes up one that knows no word.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    except Exception as error:  # of the Rust library, too
        raise OptionError(
            f"{base_model} has no tokenizer that can be loaded ({shown(error)}); {GIVE_ONE}"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)) + 1:
        raise OptionError(
            f"{base_model} has no tokenizer: its files of words are missing, such as tokenizer.json; {GIVE_ONE}"
        )
    return with_padding(tokenizer)


def with_padding(tokenizer: Any) -> Any:
    """Let a tokenizer without a padding token pad with its last token; what is padded is masked."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence the progress bar of transformers, and its report that a head is new: it is meant to be."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
