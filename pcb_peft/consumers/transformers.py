"""transformers: ``model.load_adapter`` and ``AutoModel…from_pretrained(adapter)``."""

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule

CONSUMER = Consumer(
    "transformers",
    "transformers",
    "5.23",
    ("peft", "model"),
    (
        Rule(
            features.dora,
            "ignores",
            "drops the magnitudes in load_adapter (PeftModel.from_pretrained keeps them)",
            "run with 5.23.0 and PEFT 0.21.2",
        ),
        Rule(
            features.heads_apart,
            "ignores",
            "loads none of them, and makes up a random one; choose one: pcb-peft head",
            "run with 5.23.0 and PEFT 0.21.2",
        ),
        Rule(
            features.heads_apart,
            "ignores",
            "makes up a random one for a classifier; load one after from_pretrained",
            "run with 5.23.0",
            form="model",
        ),
        Rule(
            features.fused_experts,
            "ignores",
            "has most experts one by one (not of Llama 4, GPT-OSS, Qwen3-VL), and PEFT drops these",
            "run with 4.57.6 and PEFT 0.18.1",
            until="5",
        ),
        Rule(
            features.single_experts_beside_others,
            "misreads",
            "mistakes other layers for experts; save the adapter again with pcb_peft, beside transformers 5",
            "run with 5.23.0 and PEFT 0.21.2",
            since="5",
        ),
    ),
)
