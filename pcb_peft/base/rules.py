"""Transformers' own rules that lead from the names and tensors of files to those in memory."""

import dataclasses
from typing import Any


def conversion_rules(model: Any) -> tuple[Any, ...]:
    """Return the rules for a model: first all that rename, then all that compute."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return (_RenamingOfVersion4(model),)
    conversions = get_model_conversion_mapping(model)
    return tuple(sorted(conversions, key=lambda conversion: hasattr(conversion, "operations")))


@dataclasses.dataclass(frozen=True, slots=True)
class _RenamingOfVersion4:
    """The names that transformers 4 gives the parameters of a file, asked for as transformers 5 is asked."""

    model: Any

    def rename_source_key(self, name: str) -> tuple[str, None]:
        mapping = getattr(type(self.model), "_checkpoint_conversion_mapping", None)
        if not mapping:
            return name, None
        return self.model._get_key_renaming_mapping([name], mapping)[name], None


def stacks_experts(conversion: Any) -> bool:
    """Return whether a computation stacks matrices, each of them made of several on top of each other or of one."""
    if not hasattr(conversion, "operations"):
        return False
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in conversion.operations]
    merge, join = ("MergeModulelist", 0), ("Concatenate", 1)
    return steps == ([merge, join] if len(conversion.source_patterns) > 1 else [merge])
