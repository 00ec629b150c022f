"""Base models: configuration, index and shards, beside adapters that are in order."""

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz import examples, folders
from fuzz.cases import Attempt
from fuzz.folders import Files
from fuzz.tensors import mutated_safetensors
from fuzz.values import Steps, json_bytes, mutated
from pcb_peft import extract_adapter, load_adapter, merge_adapters

KINDS = {  # base model to adapters that are for it
    "mlp": ("LoRA", "DoRA", "VeRA", "bias=all", "PiSSA", "OFT"),
    "odd": (
        "LoRA on all of these",
        "DoRA on convolutions",
        "a stack that transformers does not know",
    ),
    "gpt2": ("DoRA on Conv1D", "PiSSA on Conv1D"),
    "mixtral": ("experts", "experts and layers"),
    "gpt_oss": ("experts, transposed",),
}
KEYS = [  # of config.json, which the examples may lack
    *("quantization_config", "text_config", "auto_map", "tie_word_embeddings", "num_hidden_layers"),
    *(
        "rope_scaling",
        "layer_types",
        "architectures",
        "model_type",
        "vocab_size",
        "torch_dtype",
        "dtype",
    ),
    *("hidden_act", "head_dim", "pad_token_id", "id2label", "problem_type", "num_local_experts"),
]


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    originals = {kind: folders.files_in(examples.base(kind)) for kind in KINDS}
    shards = folders.files_in(examples.base_in_shards())
    pool = {kind: [examples.adapter(name) for name in names] for kind, names in KINDS.items()}

    def attempt(rng: Random, steps: Steps) -> Any:
        kind = rng.choice(sorted(KINDS))
        files, adapters = originals[kind], pool[kind]
        if rng.random() < 0.3:
            kind, files, adapters = "llama in shards", shards, [examples.llama_adapter()]
        steps.append(kind)
        path = folders.write(directory / "base", broken(files, rng, steps))
        if rng.random() < 0.04:
            folders.spoil(path, rng, steps)
        return use(path, rng.choice(adapters), directory, rng, steps)

    return attempt


def broken(files: Files, rng: Random, steps: Steps) -> Files:
    """The files of a base model, one of them different."""
    files = dict(files)
    name = rng.choice(sorted(files))
    if rng.random() < 0.4:
        name = "config.json"
    steps.append(name)
    if name.endswith(".json"):
        content = json.loads(files[name])
        if name == "config.json" and rng.random() < 0.3:
            content[rng.choice(KEYS)] = None
        files[name] = json_bytes(mutated(content, rng, steps), rng, steps)
    else:
        files[name] = mutated_safetensors(files[name], rng, steps)
    return files


def use(base: Path, adapter: Path, directory: Path, rng: Random, steps: Steps) -> str:
    """Do with a base model what this package does with one."""
    how = rng.choice(("fold", "fold", "read", "merge", "dense", "extract"))
    steps.append(how)
    if how == "fold":
        load_adapter(adapter).fold(base, directory / "out", overwrite="all")
    elif how == "read":
        loaded = load_adapter(adapter, base_model=base)
        for module in loaded.modules:
            loaded.delta(module)
    elif how == "merge":
        merged = merge_adapters([adapter], "linear", base_model=base, progress=False)
        merged.save_pretrained(directory / "out", overwrite="all")
    elif how == "dense":
        merged = merge_adapters([adapter], "linear", rank="full", base_model=base, progress=False)
        merged.fold(base, directory / "out", overwrite="all")
    else:
        extracted = extract_adapter(base, base, rank=2, progress=False)
        extracted.save_pretrained(directory / "out", overwrite="all")
    return how
