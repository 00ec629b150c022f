"""llama.cpp, and Ollama, which starts it: they take GGUF files."""

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer

LLAMA_CPP = Consumer(
    "llama.cpp",
    "llama.cpp",
    "2026.10",
    ("gguf",),
    way="pcb-peft export {path} --to gguf -o adapter-gguf",
    way_lacks=(features.dora, *features.BEYOND_LORA),
    flags=lambda files, _: ["--lora" if files.config["adapter"] else "--model"],
)
OLLAMA = Consumer(
    "ollama",
    "Ollama",
    "0.30",
    ("gguf",),
    way="pcb-peft export {path} --to gguf -o adapter-gguf, then ADAPTER in a Modelfile",
    way_lacks=(features.dora, *features.BEYOND_LORA),
    flags=lambda files, _: [f"{'ADAPTER' if files.config['adapter'] else 'FROM'} in its Modelfile"],
)
