"""All surfaces: name to the function that prepares one in a directory."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from fuzz import (
    adapters,
    bases,
    command_lines,
    exports,
    images,
    merges,
    quantised,
    recipes,
    rows,
    statistics,
    texts,
)
from fuzz.cases import Attempt

SURFACES: Mapping[str, Callable[[Path], Attempt]] = {
    "adapters": adapters.prepare,
    "bases": bases.prepare,
    "quantised": quantised.prepare,
    "recipes": recipes.prepare,
    "mergekit": recipes.prepare_mergekit,
    "rows": rows.prepare,
    "statistics": statistics.prepare,
    "merges": merges.prepare,
    "images": images.prepare,
    "exports": exports.prepare,
    "command lines": command_lines.prepare,
    **{name: functools.partial(texts.prepare, name) for name in texts.TEXTS},
}
