"""Loading a merged adapter into its base model, with the head of the task that it is wanted for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import nn

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapter
from pcb_peft.adapters.own_head import files_with_head
from pcb_peft.adapters.source import Source
from pcb_peft.base.canonical import AUTO_CLASSES, CLASSIFIERS
from pcb_peft.data.live_heads import Head, give_head, refuse_made_up, wrapped_by_peft
from pcb_peft.data.models import input_embeddings, load_model
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import BaseModelError, OptionError
from pcb_peft.formats.checkpoint import CONFIG
from pcb_peft.runtime.scratch import private_directory

if TYPE_CHECKING:
    from peft import PeftModel


def load_merged(
    model_or_id: "nn.Module | str | Path",
    adapter: str | Path | Source | Adapter,
    head: str | None = None,
    **options: Any,
) -> "PeftModel":
    """Load a merged adapter with PEFT, with the head of one task and the names of its classes.

    A merge of classifiers has no head of its own. PEFT would load it with random numbers in the place of the head, and
    say nothing. This function puts the right head there.

    Args:
        model_or_id: The base model in memory, which is changed; or its directory or hub id. By id, the class of
            transformers is the one that the head was trained in.
        adapter: Directory or hub id of the merged adapter, or the merge itself.
        head: The adapter whose head is wanted: the name of a file in the folder ``heads``. None for an adapter that
            has a head of its own, or needs none.
        **options: Arguments of ``from_pretrained`` of the base model, such as ``dtype`` or ``device_map``; with
            ``dequantize=True`` the weights of a quantised one are computed from their codes.

    Returns:
        The PeftModel, in evaluation mode. Its config has ``num_labels``, and ``id2label`` if the names are known.

    Raises:
        OptionError: There are several heads and none was chosen, or none of that name.
        BaseModelError: The base model cannot be loaded, or it is not known in which class.
        MismatchError: The adapter or its head does not fit the base model.

    Example:
        model = load_merged("sentence-transformers/all-MiniLM-L6-v2", "merged", head="subj")
    """
    opened = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, hashed=False)
    headed = _with_own_head(opened, head)
    model = _base_model(model_or_id, headed, options)
    parameters = headed.head.read()
    _fit_vocabulary(model, parameters)
    if parameters:
        give_head(model, parameters, headed.name)
        if _task_of(headed) in CLASSIFIERS:
            refuse_made_up(model, parameters, headed.name)
        _name_classes(model, headed.head)
    with private_directory() as folder:
        place = _written(opened, headed, head, Path(folder) / "adapter")
        return wrapped_by_peft(model, place, headed.name, parameters).eval()


def _with_own_head(adapter: Adapter, head: str | None) -> Adapter:
    """Return the adapter with the head that is wanted.

    Raises:
        OptionError: It is not said which one.
    """
    if head is not None:
        return adapter.with_head(head)
    if adapter.heads:
        names = list(adapter.heads)
        raise OptionError(
            f"{adapter.name} has no head of its own, but those of {', '.join(names)}: choose one (head={names[0]!r}), "
            "or PEFT will make one up"
        )
    return adapter


def _base_model(given: "nn.Module | str | Path", adapter: Adapter, options: dict[str, Any]) -> Any:
    """Return the base model, in the class that the adapter's task needs.

    Raises:
        BaseModelError: It cannot be loaded.
        OptionError: It is a PeftModel already.
    """
    from peft import PeftModel

    if not isinstance(given, nn.Module):
        return load_model(str(given), _class_of(adapter), **options)
    if options:
        raise OptionError(
            f"the model is in memory already: leave out {', '.join(options)}, or give its directory or hub id"
        )
    if isinstance(given, PeftModel) or getattr(given, "_hf_peft_config_loaded", False):
        raise OptionError(
            "the model is a PeftModel already, and PEFT would put one adapter inside the other; give the base model: "
            "model.unload()"
        )
    return given


def _class_of(adapter: Adapter) -> str:
    """Return the name of the class of transformers that an adapter's base model is loaded with.

    Raises:
        BaseModelError: Nothing says which one.
    """
    import transformers

    mapped = str((adapter.auto_mapping or {}).get("base_model_class"))
    task = _task_of(adapter)
    if task in AUTO_CLASSES:
        return AUTO_CLASSES[str(task)]
    if hasattr(transformers, mapped):
        return mapped
    raise BaseModelError(
        f"{adapter.name}: neither its task type ({task}) nor its auto_mapping says which class of transformers it "
        "belongs to; load the base model yourself, and give that: load_merged(model, …)"
    )


def _task_of(adapter: Adapter) -> str | None:
    """Return PEFT's task type for an adapter, or for the head that it was given."""
    return adapter.task_type or adapter.head.task.task_type


def _fit_vocabulary(model: Any, head: Head) -> None:
    """Resize the embeddings of a model to those that an adapter brings."""
    embeddings = input_embeddings(model)
    if embeddings is None:
        return
    names = [name for name, layer in model.named_modules() if layer is embeddings]
    sizes = {len(head[f"{name}.weight"]) for name in names if f"{name}.weight" in head}
    if sizes and sizes != {len(embeddings.weight)}:
        model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _name_classes(model: Any, head: Replacements) -> None:
    """Write the names of a head's classes into a model's configuration."""
    labels = head.task.labels
    if labels and hasattr(model, "config") and model.config.num_labels == len(labels):
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}


def _written(
    opened: Adapter, headed: Adapter, head: str | None, directory: Path
) -> Mapping[str, Any]:
    """Write an adapter where PEFT finds it, and return the arguments with which PEFT does."""
    files = opened.files
    if files is None or files.directory is None or opened.source is None:
        headed.save_pretrained(directory)
        return {"model_id": str(directory)}
    if head is None:
        return {"model_id": str(files.directory)}
    content = files_with_head(opened, files, head)
    directory.mkdir()
    safetensors.torch.save_file(content.tensors, directory / content.file)
    (directory / CONFIG).write_text(json.dumps(content.config), encoding="utf-8")
    return {"model_id": str(directory)}
