"""TensorRT-LLM: rules of its LoRA manager."""

from collections.abc import Sequence

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule, Version
from pcb_peft.consumers.files import OutputFiles

DEFAULT_RANK = 64
_SOURCE = "https://github.com/NVIDIA/TensorRT-LLM/blob/007e181b/tensorrt_llm/lora_manager.py (read, not run)"


def _flags(files: OutputFiles, version: Version) -> Sequence[str]:
    del version
    return [f"LoraConfig(max_lora_rank={files.rank})"] if files.rank > DEFAULT_RANK else []


CONSUMER = Consumer(
    "tensorrt-llm",
    "TensorRT-LLM",
    "1.3.0",
    ("peft", "model"),
    (
        Rule(features.other_kind, "refuses", "loads LoRAs only", _SOURCE),
        Rule(features.alpha_pattern, "ignores", "scales every module alike", _SOURCE),
        Rule(features.changed_base, "misreads", "adds it to the unchanged base model", _SOURCE),
        Rule(features.classifier, "refuses", "knows no head but the output layer", _SOURCE),
        Rule(features.saved_norms, "refuses", "knows no stored layer but the ends", _SOURCE),
        Rule(features.saved_others, "refuses", "knows no stored layer but the ends", _SOURCE),
        Rule(features.embedding_lora, "refuses", "knows the layers' projections only", _SOURCE),
        Rule(features.token_rows, "refuses", "knows no trained token rows", _SOURCE),
        Rule(features.biases, "refuses", "knows no trained biases", _SOURCE),
    ),
    flags=_flags,
)
