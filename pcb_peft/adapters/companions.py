"""Files that stand beside an adapter's weights and belong to the model: tokenizer, chat template, processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.files.json_text import read_bytes, read_json_file
from pcb_peft.formats.checkpoint import PICKLE, PIPELINE, SAFETENSORS

TOKENIZER, TEMPLATE = "tokenizer", "chat template"

GROUPS: Mapping[str, tuple[str, ...]] = {
    TOKENIZER: (
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
        *("sentencepiece.bpe.model", "*.tiktoken", "tokenization_*.py"),
    ),
    TEMPLATE: (
        *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    ),
    "generation config": ("generation_config.json",),
    "processor": (
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    ),
}
"""Names of files that belong together: an adapter has its own, or the base model's are meant."""

Companions: TypeAlias = Mapping[str, Mapping[str, Path]]
"""A group of files to its files: name beside the adapter to path."""

TRAINED = (
    *("non_lora_trainables.*", "mm_projector.*", "*value_head*", "*v_head*", "*projector*.bin"),
    *("*projector*.safetensors", "*_head.bin", "*_head.safetensors", "pytorch_model.bin"),
)
"""Names under which trainers save weights beside an adapter, as patterns for the Hub."""

_MOST_BYTES = 1 << 28  # of a tokenizer's file; the largest have some 40 MB
_OR_LEAVE_OUT = "copy it again, or take it out of the directory"
_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".ckpt")
_OF_TRAINING = (
    *("optimizer", "scheduler", "rng_state", "random_states", "training_args", "scaler"),
    *("sampler", "dl_state", "trainer", "zero_", "ggml-adapter", "adapter_model", "adapter."),
)
_OF_ADAPTERS = (SAFETENSORS, PICKLE, PIPELINE)
_VOLATILE = {"transformers_version", "name_or_path", "_name_or_path", "tokenizer_file"}


def companions_beside(directory: Path) -> Companions:
    """Return the files beside an adapter that belong to the model, by group; groups without files are left out."""
    groups = {
        group: {
            path.relative_to(directory).as_posix(): path
            for pattern in patterns
            for path in sorted(directory.glob(pattern))
            if path.is_file()
        }
        for group, patterns in GROUPS.items()
    }
    return {group: files for group, files in groups.items() if files}


def bytes_of(companions: Companions) -> dict[str, bytes]:
    """Return the contents of all files, by name."""
    return {name: companion(path) for files in companions.values() for name, path in files.items()}


def contents(files: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the files of a group say, for comparison: JSON without the fields that mean nothing."""
    return {name: _content(path) for name, path in files.items()}


def companion(path: Path) -> bytes:
    """Return the content of a file beside an adapter; AdapterError where it cannot be read, or has over 256 MiB."""
    return read_bytes(path, AdapterError, _OR_LEAVE_OUT, _MOST_BYTES)


def _content(path: Path) -> Any:
    if path.suffix != ".json":
        return companion(path)
    try:
        fields = read_json_file(path, AdapterError, _OR_LEAVE_OUT)
    except AdapterError:
        return companion(path)
    if not isinstance(fields, dict):
        return fields
    return {key: value for key, value in fields.items() if key not in _VOLATILE}


def refuse_trained_files(directory: Path) -> None:
    """Raise UnsupportedError for weights beside an adapter that neither PEFT nor this package loads with it.

    States of a training run (``optimizer.pt``) are no weights, and a whole model in the same directory is no part of
    the adapter.
    """
    whole_model = (directory / "config.json").is_file()
    for path in sorted(directory.iterdir()):
        if path.suffix not in _WEIGHTS or path.name in _OF_ADAPTERS:
            continue
        of_model = path.name.startswith(("model", "pytorch_model")) and whole_model
        if path.name.startswith(_OF_TRAINING) or of_model or not path.is_file():
            continue
        raise UnsupportedError(
            f"{path} holds weights that were trained with the adapter, and PEFT does not load them with it: merging "
            "the adapter alone would lose them. Save it again with these modules in modules_to_save; or, if it is "
            "whole without them, move the file out of the directory"
        )
