"""Contents of an adapter that not every program can hold, each with a name for messages."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats import LazyDelta
from pcb_peft.runtime.shown import counted, some_of

Kind: TypeAlias = Literal[
    "dora", "ia3", "full", "head", "rows", "bias", "embedding", "output", "experts"
]
BECOMES_LORA: frozenset[Kind] = frozenset({"dora", "ia3", "full"})
"""Changes that a LoRA of some rank can be fitted to."""
OUTPUTS = ("lm_head", "embed_out", "output_layer")


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """A part of an adapter that not every program can hold.

    Attributes:
        kind: What it is.
        words: The same for messages, with the number or the names of the modules.
        modules: The modules that it concerns.
    """

    kind: Kind
    words: str
    modules: tuple[str, ...]


def contents_of(adapter: Adapter) -> list[Content]:
    """Return the parts of an adapter beside plain LoRAs of linear layers inside the model."""
    entries = adapter.modules.entries
    vectors = {module for module, entry in entries.items() if _is_vector(module, entry)}
    matrices = {module: entry for module, entry in entries.items() if module not in vectors}
    tests: dict[Kind, Callable[[LazyDelta], bool]] = {
        "dora": lambda entry: entry.kind.rescales,
        "ia3": lambda entry: entry.kind.multiplies,
        "full": _is_dense,
        "experts": lambda entry: entry.stacked,
    }
    words: dict[Kind, str] = {
        "dora": "DoRA",
        "ia3": "(IA)³",
        "full": "dense changes, of full rank",
        "experts": "LoRAs on stacked experts",
    }
    found = [
        _counted(kind, words[kind], [m for m, entry in matrices.items() if test(entry)])
        for kind, test in tests.items()
    ]
    found.append(_named("bias", "trained biases", vectors))
    found.append(_named("embedding", "a LoRA on embeddings", filter(_is_embedding, matrices)))
    found.append(_named("output", "a LoRA on the output layer", filter(_is_output, matrices)))
    found.append(_named("head", "layers stored whole", adapter.head.parameters))
    found.append(_named("rows", "trained token rows", adapter.head.rows))
    return [content for content in found if content.modules]


def _is_vector(module: str, entry: LazyDelta) -> bool:
    return module.endswith(".bias") or (entry.shape[1] == 1 and not entry.kind.multiplies)


def _is_dense(entry: LazyDelta) -> bool:
    return entry.kind is not LowRank and not entry.kind.rescales and not entry.kind.multiplies


def _is_embedding(module: str) -> bool:
    leaf = module.rpartition(".")[2]
    return leaf.startswith(
        ("embed_tokens", "word_embeddings", "embed_in", "wte", "wpe", "position_embeddings")
    )


def _is_output(module: str) -> bool:
    return module.rpartition(".")[2] in OUTPUTS


def _counted(kind: Kind, words: str, modules: list[str]) -> Content:
    return Content(kind, f"{words} ({counted(len(modules), 'module')})", tuple(modules))


def _named(kind: Kind, words: str, modules: Iterable[str]) -> Content:
    names = sorted(modules)
    return Content(kind, f"{words} ({some_of(names)})", tuple(names))
