"""A consumer, and the rules by which it reads an adapter: a table row each, with its source."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from pcb_peft.consumers.features import Feature
from pcb_peft.consumers.files import Form, OutputFiles

Effect: TypeAlias = Literal["refuses", "ignores", "misreads"]
"""It gives an error; it computes as if the feature were not there; or it computes something else.

The last two are silent.
"""

Version: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A consumer's way with one feature that it does not read as PEFT does.

    Attributes:
        feature: Finds the feature.
        effect: Kind of fault.
        words: What the consumer does, as the end of a sentence that begins with its name.
        source: Where this was read or run: file and version.
        since: First version that does so; empty for all before `until`.
        until: First version that no longer does.
        form: The form of files that has the feature.
    """

    feature: Feature
    effect: Effect
    words: str
    source: str
    since: str = ""
    until: str = ""
    form: Form = "peft"

    def applies_to(self, version: Version) -> bool:
        """Return whether a version has this rule."""
        early = bool(self.since) and version < parse_version(self.since)
        late = bool(self.until) and version >= parse_version(self.until)
        return not early and not late


def _no_flags(files: OutputFiles, version: Version) -> Sequence[str]:
    del files, version
    return ()


@dataclasses.dataclass(frozen=True, slots=True)
class Consumer:
    """A program that loads adapters or models.

    Attributes:
        name: The word for it on the command line.
        title: Its name in sentences.
        newest: The newest version that the rules were read in.
        forms: The forms that it loads.
        way: What to write for it, where it does not load a PEFT adapter.
        way_lacks: Features that this cannot hold; with them a folded model is the way.
        rules: Rules for PEFT adapters.
        flags: What its command line, or its loader, needs for an adapter.
        max_rank: The highest rank that it takes; None where there is no limit.
    """

    name: str
    title: str
    newest: str
    forms: tuple[Form, ...]
    rules: tuple[Rule, ...] = ()
    way: str = ""
    way_lacks: tuple[Feature, ...] = ()
    flags: Callable[[OutputFiles, Version], Sequence[str]] = _no_flags
    max_rank: int | None = None


def parse_version(text: str) -> Version:
    """Return the numbers of a version.

    >>> parse_version("0.32.1rc1")
    (0, 32, 1)
    """
    numbers = re.match(r"[\d.]+", text)
    return tuple(int(part) for part in numbers[0].split(".") if part) if numbers else ()
