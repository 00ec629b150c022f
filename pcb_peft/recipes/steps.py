"""The calibrations that a recipe names, in the order in which they are applied."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.runtime.shown import quoted

Step: TypeAlias = str | Mapping[str, Mapping[str, Any] | None]
"""A calibration: its name, or {name: options}."""

StepsLike: TypeAlias = Step | Sequence[Step]
"""Calibrations as users write them: ``"svc"``, ``{"exponent": {"power": 0.5}}``, or a list of such."""

Steps: TypeAlias = tuple[Mapping[str, Mapping[str, Any]], ...]
"""Calibrations as a recipe keeps them: each as {name: options}."""


def read_steps(when: str, given: StepsLike) -> Steps:
    """Parse one calibration or several, with or without options.

    >>> read_steps("after", ["svc", {"exponent": {"power": 0.5}}])
    ({'svc': {}}, {'exponent': {'power': 0.5}})

    Raises:
        OptionError: One is neither a name nor a mapping from a name to options.
    """
    steps: Sequence[Any] = given if isinstance(given, list | tuple) else [given] if given else []
    return tuple(_step(when, step) for step in steps)


def _step(when: str, step: object) -> dict[str, dict[str, Any]]:
    entry: Any = {step: {}} if isinstance(step, str) else step
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(name, str) and isinstance(options or {}, Mapping):
            return {name: dict(options or {})}
    raise OptionError(
        f"{when}: {quoted(step)} is not a calibration; it must be a name, or {{name: {{option: value}}}}"
    )


def in_words(steps: Steps) -> str:
    """Describe steps for people: ``pico, exponent (power=0.5)``."""
    words: list[str] = []
    for name, options in (item for step in steps for item in step.items()):
        given = [f"{option}={value}" for option, value in options.items() if value is not None]
        words.append(f"{name} ({', '.join(given)})" if given else name)
    return ", ".join(words)
