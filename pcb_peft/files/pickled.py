"""Pickled tensors (``adapter_model.bin``): read without running code, and without taking more memory than the file has.

A pickled tensor is a view of a storage, and a view may repeat its values: 2 kB can claim to be a matrix of 8 GiB. The
stated bound: each tensor has a storage at least as large as itself, all tensors together have at most four times the
size of the file (tied ones are stored once), and nothing in the file is compressed.
"""

import math
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.errors import AdapterError
from pcb_peft.files.header import check_name
from pcb_peft.files.tensors import TensorsInMemory
from pcb_peft.runtime.shown import shown

MOST_TIMES = 4  # the size of the file: for all tensors together
_MOST_PICKLE_BYTES = 64 << 20  # names and shapes; the values are not in there
_PLAIN = re.compile(  # what torch.save names for a dictionary of plain tensors
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter|parameter_with_state)|"
    r"torch\._tensor _rebuild_from_type_v2|torch(\.storage)? \w+Storage|torch (Size|device|Tensor|b?float\w+|u?int\d+)|"
    r"torch\.nn\.parameter Parameter"
)


def open_pickled(path: Path) -> TensorsInMemory:
    """Return the tensors of a pickled file.

    Raises:
        AdapterError: It cannot be read without running code, holds anything but named plain tensors, or claims more
            memory than it may.
    """
    try:
        if zipfile.is_zipfile(path):  # what torch has written since version 1.6
            _check_archive(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(
            f"{path} cannot be loaded with weights_only=True: {shown(error)}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise _other_content(path)
    tensors: dict[str, Any] = {**content}
    for name, values in tensors.items():
        _check_tensor(path, name, values)
    total = sum(values.nbytes for values in tensors.values())
    if total > MOST_TIMES * path.stat().st_size:
        raise AdapterError(
            f"{path}: its tensors have {total} bytes, more than {MOST_TIMES} times those of the file: it is damaged, "
            "or made to fill the memory"
        )
    return TensorsInMemory(tensors, str(path))


def _check_archive(path: Path) -> None:
    """Raise AdapterError where an archive is compressed, or names other things than plain tensors."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise AdapterError(
                    f"{path}: {shown(entry.filename)} is compressed, as torch.save never does; save the adapter again"
                )
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
        for entry in pickles:
            if entry.file_size > _MOST_PICKLE_BYTES:
                raise AdapterError(f"{path}: its names and shapes take more than 64 MiB")
            for code, argument, _ in pickletools.genops(archive.read(entry)):
                if code.name == "GLOBAL" and not _PLAIN.fullmatch(str(argument)):
                    raise _other_content(path, f"it names {shown(argument)}")


def _check_tensor(path: Path, name: str, values: Any) -> None:
    check_name(name, path, AdapterError)
    if not isinstance(values, Tensor):
        raise _other_content(path, f"{shown(name)} is none")
    plain = values.layout == torch.strided and values.device.type == "cpu"
    if not plain or values.is_quantized:
        raise _other_content(path, f"{shown(name)} is sparse, quantised or without values")
    size = math.prod(values.shape) * values.element_size()
    if size > values.untyped_storage().nbytes():
        raise AdapterError(
            f"{path}: {shown(name)} has the shape {tuple(values.shape)}, but the file holds fewer values than that: it "
            "repeats them; save the adapter with PEFT again"
        )


def _other_content(path: Path, reason: str = "") -> AdapterError:
    because = f" ({reason})" if reason else ""
    return AdapterError(
        f"{path} must hold named tensors and nothing else{because}; save the adapter with PEFT again"
    )
