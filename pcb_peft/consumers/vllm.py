"""vLLM: rules of its LoRA loader."""

from collections.abc import Sequence

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule, Version
from pcb_peft.consumers.files import OutputFiles

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that ``--max-lora-rank`` takes (``vllm/config/lora.py``)."""
DEFAULT_RANK = 16
_HELPER, _MODEL = (
    "vllm/lora/peft_helper.py, 0.32 and 0.33",
    "vllm/lora/lora_model.py, 0.32 and 0.33",
)


def served_rank(rank: int) -> int | None:
    """Return the lowest ``--max-lora-rank`` that serves a rank; None above the highest."""
    return next((most for most in RANKS if rank <= most), None)


def _flags(files: OutputFiles, version: Version) -> Sequence[str]:
    del version
    served = served_rank(files.rank) or RANKS[-1]
    flags = ["--enable-lora"]
    if served > DEFAULT_RANK:
        flags.append(f"--max-lora-rank {served}")
    if features.fused_experts(files) and features.single_experts(files):
        flags.append("--enable-mixed-moe-lora-format")
    return flags


CONSUMER = Consumer(
    "vllm",
    "vLLM",
    "0.33",
    ("peft", "model"),
    (
        Rule(features.other_kind, "refuses", "loads LoRAs only", _HELPER),
        Rule(features.dora, "refuses", "rejects DoRA", _HELPER),
        Rule(features.biases, "refuses", "rejects trained biases", _HELPER),
        Rule(features.variants, "refuses", "rejects such LoRAs", _HELPER),
        Rule(features.changed_base, "refuses", "rejects such initialisations", _HELPER, "0.32"),
        Rule(
            features.changed_base,
            "misreads",
            "adds the LoRA to a base model that the training had changed",
            "vllm/lora/peft_helper.py, 0.10 to 0.31",
            until="0.32",
        ),
        Rule(features.classifier, "refuses", "takes a head for pooling models only", _HELPER),
        Rule(features.saved_ends, "refuses", "rejects layers stored whole", _HELPER),
        Rule(features.saved_norms, "refuses", "rejects layers stored whole", _HELPER),
        Rule(features.saved_others, "refuses", "rejects layers stored whole", _HELPER),
        Rule(features.token_rows, "refuses", "rejects trained token rows", _MODEL),
        Rule(features.resized_vocabulary, "refuses", "needs the base model's vocabulary", _MODEL),
        Rule(features.half_modules, "refuses", "needs both factors", _MODEL),
        Rule(features.empty, "refuses", "needs tensors", _MODEL),
        Rule(
            features.alpha_pattern,
            "ignores",
            "scales every module alike",
            "vllm/lora/peft_helper.py, 0.10 to 0.31",
            until="0.32",
        ),
        Rule(
            features.rank_pattern,
            "misreads",
            "scales by the configuration's one rank",
            "vllm/lora/peft_helper.py, 0.10 to 0.31",
            until="0.32",
        ),
        Rule(
            features.fused_experts,
            "ignores",
            "drops LoRAs on fused experts",
            "vLLM issue 41384",
            until="0.19.1",
        ),
    ),
    flags=_flags,
    max_rank=RANKS[-1],
)
