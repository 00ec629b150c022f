"""SGLang: rules of its LoRA manager."""

from collections.abc import Sequence

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule, Version
from pcb_peft.consumers.files import OutputFiles

_FOLDER = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/lora"
_LORA, _POOL = f"{_FOLDER}/lora.py (read, not run)", f"{_FOLDER}/mem_pool.py (read, not run)"


def _flags(files: OutputFiles, version: Version) -> Sequence[str]:
    del version
    flags = ["--enable-lora", f"--max-lora-rank {files.rank}"]
    if features.pattern_targets(files):
        leaves = sorted({module.rpartition(".")[2] for module in files.ranks})
        flags.append(f"--lora-target-modules {' '.join(leaves)}")
    return flags


CONSUMER = Consumer(
    "sglang",
    "SGLang",
    "0.5.23",
    ("peft", "model"),
    (
        Rule(features.other_kind, "refuses", "loads LoRAs only", _LORA),
        Rule(features.dora, "refuses", "rejects DoRA", _LORA),
        Rule(features.rslora, "misreads", "scales by alpha/r", _LORA),
        Rule(features.alpha_pattern, "ignores", "scales every module alike", _LORA),
        Rule(features.rank_pattern, "refuses", "asserts one rank", _POOL),
        Rule(features.other_rank, "refuses", "asserts the configuration's rank", _POOL),
        Rule(features.changed_base, "misreads", "adds it to the unchanged base model", _LORA),
        Rule(features.biases, "ignores", "skips tensors of no target module", _LORA),
        Rule(features.classifier, "ignores", "skips tensors of no target module", _LORA),
        Rule(features.saved_ends, "ignores", "skips tensors of no target module", _LORA),
        Rule(features.saved_norms, "ignores", "skips tensors of no target module", _LORA),
        Rule(features.saved_others, "ignores", "skips tensors of no target module", _LORA),
        Rule(features.token_rows, "ignores", "skips tensors of no target module", _LORA),
    ),
    flags=_flags,
)
