"""The fields of a recipe on the command line: flags, help texts, and values from words."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pcb_peft.commands.arguments import (
    DEQUANTIZE,
    FOLD_IN_16_BITS,
    in_known_case,
    parse_step,
    parse_value,
    parse_weights,
)
from pcb_peft.commands.method_options import AUTO, default_methods, flag_of, peft_aliases
from pcb_peft.commands.sources import constant, entries

SCOPES = ("auto", "global", "module")
REPLACEMENTS = "deltas/replacements.py"


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """A field of a recipe on the command line.

    Attributes:
        name: Its name in the recipe.
        help: What it means.
        parse: Its value from the words after its flag.
        metavar: The word for its value in the help; None: it is a switch.
        many: Whether it takes several words.
        names: The words that it may be, if they are few; the shell completes them.
    """

    name: str
    help: str
    parse: Callable[[Sequence[Any]], Any]
    metavar: str | None
    many: bool = False
    names: Sequence[str] = ()

    @property
    def flag(self) -> str:
        """Its flag: ``--base-model`` for ``base_model``."""
        return flag_of(self.name)


def recipe_fields() -> list[Field]:
    """The fields of a recipe that the command line can give."""
    return [
        *_merge_fields(),
        *_calibration_fields(),
        *_model_fields(),
        Field("scale", "multiply the merged adapter by this number (default: 1)", _value, "NUMBER"),
        Field("seed", "seed of random methods (default: 0)", _value, "N"),
    ]


def tied_help() -> str:
    """Help text of ``--tied``."""
    policies = constant(REPLACEMENTS, "TIES")
    return (
        "how to fold when only one of two tied matrices changed: "
        f"{', '.join(policies)} (default: {policies[0]})"
    )


def _merge_fields() -> Iterator[Field]:
    methods = [AUTO, *(method.name for method in entries("methods")), *peft_aliases()]
    spaces = ["auto", *(space.name for space in entries("spaces"))]
    first, *others = default_methods()
    words = (
        f"{', '.join(methods)} (default: auto: {first} or, for adapters or ranks that it does not suit, "
        f"{', '.join(others)})"
    )
    yield Field("method", words, _name(methods), "NAME", names=methods)
    yield Field(
        "weights",
        "one per adapter (default: 1 each): a number; [0,1], from the first layer to the last; or blocks:1,0,0.5, a "
        "number per block of an image model",
        parse_weights,
        "WEIGHT",
        many=True,
    )
    words = f"{', '.join(spaces)} (default: auto, the method's own)"
    yield Field("space", words, _name(spaces), "NAME", names=spaces)
    yield Field(
        "scope",
        "take statistics over the whole adapter (global), over each weight alone (module), or as the method does "
        "(auto, the default)",
        _name(SCOPES),
        "SCOPE",
        names=SCOPES,
    )
    yield Field(
        "rank",
        "rank of the result: a number; a fraction of the energy to keep, such as 0.95; budget:N or utility:N, a total "
        "over all modules; full: dense, for --fold (default: no truncation where the space allows it)",
        _value,
        "RANK",
    )


def _calibration_fields() -> Iterator[Field]:
    for when, what in (("before", "adapters"), ("after", "merged adapter")):
        names = [entry.name for entry in entries("calibrations") if entry.facts["when"] == when]
        yield Field(
            when,
            f"calibrate the {what}: {', '.join(names)}; with an option: exponent:power=0.5",
            lambda words: [parse_step(word) for word in words],
            "STEP",
            many=True,
        )


def _model_fields() -> Iterator[Field]:
    heads = constant(REPLACEMENTS, "POLICIES")
    yield Field(
        "base_model",
        "directory or hub id; needed to fold, and where a change depends on the weights (DoRA, PiSSA ...)",
        _text,
        "MODEL",
    )
    yield Field(
        "metric",
        "compare adapters, and set the rank, by the directions that the base model's layers see: random (measured on "
        "random tokens, once) or a .jsonl file of texts, both with --base-model; statistics (of kind gram, given with "
        "--statistics) (default: all directions count alike; random if there is a base model and no method is named)",
        _text,
        "METRIC",
    )
    yield Field("dequantize", DEQUANTIZE + FOLD_IN_16_BITS, _switch, None)
    yield Field("statistics", "files of pcb-peft collect, one per adapter", list, "FILE", many=True)
    yield Field(
        "heads",
        "what to do with heads, embeddings and token rows that several adapters replace: "
        f"{', '.join(heads)} (default: {heads[0]}, a file per adapter)",
        _name(heads),
        "POLICY",
        names=heads,
    )
    yield Field("head", "the adapter whose head the merged adapter gets", _text, "ADAPTER")
    yield Field(
        "companions",
        "whose tokenizer, chat template, generation and processor files the merged adapter gets: agree (those that all "
        "adapters have alike), none, or the name of an adapter (default: agree)",
        _text,
        "POLICY",
    )
    formats = constant("adapters/saving.py", "FORMATS")
    yield Field(
        "format",
        f"{', '.join(formats)} (default: the one that the adapters came in)",
        _name(formats),
        "FORMAT",
        names=formats,
    )
    ties = constant(REPLACEMENTS, "TIES")
    yield Field("tied", tied_help(), _name(ties), "POLICY", names=ties)
    yield Field("chain", "each adapter was trained on top of those before it", _switch, None)


def _name(known: Sequence[str]) -> Callable[[Sequence[str]], str]:
    """A parser of one of these names, in any case."""
    return lambda words: in_known_case(words[0], known)


def _value(words: Sequence[str]) -> Any:
    return parse_value(words[0])


def _text(words: Sequence[str]) -> str:
    return words[0]


def _switch(words: Sequence[Any]) -> Any:
    """True from a flag; from ``--set`` the word that stands there."""
    return parse_value(words[0]) if isinstance(words[0], str) else words[0]
