"""Make gguf.safetensors: LoRAs of tiny models, as llama.cpp's own convert_lora_to_gguf.py writes them.

    python tests/golden/make_gguf_golden.py PATH/TO/llama.cpp

The file holds, by model_type, the tensors of PEFT (``<type>/peft/<name>``, alpha = rank) and those of llama.cpp
(``<type>/gguf/<name>``); the metadata holds the configuration of each model, and the architecture that llama.cpp calls
it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OTHERS = {  # model_type: more sizes
    "llama": {},
    "mistral": {"head_dim": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 4},
    "gemma": {"head_dim": 4},
    "gemma2": {"head_dim": 4},
    "gemma3_text": {"head_dim": 4},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
}


def converted(directory, llama_cpp):
    """Tensors and architecture of the GGUF that llama.cpp makes of the adapter in a directory."""
    script = Path(llama_cpp) / "convert_lora_to_gguf.py"
    output = directory / "official.gguf"
    words = ["--outfile", output, "--outtype", "f32", "--base", directory / "base", directory / "a"]
    subprocess.run([sys.executable, script, *words], check=True)
    reader = gguf.GGUFReader(output)
    tensors = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    return tensors, reader.fields["general.architecture"].contents()


def main(llama_cpp):
    content, described = {}, {}
    for kind, more in OTHERS.items():
        config = transformers.AutoConfig.for_model(kind, **SIZES | more)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        config.architectures = [type(model).__name__]
        lora = peft.LoraConfig(r=3, lora_alpha=3, target_modules="all-linear")
        wrapped = peft.get_peft_model(model, lora)
        for name, values in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(values)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            wrapped.save_pretrained(directory / "a")
            config.save_pretrained(directory / "base")
            tensors, architecture = converted(directory, llama_cpp)
            described[kind] = {"config": config.to_dict(), "architecture": architecture}
            peft_tensors = load_file(directory / "a" / "adapter_model.safetensors")
        content |= {f"{kind}/peft/{name}": x for name, x in peft_tensors.items()}
        content |= {f"{kind}/gguf/{name}": x for name, x in tensors.items()}
    metadata = {"models": json.dumps(described, default=str)}
    save_file(content, Path(__file__).with_name("gguf.safetensors"), metadata)


if __name__ == "__main__":
    main(sys.argv[1])
