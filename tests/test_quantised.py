"""Quantised weights: the values that the libraries that wrote them compute."""

import json

import pytest
import torch
import transformers
from quantised_models import AWQ_ORDER, packed
from safetensors.torch import load_file, save_file

from pcb_peft import BaseModelError
from pcb_peft.base import dequantise
from pcb_peft.base.files import read_tensor_infos
from pcb_peft.base.quantised import quantised_weights, without_quantisation
from pcb_peft.data.models import load_base

UP = "model.layers.0.mlp.up_proj"
SMALL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def weights_in(directory, config=None):
    """The quantised weights of the checkpoint in a directory."""
    config = config or json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    infos = read_tensor_infos(directory, ["model.safetensors"])
    return quantised_weights(config, infos, tensors.__getitem__, "base")


def written(directory, method, **tensors):
    """A checkpoint with these tensors of one module, and a configuration that says so."""
    save_file(
        {name.replace("__", "."): x for name, x in tensors.items()}, directory / "model.safetensors"
    )
    return weights_in(directory, {"quantization_config": method})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ("nf4", {"load_in_4bit": True}),
        ("fp4", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ("int8", {"load_in_8bit": True}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about kernels that are not installed
def test_bitsandbytes(llama, tmp_path, kind, options):
    functional = pytest.importorskip("bitsandbytes").functional
    kinds = {} if kind == "int8" else {"bnb_4bit_quant_type": kind}
    config = transformers.BitsAndBytesConfig(**options, **kinds)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path)
    found = weights_in(tmp_path)
    assert len(found) == 7  # every linear layer but the head
    weight = model.get_submodule(UP).weight
    if kind == "int8":
        scales = load_file(tmp_path / "model.safetensors")[f"{UP}.SCB"]
        expected = functional.int8_vectorwise_dequant(weight.data, scales)
    else:
        expected = functional.dequantize_4bit(weight.data, weight.quant_state)
    assert found[f"{UP}.weight"].shape == (192, 128)
    torch.testing.assert_close(found[f"{UP}.weight"].values(), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [256, 200])  # 200: the last blocks are cut, as in DeepSeek-V3
def test_fp8_with_blocks(tmp_path, rows):
    torch.manual_seed(0)
    codes = torch.randn(rows, 384).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), 3) + 0.5
    found = written(
        tmp_path,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        up__weight=codes,
        up__weight_scale_inv=scales,
    )
    expected = torch.empty(rows, 384)
    for i in range(rows):
        for j in range(3):
            part = slice(128 * j, 128 * (j + 1))
            expected[i, part] = codes[i, part].float() * scales[i // 128, j]
    torch.testing.assert_close(found["up.weight"].values(), expected, rtol=0, atol=0)
    if rows == 256:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
        torch.testing.assert_close(expected, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (256, 1)])
def test_fp8_with_one_scale_or_one_per_row(tmp_path, shape):
    codes, scales = torch.randn(256, 64).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    found = written(
        tmp_path, {"quant_method": "fbgemm_fp8"}, up__weight=codes, up__weight_scale=scales
    )
    expected = codes.float() * (scales if scales.ndim == 2 else scales.item())
    torch.testing.assert_close(found["up.weight"].values(), expected, rtol=0, atol=0)


