"""llama.cpp, and Ollama, which starts it: they take GGUF files."""

from pcb_peft.consumers.consumer import Consumer

LLAMA_CPP = Consumer(
    "llama.cpp",
    "llama.cpp",
    "2026.10",
    ("gguf",),
    way="pcb-peft export {path} --to gguf -o adapter-gguf",
)
OLLAMA = Consumer(
    "ollama",
    "Ollama",
    "0.30",
    ("gguf",),
    way="pcb-peft export {path} --to gguf -o adapter-gguf, then ADAPTER in a Modelfile",
)
