"""A tiny Llama, quantised: checkpoints as the libraries write them, and the same model as plain numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "quantised.safetensors"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, from the lowest nibble up


def golden(part):
    """The tensors of a part of the golden file."""
    names = load_file(GOLDEN)
    return {name.removeprefix(part): x for name, x in names.items() if name.startswith(part)}


def quantised(scheme, directory, shards=1):
    """The golden model, quantised: a checkpoint as the library writes it."""
    with safe_open(GOLDEN, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    config["quantization_config"] = json.loads(metadata["quantization"])[scheme]
    stored = golden(f"{scheme}/stored/")
    codes = {name.removesuffix("_packed") for name in stored}
    plain = {name: x for name, x in golden("plain/").items() if name not in codes}
    tensors = plain | stored
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    index = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        part = {name: tensors[name] for name, there in index.items() if there == file}
        save_file(part, directory / file, {"format": "pt"})
    described = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(described)
    return directory


def plain(directory, scheme=None):
    """The golden model without quantisation: as it was, or with the values that a library computes with."""
    with safe_open(GOLDEN, framework="pt") as file:
        config = file.metadata()["config"]
    directory.mkdir()
    (directory / "config.json").write_text(config)
    values = golden(f"{scheme}/values/") if scheme else {}
    tensors = golden("plain/") | values
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def packed(codes: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Codes of each row in 32-bit words, written bit by bit: the lowest bit of the first code first."""
    rows = []
    for row in codes.tolist():
        if order:
            row = [row[8 * i + k] for i in range(len(row) // 8) for k in order]
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
}


def random_codes(scheme: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes and scales of a weight (rows, columns) under their names, and the values that they stand for."""
    if scheme == "fp8":
        codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        scales = (torch.rand(rows // 32, columns // 32) + 0.5) / 8
        spread = torch.kron(scales, torch.ones(32, 32))
        return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread
    groups = columns // 32
    codes, zeros = torch.randint(16, (columns, rows)), torch.randint(16, (groups, rows))
    scales = (torch.rand(groups, rows) + 0.5) / 32
    of_group = torch.arange(columns) // 32
    values = ((codes - zeros[of_group]) * scales[of_group]).T.contiguous()
    if scheme == "awq":
        words = {"qweight": packed(codes, 4, AWQ_ORDER), "qzeros": packed(zeros, 4, AWQ_ORDER)}
    else:
        words = {
            "qweight": packed(codes.T, 4).T.contiguous(),
            "qzeros": packed((zeros - 1) % 16, 4),
        }
    return words | {"scales": scales}, values


def two_forms(scheme: str, directory: Path) -> tuple[Path, Path]:
    """The golden model with random codes in the place of its linear layers, and with the values of these."""
    directory.mkdir()
    codes, numbers = plain(directory / scheme), plain(directory / "plain")
    stored, values = golden("plain/"), golden("plain/")
    torch.manual_seed(0)
    for name in golden("nf4/values/"):
        parts, values[name] = random_codes(scheme, *values[name].shape)
        del stored[name]
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    config = json.loads((codes / "config.json").read_text())
    config["quantization_config"] = CONFIGURATIONS[scheme]
    (codes / "config.json").write_text(json.dumps(config))
    save_file(stored, codes / "model.safetensors", {"format": "pt"})
    save_file(values, numbers / "model.safetensors", {"format": "pt"})
    return codes, numbers