def test_mxfp4_as_transformers_reads_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 12, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (3, 12, 2), dtype=torch.uint8)
    found = written(tmp_path, {"quant_method": "mxfp4"}, up_blocks=blocks, up_scales=scales)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert found["up"].shape == tuple(expected.shape) == (3, 64, 12)
    torch.testing.assert_close(found["up"].values(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq(tmp_path, bits, version, ordered):
    torch.manual_seed(bits)
    top = 1 << bits
    codes, zeros = torch.randint(0, top, (64, 32)), torch.randint(0, top, (2, 32))
    scales = torch.rand(2, 32) + 0.1
    groups = torch.arange(64) // 32 if ordered else torch.randint(0, 2, (64,))
    stored = (zeros - 1) % top if version == "gptq" else zeros
    tensors = {
        "up__qweight": packed(codes.T, bits).T.contiguous(),
        "up__qzeros": packed(stored, bits),
        "up__scales": scales,
    }
    if not ordered:
        tensors["up__g_idx"] = groups.int()
    method = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}
    found = written(tmp_path, method, **tensors)
    expected = torch.empty(32, 64)
    for i in range(64):
        for o in range(32):
            group = int(groups[i])
            expected[o, i] = scales[group, o] * int(codes[i, o] - zeros[group, o])
    assert found["up.weight"].shape == (32, 64)
    torch.testing.assert_close(found["up.weight"].values(), expected, rtol=0, atol=0)


def test_awq(tmp_path):
    torch.manual_seed(0)
    codes, zeros = torch.randint(0, 16, (64, 16)), torch.randint(0, 16, (2, 16))
    scales = torch.rand(2, 16) + 0.1
    method = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    found = written(
        tmp_path,
        method,
        up__qweight=packed(codes, 4, AWQ_ORDER),
        up__qzeros=packed(zeros, 4, AWQ_ORDER),
        up__scales=scales,
    )
    expected = torch.tensor(
        [
            [float(scales[i // 32, o]) * int(codes[i, o] - zeros[i // 32, o]) for i in range(64)]
            for o in range(16)
        ]
    )
    assert found["up.weight"].shape == (16, 64)
    torch.testing.assert_close(found["up.weight"].values(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors(tmp_path, bits, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    arguments = QuantizationArgs(
        num_bits=bits, group_size=32, strategy="group", symmetric=symmetric
    )
    weight, scales = torch.randn(64, 96), torch.rand(64, 3) * 0.1 + 0.05
    zeros = torch.zeros(64, 3, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-3, 4, (64, 3), dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    groups = {"group_0": {"weights": {"num_bits": bits}}}
    found = written(
        tmp_path,
        {"quant_method": "compressed-tensors", "config_groups": groups},
        **{f"up__{name}": values for name, values in stored.items()},
    )
    torch.testing.assert_close(found["up.weight"].values(), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_nvfp4_of_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = torch.randn(32, 64)
    whole = 448 * 6 / weight.abs().max()
    scales = whole * weight.reshape(32, 4, 16).abs().amax(-1) / 6
    state = {"weight": weight, "weight_scale": scales, "weight_global_scale": whole[None]}
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    found = written(
        tmp_path,
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        **{f"up__{name}": values for name, values in stored.items()},
    )
    values = found["up.weight"].values().to(expected.dtype)
    torch.testing.assert_close(values, expected, rtol=2**-7, atol=0)  # both rounded to bfloat16


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_a_model_that_must_run_is_refused_with_both_ways_out(workshop, method):
    base = workshop.base("llama")
    config = json.loads((base / "config.json").read_text())
    fields = {"quant_method": method, "load_in_4bit": True, "bits": 4, "group_size": 16}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    with pytest.raises(BaseModelError, match=r"is quantised.*made from.*dequantize=True"):
        load_base(base, "CAUSAL_LM")


def test_what_is_not_known_is_refused_by_name(tmp_path):
    with pytest.raises(BaseModelError, match=r"base is quantised \(hqq\).*known are bitsandbytes"):
        written(tmp_path, {"quant_method": "hqq"}, up__W_q=torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(BaseModelError, match=r"files hold plain weights.*take quantization_config"):
        written(tmp_path, {"quant_method": "bitsandbytes"}, up__weight=torch.zeros(2, 2))
    with pytest.raises(BaseModelError, match=r"up\.qweight, for one, cannot"):
        written(tmp_path, {"quant_method": "exotic"}, up__qweight=torch.zeros(2, 2))
    method = {"quant_method": "awq", "bits": 4, "version": "gemv"}
    words = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(BaseModelError, match="layout 'gemv'"):
        written(
            tmp_path,
            method,
            up__qweight=words,
            up__qzeros=words.clone(),
            up__scales=torch.ones(2, 16),
        )


def test_an_ordinary_checkpoint_has_none(llama):
    assert weights_in(llama) == {}


def test_the_configuration_forgets_the_quantisation():
    config = {"text_config": {"quantization_config": {}, "dtype": "float16"}, "torch_dtype": "x"}
    assert without_quantisation(config, "bfloat16") == {
        "text_config": {"dtype": "bfloat16"},
        "torch_dtype": "bfloat16",
    }


def test_codes_that_cross_words():
    codes = torch.arange(64).reshape(2, 32) % 8
    assert torch.equal(dequantise.unpack(packed(codes, 3), 3, 32), codes)


I32, I8, U8, FP8 = torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn
STATE = torch.tensor(list(b'{"shape": [8, 16], "blocksize": 64}'), dtype=U8)
NF4 = {
    "up.weight": torch.ones(64, 1, dtype=U8),
    "up.weight.quant_state.bitsandbytes__nf4": STATE,
    "up.weight.absmax": torch.ones(2),
    "up.weight.quant_map": torch.ones(16),
}
GPTQ = {
    "up.qweight": torch.ones(2, 8, dtype=I32),
    "up.qzeros": torch.ones(1, 1, dtype=I32),
    "up.scales": torch.ones(1, 8),
    "up.g_idx": torch.zeros(16, dtype=I32),
}
INTEGERS = {
    "up.weight_packed": torch.ones(8, 2, dtype=I32),
    "up.weight_scale": torch.ones(8, 2),
    "up.weight_shape": torch.tensor([8, 16]),
    "up.weight_zero_point": torch.zeros(8, 2, dtype=I8),
}
DAMAGED = {  # scheme: configuration, parts that fit each other, and others that torch would take for all rows
    "bitsandbytes": (
        {},
        NF4,
        [
            {"up.weight.absmax": torch.ones(1)},
            {"up.weight.absmax": torch.ones(2, dtype=U8)},
            {"up.weight.quant_map": torch.ones(1)},
            {"up.weight.quant_map": torch.full((16,), torch.inf)},
        ],
    ),
    "int8": (
        {},
        {"up.weight": torch.ones(8, 4, dtype=I8), "up.SCB": torch.ones(8)},
        [{"up.SCB": torch.ones(1)}, {"up.SCB": torch.ones(8, 1)}],
    ),
    "gptq": (
        {"bits": 4, "group_size": 16},
        GPTQ,
        [
            {"up.scales": torch.ones(1, 1)},
            {"up.qzeros": torch.ones(2, 1, dtype=I32)},
            {"up.g_idx": -torch.ones(16, dtype=I32)},
            {"up.g_idx": torch.ones(16, dtype=I32)},
        ],
    ),
    "awq": (
        {"bits": 4},
        {
            "up.qweight": torch.ones(16, 1, dtype=I32),
            "up.qzeros": torch.ones(2, 1, dtype=I32),
            "up.scales": torch.ones(2, 8),
        },
        [{"up.scales": torch.ones(2, 1)}, {"up.qzeros": torch.ones(1, 1, dtype=I32)}],
    ),
    "compressed-tensors": (
        {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        INTEGERS,
        [
            {"up.weight_scale": torch.ones(1, 2)},
            {"up.weight_zero_point": torch.zeros(1, 2, dtype=I8)},
            {"up.weight_packed": torch.ones(1, 2, dtype=I32)},
            {"up.weight_shape": torch.tensor([1 << 40, 1 << 40])},
        ],
    ),
    "mxfp4": (
        {},
        {
            "up_blocks": torch.ones(3, 8, 2, 16, dtype=U8),
            "up_scales": torch.ones(3, 8, 2, dtype=U8),
        },
        [
            {"up_scales": torch.ones(3, 8, 1, dtype=U8)},
            {"up_blocks": torch.ones(3, 8, 2, 1, dtype=U8)},
        ],
    ),
    "fp8": (
        {"weight_block_size": [4, 4]},
        {"up.weight": torch.ones(8, 8).to(FP8), "up.weight_scale_inv": torch.ones(2, 2)},
        [{"up.weight_scale_inv": torch.ones(1, 2)}, {"up.weight_scale_inv": torch.ones(3, 2)}],
    ),
}


@pytest.mark.parametrize("scheme", DAMAGED)
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path, scheme):
    described, parts, damages = DAMAGED[scheme]
    method = {"quant_method": "bitsandbytes" if scheme == "int8" else scheme, **described}

    def read(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        (weight,) = weights_in(tmp_path, {"quantization_config": method}).values()
        return weight.values()

    assert read(parts).isfinite().all()
    for damage in damages:
        with pytest.raises(
            BaseModelError, match=r"base: (up.* has|its quantised weights have) other"
        ):
            read(parts | damage)
