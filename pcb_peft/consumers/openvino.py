"""OpenVINO GenAI, which reads the tensors and no configuration."""

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule

_RUN = "run with openvino-genai 2026.4.1"
_CODE = "openvino.genai src/cpp/src/lora/adapter.cpp, 2026.4.1"

CONSUMER = Consumer(
    "openvino",
    "OpenVINO",
    "2026.4",
    ("peft",),
    (
        Rule(features.other_kind, "ignores", "reads the factors of a LoRA only", _RUN),
        Rule(features.scaling, "ignores", "takes alpha from the program, 1 by default", _RUN),
        Rule(features.rslora, "ignores", "takes alpha from the program, 1 by default", _RUN),
        Rule(features.alpha_pattern, "ignores", "takes one alpha for all modules", _RUN),
        Rule(features.dora, "ignores", "adds the factors without the magnitudes", _RUN),
        Rule(features.embedding_lora, "ignores", "reads factors of linear layers only", _RUN),
        Rule(features.saved_ends, "refuses", "crashes where they are tied", _RUN),
        Rule(features.saved_norms, "ignores", "reads factors only", _RUN),
        Rule(features.saved_others, "ignores", "reads factors only", _RUN),
        Rule(features.classifier, "ignores", "reads factors only", _RUN),
        Rule(features.token_rows, "ignores", "reads factors only", _RUN),
        Rule(features.biases, "ignores", "reads factors only", _RUN),
        Rule(features.changed_base, "misreads", "adds it to the unchanged base model", _RUN),
        Rule(features.half_modules, "refuses", "needs both factors", _CODE),
    ),
)
