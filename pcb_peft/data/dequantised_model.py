"""A quantised base model in memory, with the values that it computes with as plain numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.base.model import BaseModel
from pcb_peft.runtime.scratch import private_directory

_GENERATION = "generation_config.json"


def dequantised_model(
    base: BaseModel, class_name: str, dtype: torch.dtype | str, **options: Any
) -> Any:
    """Load a quantised checkpoint as transformers loads the checkpoint without quantisation.

    Args:
        base: A checkpoint that was opened to be dequantised.
        class_name: The class of transformers, which may be an automatic one.
        dtype: Data type of the weights; "auto": bfloat16 for those that were quantised.
        **options: Further arguments of ``from_pretrained``.
    """
    import transformers

    named: Any = getattr(transformers, class_name)
    with private_directory() as folder:
        _describe(base, Path(folder))
        read: Any = transformers.AutoConfig.from_pretrained(
            folder, return_unused_kwargs=True, trust_remote_code=False, **options
        )
        config, others = read
        with torch.device("meta"):
            is_auto = hasattr(named, "from_config")
            empty = named.from_config(config, trust_remote_code=False) if is_auto else named(config)
        model = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=_values(base, dtype),
            dtype=dtype,
            trust_remote_code=False,
            **others,
        )
        if (Path(folder) / _GENERATION).is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _describe(base: BaseModel, folder: Path) -> None:
    """Write the configurations without quantisation, for transformers to read."""
    (folder / "config.json").write_text(json.dumps(dict(base.config)), encoding="utf-8")
    if (base.directory / _GENERATION).is_file():
        shutil.copy(base.directory / _GENERATION, folder)


def _values(base: BaseModel, dtype: torch.dtype | str) -> dict[str, Tensor]:
    """Read all tensors, a quantised one in the data type that the model will have."""
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return {
        name: base.tensor(name).to(wanted) if name in base.quantised else base.tensor(name)
        for name in base.tensors
    }
