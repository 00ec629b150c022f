"""Strangers' files: what does not hold weights is refused by name, before it costs anything."""

import pickle
import re
import struct
import warnings
import zipfile

import peft
import pytest
import torch
from helpers import lora
from safetensors.torch import load_file, save_file

from pcb_peft import AdapterError, load_adapter, merge_adapters
from pcb_peft.errors import BaseModelError, PcbPeftError
from pcb_peft.files.json_text import parse_json, read_json_file
from pcb_peft.files.pickled import open_pickled
from pcb_peft.files.tensors import SafetensorsFile, read_finite, refuse_other_numbers
from pcb_peft.runtime.shown import LONGEST, quoted, shown

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
OTHER_NUMBERS = {
    "int8": lambda v: (v * 40).to(torch.int8),
    "bool": lambda v: v > 0,
    "int64": lambda v: (v * 40).long(),
    "complex64": lambda v: torch.complex(v, v),
    "uint16": lambda v: (v.abs() * 40).to(torch.int32).to(torch.uint16),
    "float8_e8m0": lambda v: v.abs().to(torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("numbers", OTHER_NUMBERS)
@pytest.mark.parametrize("safetensors", [True, False])
def test_other_numbers_than_weights_are_refused_by_name(workshop, numbers, safetensors):
    adapter = workshop.adapter("mlp", lora(), safetensors=safetensors)
    file = adapter / (WEIGHTS if safetensors else PICKLE)
    tensors = load_file(file) if safetensors else torch.load(file)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = OTHER_NUMBERS[numbers](tensors[name])
    if safetensors:
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    with pytest.raises(AdapterError, match=rf"{re.escape(str(file))}: {re.escape(name)} holds"):
        load_adapter(adapter)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_every_format_of_floating_point_numbers_is_read(workshop, dtype):
    def edit(tensors):
        return {name: values.to(dtype) for name, values in tensors.items()}

    adapter = workshop.edit_tensors(workshop.adapter("mlp", lora()), edit)
    stored = load_file(adapter / WEIGHTS)
    rounded = workshop.adapter("mlp", lora(), "rounded")
    save_file({name: v.float() for name, v in stored.items()}, rounded / WEIGHTS)
    for module, delta in load_adapter(adapter).modules.items():
        assert torch.equal(delta.delta(), load_adapter(rounded).delta(module))


def test_indices_and_single_numbers_may_be_integers(tmp_path):
    file = tmp_path / "file"
    save_file({"x.alpha": torch.tensor(8), "x.topk_indices": torch.tensor([1, 2])}, file)
    refuse_other_numbers(SafetensorsFile(file))
    assert float(read_finite(SafetensorsFile(file), "x.alpha")) == 8


def change(part, function):
    def edit(tensors):
        return {n: function(v) if part in n else v for n, v in tensors.items()}

    return edit


SHAPES = {
    "lora": (peft.LoraConfig(r=4, target_modules=["up"]), "lora_A"),
    "dora": (peft.LoraConfig(r=4, target_modules=["up"], use_dora=True), "magnitude"),
    "bias": (peft.LoraConfig(r=4, target_modules=["up"], lora_bias=True), "lora_B.bias"),
    "loha": (peft.LoHaConfig(r=4, target_modules=["up"]), "hada_w1_a"),
    "lokr": (peft.LoKrConfig(r=4, target_modules=["up"]), "lokr_w1"),
    "hra": (peft.HRAConfig(r=4, target_modules=["up"]), "hra_u"),
    "vera": (peft.VeraConfig(r=4, target_modules=["up"]), "vera_A"),
    "adalora": (peft.AdaLoraConfig(target_modules=["up"], total_step=9), "lora_A"),
    "delora": (peft.DeloraConfig(r=4, target_modules=["up"]), "delora_A"),
    "c3a": (peft.C3AConfig(block_size=2, target_modules=["up"]), "c3a_kernel"),
    "miss": (peft.MissConfig(r=4, target_modules=["up"]), "miss_block"),
    "ia3": (peft.IA3Config(target_modules=["up"], feedforward_modules=[]), "ia3_l"),
}
MISSHAPEN = {
    "a scalar": lambda v: v.flatten()[0].clone(),
    "one value": lambda v: v.flatten()[:1].clone(),
    "no values": lambda v: v[:0].clone(),
    "one dimension more": lambda v: v[..., None].repeat(*[1] * v.ndim, 2),
    "twice as long": lambda v: torch.cat([v, v]),
}


@pytest.mark.filterwarnings(
    "ignore:.*LoRA tensor.s. have invalid shape"
)  # of biases, when PEFT saves them
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("shape", MISSHAPEN)
def test_a_tensor_of_another_shape_is_refused(workshop, kind, shape):
    config, part = SHAPES[kind]
    if (kind, shape) == ("miss", "twice as long"):
        pytest.skip("twice the rank is another adapter, and a whole one")
    adapter = workshop.adapter("mlp", config)
    workshop.edit_tensors(adapter, change(part, MISSHAPEN[shape]))
    with pytest.raises(PcbPeftError):
        merge_adapters([adapter], "linear", base_model=workshop.base("mlp"), rank="full").delta(
            "up", workshop.base("mlp")
        )


# ------------------------------------------------------------------------------------------ pickled files


def pickled(path, tensors):
    torch.save(tensors, path)
    return path


def test_a_tensor_that_repeats_a_few_values_is_refused_before_it_is_made(tmp_path):
    repeated = torch.ones(1).expand(1 << 15, 1 << 16)  # 8 GiB as float32
    file = pickled(tmp_path / "file.bin", {"x.lora_A.weight": repeated})
    assert file.stat().st_size < 4096
    with pytest.raises(AdapterError, match=r"lora_A.weight has the shape \(32768, 65536\).+fewer"):
        open_pickled(file)


def test_many_views_of_one_storage_are_refused(tmp_path):
    values = torch.ones(10_000)
    file = pickled(tmp_path / "file.bin", {str(n): values for n in range(20)})
    with pytest.raises(AdapterError, match="made to fill the memory"):
        open_pickled(file)


def test_tied_tensors_are_read(tmp_path):
    values = torch.randn(30, 4)
    file = pickled(tmp_path / "file.bin", {"a": values, "b": values, "c": torch.randn(3, 3)})
    assert torch.equal(open_pickled(file).read("b"), values)


def sparse(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a feature that is not finished
        return values.to_sparse_csr()


def quantised(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)


OTHERS = {
    "sparse": lambda: {"x": torch.eye(3).to_sparse()},
    "csr": lambda: {"x": sparse(torch.eye(3))},
    "meta": lambda: {"x": torch.ones(3, device="meta")},
    "quantised": lambda: {"x": quantised(torch.eye(3))},
    "a number for a name": lambda: {3: torch.ones(1)},
    "a list": lambda: [torch.ones(1)],
    "a text": lambda: {"x": "values"},
}


@pytest.mark.parametrize("content", OTHERS)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, content):
    file = pickled(tmp_path / "file.bin", OTHERS[content]())
    with pytest.raises(AdapterError, match="must hold named tensors and nothing else"):
        open_pickled(file)


class Opens:
    """Something that calls `bytearray` when it is unpickled, which torch allows."""

    def __init__(self, size):
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path):
    file = tmp_path / "file.bin"
    torch.save({"x": torch.ones(1)}, file)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        contents = {name: archive.read(name) for name in names}
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            bomb = name.endswith("data.pkl")
            archive.writestr(name, pickle.dumps(Opens(1 << 50), 2) if bomb else contents[name])
    with pytest.raises(AdapterError, match="it names __builtin__ bytearray"):
        open_pickled(file)


def test_a_compressed_archive_is_refused(tmp_path):
    stored = pickled(tmp_path / "stored.bin", {"x": torch.zeros(100_000)})
    with (
        zipfile.ZipFile(stored) as archive,
        zipfile.ZipFile(tmp_path / "file.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(AdapterError, match="is compressed"):
        open_pickled(tmp_path / "file.bin")


# --------------------------------------------------------------------------------------- text and JSON

DEEP = '{"peft_type": "LORA", "x": ' + "[" * 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP.encode(), "nested too deeply"),
        (b"{", "is not JSON"),
        (b"\xff{}", "cannot be read"),
        (b'{"x": ' + b"1" * 5000 + b"}", "is not JSON"),
    ],
)
def test_json_that_cannot_be_read_is_said_to_be_so(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BaseModelError, match=rf"config.json .*{message}.*; way out$") as caught:
        read_json_file(tmp_path / "config.json", BaseModelError, "way out")
    assert len(str(caught.value)) < 1000


