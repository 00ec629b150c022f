"""Directories that hold no PEFT adapter, though they look like one: what they hold, and how to make one of it."""

import contextlib
from pathlib import Path

from pcb_peft.errors import AdapterError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.formats.checkpoint import CONFIG, PICKLE, SAFETENSORS
from pcb_peft.runtime.shown import some_of

_MLX_FIELDS = {"lora_parameters", "fine_tune_type", "num_layers", "lora_layers", "adapter_path"}


def how_to_get_an_adapter(directory: Path) -> str:
    """Return what a directory holds instead of an adapter's files, and the way out, for the end of a message.

    Args:
        directory: Directory without `CONFIG`, or without the tensors that belong to it.
    """
    if not directory.is_dir():
        return ": no such directory"
    with contextlib.suppress(OSError):  # a folder that may not be read, or has gone
        for explain in (_shards, _mlx, _nearby, _whole_model):
            if found := explain(directory):
                return f"; {found}"
    return ""


def is_mlx(config: object) -> bool:
    """Return whether a configuration is one that MLX writes."""
    return isinstance(config, dict) and bool(_MLX_FIELDS & config.keys())


MLX = (
    "it is an adapter of MLX, whose names and orientation are others: fuse it (mlx_lm.fuse) and extract it again "
    "(pcb-peft extract), or train with PEFT"
)


def _mlx(directory: Path) -> str:
    path = directory / CONFIG
    try:
        config = read_json_file(path, AdapterError, "") if path.is_file() else None
    except AdapterError:
        config = None
    return MLX if is_mlx(config) or (directory / "adapters.safetensors").is_file() else ""


def _shards(directory: Path) -> str:
    """Return what a directory with the parts of a distributed run needs."""
    if any(any(directory.glob(f"{folders}*.distcp")) for folders in ("", "*/", "*/*/")):
        return (
            "it holds the shards of an FSDP run (.distcp): put them together with accelerate merge-weights, or save "
            "with fsdp_state_dict_type: FULL_STATE_DICT"
        )
    patterns = ("*_model_states.pt", "*/*_model_states.pt", "*/zero_pp_rank_*", "zero_pp_rank_*")
    if any(any(directory.glob(pattern)) for pattern in patterns):
        return (
            "it holds the shards of a DeepSpeed run: put them together with zero_to_fp32.py, which lies beside them, "
            f"or save with stage3_gather_16bit_weights_on_model_save; PEFT then writes {CONFIG} and {SAFETENSORS}"
        )
    return ""


def _nearby(directory: Path) -> str:
    """Return the subfolders of a directory that hold adapters; of checkpoints, the latest is named."""
    configs = [*directory.glob(f"*/{CONFIG}")] or [*directory.glob(f"*/*/{CONFIG}")]
    found = sorted(path.parent.relative_to(directory).as_posix() for path in configs)
    steps = {int(n.rpartition("-")[2]): n for n in found if n.rpartition("-")[2].isdecimal()}
    if not found:
        return ""
    latest = f": the latest is {directory / steps[max(steps)]}" if steps else ""
    return f"there are adapters in its subfolders {some_of(found, 8)}{latest}"


def _whole_model(directory: Path) -> str:
    weights = any(directory.glob("model*.safetensors")) or any(directory.glob("pytorch_model*.bin"))
    if (directory / CONFIG).is_file() or not weights:
        return ""
    return "it holds a whole model: what was trained becomes an adapter with pcb-peft extract MODEL BASE_MODEL"


def refuse_file(path: Path) -> str:
    """Return why a file of an adapter is not its directory; empty for any other file."""
    if path.is_file() and path.name in (CONFIG, SAFETENSORS, PICKLE):
        return f"{path} is a file of an adapter; give the directory that it is in: {path.parent}"
    return ""
