"""Quantised base models: codes, scales and the configuration that says how they are read, beside adapters in order."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from helpers import lora
from quantised_models import CONFIGURATIONS, plain, quantised, two_forms
from safetensors.torch import save

from fuzz import examples, folders
from fuzz.adapters import finite
from fuzz.cases import Attempt, WrongAnswerError
from fuzz.folders import Files
from fuzz.tensors import mutated_safetensors
from fuzz.values import Steps, json_bytes, mutated
from pcb_peft import load_adapter, merge_adapters
from pcb_peft.base.model import open_base_model

CONFIG, TENSORS = "config.json", "model.safetensors"
LIBRARIES = ("nf4", "int8", "compressed")


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    originals = {name: folders.files_in(quantised(name, directory / name)) for name in LIBRARIES}
    for name in CONFIGURATIONS:
        originals[name] = folders.files_in(two_forms(name, directory / name)[0])
    originals["mxfp4"] = _mxfp4()
    adapters = _adapters(plain(directory / "plain"))

    def attempt(rng: Random, steps: Steps) -> Any:
        name = rng.choice(sorted(originals))
        steps.append(name)
        path = folders.write(directory / "base", _broken(originals[name], rng, steps))
        how = "read" if name == "mxfp4" else rng.choice(("read", "delta", "fold"))
        steps.append(how)
        if how == "read":
            base = open_base_model(path, dequantize=True)
            for weight in base.quantised:
                values = base.tensor(weight)
                if values.shape != base.tensors[weight].shape:
                    raise WrongAnswerError(f"{weight} has another shape than was said")
            return how
        adapter = rng.choice(adapters)
        if how == "fold":
            return load_adapter(adapter).fold(
                path, directory / "out", dequantize=True, overwrite="all", progress=False
            )
        merged = merge_adapters(
            [adapter], "linear", base_model=path, dequantize=True, progress=False
        )
        for module in merged.modules:
            finite(merged.delta(module), module)
        return how

    return attempt


def _broken(files: Files, rng: Random, steps: Steps) -> Files:
    """The files of a base model, in which its codes are different, or what is said of them."""
    files = dict(files)
    if rng.random() < 0.5:
        files[TENSORS] = mutated_safetensors(files[TENSORS], rng, steps)
        return files
    config = json.loads(files[CONFIG])
    if rng.random() < 0.8:
        config["quantization_config"] = mutated(config["quantization_config"], rng, steps)
    else:
        config = mutated(config, rng, steps)
    files[CONFIG] = json_bytes(config, rng, steps)
    return files


def _mxfp4() -> Files:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 12, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 132, (3, 12, 2), dtype=torch.uint8, generator=generator)
    config = {"model_type": "none", "quantization_config": {"quant_method": "mxfp4"}}
    tensors = {"up_blocks": blocks, "up_scales": scales, "norm.weight": torch.ones(4)}
    return {CONFIG: json.dumps(config).encode(), TENSORS: save(tensors)}


def _adapters(directory: Path) -> list[Path]:
    """Adapters whose change depends on the weights, or not."""
    configs = [lora("q_proj", "down_proj", use_dora=dora) for dora in (True, False)]
    return [
        examples.workshop().adapter(
            transformers.AutoModelForCausalLM.from_pretrained(directory),
            config,
            f"quantised{place}",
        )
        for place, config in enumerate(configs)
    ]
