"""Small changes of files of tensors: names, types, shapes, values, headers; and pickled files of many kinds."""

import io
import json
import math
from random import Random
from typing import Any

import torch

from fuzz.values import ODD, Steps, damaged, json_bytes, mutated

WIDTH = {  # bytes of a value, by safetensors' name of its type
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
BAD = {  # values by name, in float32
    "NaN": float("nan"),
    "infinity": float("inf"),
    "zero": 0.0,
    "huge": 3e38,
    "tiny": 1e-45,
    "minus one": -1.0,
}
NAMES = [
    "",
    ".",
    "..",
    "a\x1b[31m",
    "a\nb",
    "x" * 300,
    "x" * 2000,
    "é",
    "base_model.model.",
    "weight",
]
PARTS = [
    *("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "lora_down", "lora_up"),
    *(
        "alpha",
        "weight",
        "bias",
        "default",
        "base_model.model",
        "modules_to_save",
        "ia3_l",
        "hada_w1_a",
    ),
    *(
        "lokr_w1",
        "layers.0",
        "layers.999999999",
        "experts",
        "0",
        "-1",
        "base_layer",
        "diff",
        "dora_scale",
    ),
]

Entry = tuple[str, list[int], bytes]
Table = dict[str, Entry]
"""Tensor to its type, shape and bytes."""


def read_table(content: bytes) -> tuple[Table, dict[str, str]]:
    """The tensors of a safetensors file that is in order, and its texts."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    texts = header.pop("__metadata__", {})
    table: Table = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        table[name] = (entry["dtype"], entry["shape"], content[start + begin : start + end])
    return table, texts


def header_of(table: Table, texts: dict[str, Any]) -> dict[str, Any]:
    """The header of a file with these tensors."""
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    place = 0
    for name, (dtype, shape, values) in table.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [place, place + len(values)],
        }
        place += len(values)
    return header


def file_of(header: Any, values: bytes) -> bytes:
    """The bytes of a safetensors file."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values


def damaged_file(name: str, content: bytes, rng: Random, steps: Steps) -> bytes:
    """The content of a file, changed in the way of its kind."""
    if name.endswith(".json"):
        return json_bytes(mutated(json.loads(content), rng, steps), rng, steps)
    if name.endswith(".safetensors"):
        return mutated_safetensors(content, rng, steps)
    return damaged(content, rng, steps)


def mutated_safetensors(content: bytes, rng: Random, steps: Steps) -> bytes:
    """A safetensors file in which something is different: mostly its tensors, at times its header or bytes."""
    table, texts = read_table(content)
    how = rng.random()
    if how < 0.05:
        return damaged(content, rng, steps)
    if how < 0.15:
        return _other_header(table, texts, rng, steps)
    if how < 0.2 and texts:
        texts = {key: _text(value, rng, steps) for key, value in texts.items()}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if table:
            rng.choice(CHANGES)(table, rng.choice(sorted(table)), rng, steps)
    return file_of(header_of(table, texts), b"".join(values for _, _, values in table.values()))


def _text(value: str, rng: Random, steps: Steps) -> str:
    try:
        return json.dumps(mutated(json.loads(value), rng, steps))
    except ValueError:
        changed = rng.choice([one for one in ODD if isinstance(one, str) and one != "\ud800"])
        steps.append(f"text {value!r} becomes {changed[:20]!r}")
        return changed


def _other_header(table: Table, texts: dict[str, Any], rng: Random, steps: Steps) -> bytes:
    """A file whose header says something else than its bytes."""
    values = b"".join(values for _, _, values in table.values())
    header = mutated(header_of(table, texts), rng, steps)
    content = file_of(header, values + rng.choice((b"", b"", b"x", bytes(8))))
    if rng.random() < 0.2:
        length = rng.choice((0, 1, 7, 2**60, 2**63, 2**64 - 1, len(content), 100_000_001))
        steps.append(f"the header claims {length} bytes")
        content = length.to_bytes(8, "little") + content[8:]
    return content


def _rename(table: Table, name: str, rng: Random, steps: Steps) -> None:
    new = rng.choice(
        (
            rng.choice(NAMES),
            name + "x",
            name.rpartition(".")[0],
            name.partition(".")[2],
            name.upper(),
            name.replace("lora_A", "lora_B"),
            name.replace(rng.choice(name.split(".")), rng.choice(PARTS)),
            name + "." + rng.choice(PARTS),
        )
    )
    steps.append(f"{name} is called {new[:100]!r}")
    table[new] = table.pop(name)


def _remove(table: Table, name: str, _: Random, steps: Steps) -> None:
    steps.append(f"{name} is missing")
    del table[name]


def _double(table: Table, name: str, rng: Random, steps: Steps) -> None:
    new = name.replace(rng.choice(name.split(".")), rng.choice(PARTS))
    steps.append(f"{name} is there again as {new}")
    table[new] = table[name]


def _swap(table: Table, name: str, rng: Random, steps: Steps) -> None:
    other = rng.choice(sorted(table))
    steps.append(f"{name} and {other} change places")
    table[name], table[other] = table[other], table[name]


def _dtype(table: Table, name: str, rng: Random, steps: Steps) -> None:
    dtype = rng.choice(sorted(WIDTH))
    shape = table[name][1]
    steps.append(f"{name} is {dtype}")
    size = math.prod(shape) * WIDTH[dtype]
    values = (table[name][2] * 8)[:size] if rng.random() < 0.5 else bytes([1]) * size
    table[name] = (dtype, shape, values.ljust(size, b"\x01"))


def _shape(table: Table, name: str, rng: Random, steps: Steps) -> None:
    dtype, shape, values = table[name]
    size, width = math.prod(shape), WIDTH[dtype]
    shapes = [
        shape[::-1],
        [size],
        [*shape, 1],
        [1, *shape],
        [1, 1, 1, *shape],
        [],
        [0],
        [0, *shape[1:]],
        [*shape[:-1], 0],
        [1],
        [1, 1],
        [s + 1 for s in shape],
        [s * 2 for s in shape],
        [max(1, s // 2) for s in shape],
        [*shape[:-1], 1],
        [1, *shape[1:]],
        shape[1:],
        [2, *shape],
    ]
    new = rng.choice(shapes)
    steps.append(f"{name} of shape {shape} has shape {new}")
    count = math.prod(new) * width
    table[name] = (
        dtype,
        new,
        (values or b"\0\0\x80\x3f" * 2)[: count or 0].ljust(count, values[:1] or b"\0"),
    )


def _values(table: Table, name: str, rng: Random, steps: Steps) -> None:
    dtype, shape, _ = table[name]
    word = rng.choice(sorted(BAD))
    if dtype != "F32":
        return
    values = torch.full((math.prod(shape),), BAD[word])
    if rng.random() < 0.3 and len(values) > 1:
        values[1:] = 1.0
        word = f"first value {word}"
    steps.append(f"{name} is {word}")
    table[name] = (dtype, shape, values.numpy().tobytes())


def _many(table: Table, name: str, rng: Random, steps: Steps) -> None:
    steps.append(f"{name} is there 50 times")
    for number in range(50):
        table[name.replace("0", str(number + 1)) + rng.choice(("", f".{number}"))] = table[name]


CHANGES = (
    *(_rename, _rename, _remove, _double, _swap, _dtype, _shape, _shape, _shape, _values, _values),
    _many,
)

# ------------------------------------------------------------------------------------- pickled files


class _Foreign:
    def __reduce__(self) -> Any:
        return (print, ("this code was run",))


def pickled(table: Table, rng: Random, steps: Steps) -> bytes:
    """The tensors as `torch.save` writes them, with something odd among them."""
    content: Any = {
        name: torch.frombuffer(bytearray(values), dtype=torch.float32).reshape(shape)
        for name, (dtype, shape, values) in table.items()
        if dtype == "F32" and values
    }
    if not content:
        return b""
    name = rng.choice(sorted(content))
    change = rng.choice(sorted(PICKLES))
    steps.append(f"pickled; {name}: {change}")
    value = PICKLES[change](content[name])
    if change.startswith("file"):
        content = value
    else:
        content[rng.choice((name, name, 3, "")) if change == "as it is" else name] = value
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
    written = buffer.getvalue()
    return damaged(written, rng, steps) if rng.random() < 0.3 else written


PICKLES: dict[str, Any] = {
    "as it is": lambda v: v,
    "stride 0": lambda v: v.flatten()[:1].expand(2000, 2000),
    "a huge stride 0": lambda v: v.flatten()[:1].expand(100_000, 100_000),
    "sparse": lambda v: v.to_sparse(),
    "a view": lambda v: v.t() if v.dim() == 2 else v[..., :1],
    "meta": lambda v: v.to("meta"),
    "int8": lambda v: v.to(torch.int8),
    "complex": lambda v: torch.complex(v, v),
    "a parameter": torch.nn.Parameter,
    "a list": lambda v: v.tolist(),
    "None": lambda _: None,
    "a text": lambda _: "x",
    "a dictionary": lambda v: {"x": v},
    "foreign code": lambda _: _Foreign(),
    "a class": lambda _: Random,
    "no dimensions": lambda v: v.flatten()[0],
    "empty": lambda v: v[:0] if v.dim() else v,
    "file: a list": lambda v: [v],
    "file: a tensor": lambda v: v,
    "file: nested": lambda v: {"state_dict": {"x": v}},
    "file: foreign code": lambda _: _Foreign(),
    "file: numbers": lambda v: {3: v},
}
