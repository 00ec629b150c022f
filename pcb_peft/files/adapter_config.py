"""The configuration of an adapter, ``adapter_config.json``: what each field that is read may hold."""

from collections.abc import Mapping
from typing import Any

import msgspec

from pcb_peft.errors import AdapterError
from pcb_peft.files.patterns import Patterns
from pcb_peft.files.schema import Count, Number, checked

AGAIN = "save the adapter again with PEFT"
PATTERNS = ("rank_pattern", "alpha_pattern")


class BlockDiagonal(msgspec.Struct):
    """PEFT's settings of BD-LoRA."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Count = 1


class AdapterConfig(msgspec.Struct):
    """The fields that are read, of all of PEFT's tuners; each reads some of them. PEFT explains them."""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_version: str | None = None
    auto_mapping: dict[str, Any] | None = None
    r: Count | None = 8
    lora_alpha: Number | None = 8
    alpha: Number | None = 8
    rank_pattern: dict[str, Count | list[bool]] | None = None
    alpha_pattern: dict[str, Number] | None = None
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    feedforward_modules: str | list[str] | None = None
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None
    token_indices: list[Count] | None = None
    bias: str = "none"
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    apply_GS: bool | None = None
    init_lora_weights: bool | str | None = True
    init_weights: bool | str | None = True
    use_bdlora: BlockDiagonal | bool | None = None
    kasa_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None
    velora_config: dict[str, Any] | None = None


class PipelineConfig(msgspec.Struct):
    """The fields that diffusers writes for one component of a pipeline, as far as they are read."""

    lora_alpha: Number | None = None
    alpha_pattern: dict[str, Number] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | str | None = True
    kasa_config: dict[str, Any] | None = None


def checked_config(
    config: Mapping[str, Any], where: str, schema: type[msgspec.Struct] = AdapterConfig
) -> Mapping[str, Any]:
    """Return a configuration whose fields hold what they may, and whose patterns can be looked up.

    Raises:
        AdapterError: A field holds something else; the message names it.
    """
    checked(config, schema, where, AdapterError, AGAIN)
    given = {field: config[field] for field in PATTERNS if config.get(field)}
    patterns = {f: Patterns(given[f], f"{where}: {f}", AdapterError) for f in given}
    return {**config, **patterns}
