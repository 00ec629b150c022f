"""Make quantised.safetensors: small Llama layers, quantised and dequantised by the libraries themselves.

Run in an environment with bitsandbytes and compressed-tensors, which the tests do not need:

    python tests/golden/make_quantised_golden.py

Names in the file: ``<scheme>/stored/<tensor>`` is what the library writes into a checkpoint, and
``<scheme>/values/<weight>`` the float32 weight that it computes with. The metadata holds each scheme's
``quantization_config``. Everything else of the model is under ``plain/``.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from bitsandbytes import functional
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import llama, save

# a row holds whole blocks of 64: bitsandbytes' kernel for the CPU computes other values where it does not
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def of_bitsandbytes(directory, options):
    """Tensors that bitsandbytes stores, its values, and its configuration."""
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    values = {}
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        stored = load_file(Path(saved) / "model.safetensors")
        written = json.loads((Path(saved) / "config.json").read_text())["quantization_config"]
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if hasattr(weight, "quant_state"):
            values[f"{name}.weight"] = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif hasattr(weight, "SCB"):
            scales = stored[f"{name}.SCB"]
            values[f"{name}.weight"] = functional.int8_vectorwise_dequant(weight.data, scales)
    return stored, values, written


def of_compressed_tensors(plain):
    """The same of compressed-tensors: four bits, asymmetric, groups of 32."""
    arguments = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored, values = {}, {}
    for name, weight in plain.items():
        if "_proj.weight" not in name:
            stored[name] = weight
            continue
        groups = weight.view(weight.shape[0], -1, 32)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-8 - low / scales).round().to(torch.int8)
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
        packed = compressor.compress(dict(state), scheme)
        values[name] = compressor.decompress(dict(packed), scheme)["weight"]
        module = name.removesuffix("weight")
        stored |= {module + part: tensor for part, tensor in packed.items()}
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}}
    described = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return stored, values, described | {"config_groups": groups}


def main():
    torch.manual_seed(0)
    content, described = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        directory = save(llama(**SIZES), Path(folder) / "llama")
        plain = load_file(directory / "model.safetensors")
        schemes = {
            name: of_bitsandbytes(directory, options) for name, options in BITSANDBYTES.items()
        }
        config = (directory / "config.json").read_text()
    schemes["compressed"] = of_compressed_tensors(plain)
    for scheme, (stored, values, quantization) in schemes.items():
        described[scheme] = quantization
        new = {name: x for name, x in stored.items() if name not in plain or name in values}
        content |= {f"{scheme}/stored/{name}": x.contiguous() for name, x in new.items()}
        content |= {f"{scheme}/values/{name}": x.float() for name, x in values.items()}
    content |= {f"plain/{name}": x for name, x in plain.items()}
    versions = {name: version(name) for name in ("bitsandbytes", "compressed-tensors")}
    metadata = {"config": config, "quantization": json.dumps(described), **versions}
    save_file(content, Path(__file__).with_name("quantised.safetensors"), metadata)


if __name__ == "__main__":
    main()
