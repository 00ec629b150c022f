"""LoRAX and Text Generation Inference, which share their loader."""

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule

_SOURCE = (
    "https://github.com/predibase/lorax/blob/a7394ba3/server/lorax_server/adapters/lora.py; the same in TGI, commit "
    "db931fcf (read, not run)"
)

CONSUMER = Consumer(
    "lorax",
    "LoRAX/TGI",
    "2026.5",
    ("peft", "model"),
    (
        Rule(features.other_kind, "refuses", "loads LoRAs only", _SOURCE),
        Rule(features.dora, "ignores", "does not apply magnitudes", _SOURCE),
        Rule(features.alpha_pattern, "ignores", "scales every module alike", _SOURCE),
        Rule(features.rank_pattern, "refuses", "stacks all layers of a kind at one rank", _SOURCE),
        Rule(
            features.missing_layers,
            "ignores",
            "drops a kind of module for all layers where one layer lacks it (export --dense fills them)",
            _SOURCE,
        ),
        Rule(features.changed_base, "misreads", "adds it to the unchanged base model", _SOURCE),
        Rule(features.classifier, "ignores", "reads factors only", _SOURCE),
        Rule(features.saved_ends, "ignores", "reads factors only", _SOURCE),
        Rule(features.saved_norms, "ignores", "reads factors only", _SOURCE),
        Rule(features.saved_others, "ignores", "reads factors only", _SOURCE),
        Rule(features.token_rows, "ignores", "reads factors only", _SOURCE),
        Rule(features.biases, "ignores", "reads factors only", _SOURCE),
        Rule(features.embedding_lora, "ignores", "reads factors of linear layers only", _SOURCE),
        Rule(features.foreign_names, "ignores", "looks up PEFT's exact names", _SOURCE),
    ),
)