def test_a_directory_or_a_file_of_a_thousand_pages_is_no_json(tmp_path, monkeypatch):
    with pytest.raises(AdapterError, match="cannot be read"):
        read_json_file(tmp_path, AdapterError, "way out")
    monkeypatch.setattr("pcb_peft.files.json_text.MOST_BYTES", 1 << 20)
    (tmp_path / "long").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(AdapterError, match="larger than 1 MiB"):
        read_json_file(tmp_path / "long", AdapterError, "way out")


@pytest.mark.parametrize("metadata", [DEEP, "[]", "3", "{"])
def test_metadata_of_an_image_lora_that_cannot_be_read_are_refused(tmp_path, metadata):
    tensors = {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)}
    file = tmp_path / "image.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": metadata})
    with pytest.raises(AdapterError, match=r"image.safetensors: lora_adapter_metadata"):
        load_adapter(file)


def test_a_header_that_promises_more_than_the_file_has_is_refused(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[1073741824],"data_offsets":[0,4294967296]}}'
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        SafetensorsFile(tmp_path / "file")


# ---------------------------------------------------------------------------------- values in messages


def laughs():
    value = ["ha"]
    for _ in range(30):
        value = [value] * 10
    return value


LONG = {
    "laughs": laughs(),
    "text": "x" * 10**6,
    "digits": 10**5000,
    "map": {"k" * 10**5: [1] * 10**5},
}


@pytest.mark.parametrize("value", LONG)
def test_a_value_in_a_message_is_short(value):
    assert len(quoted(LONG[value])) <= LONGEST


def test_a_text_in_a_message_has_no_control_characters():
    assert shown("a\n\x1b[31mb\u202e\ud800") == "a \\x1b[31mb\\u202e\\ud800"
    assert parse_json("[]", "x", AdapterError, "") == []
