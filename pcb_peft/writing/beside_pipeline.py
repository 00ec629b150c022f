"""The files of a pipeline of diffusers that a fold copies as they are."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from pcb_peft.base.config import WAY_OUT
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.runtime.shown import some_of

_INDEX = re.compile(r"\.index\.(\w+\.)?json$")


def files_beside_pipeline(
    base: BaseModel, changed: Iterable[str], weights: re.Pattern[str]
) -> list[Path]:
    """Return the files to copy, relative to the pipeline's directory.

    In the folders of components that change, weights in other forms or precisions (``.fp16.safetensors``, ``.bin``) are
    left out: they would no longer be the same model. So are checkpoints in one file at the top, and hidden folders.

    Args:
        base: The pipeline, or one component of it.
        changed: Names in `base.tensors` of the parameters that change.
        weights: Matches names of files with weights.
    """
    written = {Path(file) for file in base.files}
    folders = {Path(base.tensors[name].file).parent for name in changed} | {Path()}
    copied: list[Path] = []
    left_out: list[str] = []
    for path in sorted(base.directory.rglob("*")):
        place = path.relative_to(base.directory)
        if not path.is_file() or place in written or place.parts[0].startswith("."):
            continue
        is_index = _INDEX.search(place.name) is not None
        other_form = weights.search(place.name) is not None or (
            is_index and not _files_of_index(path, place.parent) <= written
        )
        if other_form and place.parent in folders:
            left_out.append(str(place))
        else:
            copied.append(place)
    if left_out:
        warnings.warn(
            f"{base.source}: {some_of(left_out)} are left out of the folded model: they hold the weights before the "
            "fold; save them again from the folded model if they are wanted",
            stacklevel=5,
        )
    return copied


def _files_of_index(path: Path, folder: Path) -> set[Path]:
    content = read_json_file(path, BaseModelError, WAY_OUT)
    names = content.get("weight_map", {}) if isinstance(content, dict) else {}
    return {folder / str(name) for name in names.values()}
