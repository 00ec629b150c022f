"""PEFT: versions before 0.14 refuse a configuration with a field that they do not know."""

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule, parse_version
from pcb_peft.consumers.files import OutputFiles
from pcb_peft.runtime.shown import some_of

COMMON_IN_0_11 = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save"),
    *("peft_type", "revision", "target_modules", "task_type"),
}
"""Fields that the configurations of all kinds have in PEFT 0.11.1."""
KNOWN_TO_0_11 = {
    "LORA": {
        *COMMON_IN_0_11,
        *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "layer_replication"),
        *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout"),
        *("megatron_config", "megatron_core", "r", "rank_pattern", "use_dora", "use_rslora"),
    },
    "IA3": {*COMMON_IN_0_11, "fan_in_fan_out", "feedforward_modules", "init_ia3_weights"},
}
"""Fields of PEFT 0.11.1's LoraConfig and IA3Config."""
NEWER = frozenset({"peft_version", "exclude_modules"})
"""Fields that newer versions write for kinds whose fields are not listed here."""


def _newer_fields(files: OutputFiles) -> str:
    known = KNOWN_TO_0_11.get(str(files.config.get("peft_type", "LORA")).upper())
    newer = files.config.keys() & NEWER if known is None else files.config.keys() - known
    return (
        f"fields of newer versions in the configuration ({some_of(sorted(newer))})" if newer else ""
    )


def _newer_kinds(files: OutputFiles) -> str:
    return features.fused_experts(files)


def _experts_as_they_are(files: OutputFiles) -> str:
    written = parse_version(str(files.config.get("peft_version") or "0"))
    return features.fused_experts(files) if written >= (0, 19, 1) else ""


def _old_dora(files: OutputFiles) -> str:
    return features.dora(files) if features.embedding_lora(files) or features.conv1d(files) else ""


CONSUMER = Consumer(
    "peft",
    "PEFT",
    "0.21",
    ("peft",),
    (
        Rule(
            _newer_fields,
            "refuses",
            "raises a TypeError",
            "run with 0.7.1, 0.10.0, 0.11.1, 0.13.2",
            until="0.14",
        ),
        Rule(
            _newer_kinds,
            "refuses",
            "has no target_parameters",
            "peft/tuners/lora/config.py",
            until="0.17",
        ),
        Rule(
            _experts_as_they_are,
            "misreads",
            "takes experts that are stored as (out, in) for their transposes",
            "run with 0.18.1",
            since="0.17",
            until="0.19.1",
        ),
        Rule(
            _old_dora,
            "refuses",
            "knows DoRA of linear layers only",
            "peft/tuners/lora/dora.py",
            until="0.12",
        ),
        Rule(
            features.heads_apart,
            "ignores",
            "loads none of them, and makes up a random one; choose one: pcb-peft head",
            "run with 0.21.2",
        ),
    ),
)
