"""A pipeline of diffusers as a base model: its components' weights, by the names that LoRAs have for them.

::

    pipeline/model_index.json
    pipeline/unet/diffusion_pytorch_model.safetensors    conv_in.weight    unet.conv_in.weight
    pipeline/text_encoder/model.safetensors              …                 text_encoder.…

One component's directory is a base model too.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pcb_peft.base.config import WAY_OUT
from pcb_peft.base.files import INDEX_FILE, SINGLE_FILE, TensorInfo, read_index, read_tensor_infos
from pcb_peft.base.one_file import tensors_of_file
from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.images import text_encoders

PIPELINE_INDEX = "model_index.json"
COMPONENT = re.compile(r"unet|transformer(_\d)?|text_encoder(_\d)?")
"""Matches names of the components that LoRAs change."""
NAMES = (SINGLE_FILE, "diffusion_pytorch_model.safetensors")
INDICES = tuple([f"{name}.index.json" for name in NAMES])
VARIANT = re.compile(
    r"(diffusion_pytorch_)?model\.(?!.*-of-)[\w-]+\.safetensors|"
    r"(diffusion_pytorch_)?model\.safetensors\.index\.\w+\.json"
)
"""Matches the file, or the index, of a variant such as fp16."""


def pipeline_tensors(directory: Path) -> dict[str, TensorInfo] | None:
    """Return the tensors of a pipeline, of one component, or of a model in one file; None where a directory is none.

    Raises:
        BaseModelError: There are no weights that can be read.
    """
    if directory.is_file():
        return tensors_of_file(directory)
    components = dict(_components(directory))
    if not components:
        return None
    found = [_tensors(directory, folder, name) for folder, name in components.items()]
    return {name: info for tensors in found for name, info in tensors.items()}


def _components(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the folder of each component, and its name in a pipeline."""
    if (directory / PIPELINE_INDEX).is_file():
        for folder in sorted(directory.iterdir()):
            if COMPONENT.fullmatch(folder.name) and folder.is_dir():
                yield folder.name, folder.name
    elif (directory / "config.json").is_file():
        config = read_json_file(directory / "config.json", BaseModelError, WAY_OUT)
        kind = str(config.get("_class_name", "")) if isinstance(config, Mapping) else ""
        if kind:
            yield "", "unet" if "UNet" in kind else "transformer"


def _tensors(directory: Path, folder: str, component: str) -> dict[str, TensorInfo]:
    """Return the tensors of a component by the names of LoRAs, each with its file and its name in it."""
    place = directory / folder
    single = next((name for name in NAMES if (place / name).is_file()), None)
    index = next((n for n in INDICES if (place / n).is_file()), None)
    if single is None and index is None:
        single, index = _variant(place)
    files = [single] if single else sorted(set(read_index(place, index or INDEX_FILE).values()))
    return {
        f"{component}.{_canonical(component, name)}": dataclasses.replace(
            info, file=str(Path(folder, info.file)), name=name
        )
        for name, info in read_tensor_infos(place, files).items()
    }


def _variant(place: Path) -> tuple[str | None, str | None]:
    """Return the only variant of a component's weights (``fp16``): its file, or its index.

    Raises:
        BaseModelError: There are several.
    """
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    found = [name for name in names if VARIANT.fullmatch(name)]
    if len(found) > 1:
        raise BaseModelError(
            f"{place} holds the variants {', '.join(found)}, and no {' or '.join(NAMES)}: leave one of them there"
        )
    if not found:
        return None, None
    return (None, found[0]) if found[0].endswith(".json") else (found[0], None)


def _canonical(component: str, parameter: str) -> str:
    """Return a parameter's name as LoRAs have it: transformers 5 leaves out CLIP's ``text_model``."""
    module, _, kind = parameter.rpartition(".")
    path = text_encoders.canonical(module, ".") if component.startswith("text_encoder") else None
    return parameter if path is None else f"{path}.{kind}"
