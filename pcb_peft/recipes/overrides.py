"""Overrides: what some modules of a merge do differently.

``{"modules": "*.mlp.*", "method": "ties", "options": {"density": 0.3}}`` merges the MLPs with ties.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.files.patterns import Expression
from pcb_peft.recipes.fields import a_mapping, a_name, a_truth, one_of, parse_fields, unnamed
from pcb_peft.recipes.weights import Weight, plain, read_weights
from pcb_peft.runtime.shown import quoted

Scope: TypeAlias = Literal["auto", "global", "module"]
"""Where a method's statistics are taken: over the whole adapter, in each module, or the method's own choice."""

SCOPES: tuple[Scope, ...] = ("auto", "global", "module")
REGEX, AND = "re:", "&"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A change for some modules; None, or an absent option, leaves it as the recipe has it.

    Attributes:
        modules: A glob (``*.mlp.*``), several that must all match (``*.mlp.* & *.3.*``), or a regular expression after
            ``re:``; each matches a whole module path.
        method: With another method, the recipe's options do not apply to these modules.
        space: A name from `list_spaces()`.
        scope: "global" is then over these modules.
        weights: One per adapter.
        options: Options of the method and the space.
        optional: True if it may match no module.
    """

    modules: Annotated[str, a_name]
    method: Annotated[str | None, a_name] = None
    space: Annotated[str | None, a_name] = None
    scope: Annotated[Scope | None, one_of(SCOPES)] = None
    weights: Annotated[tuple[Weight, ...] | None, unnamed(read_weights)] = None
    options: Annotated[Mapping[str, Any], a_mapping] = dataclasses.field(
        default_factory=dict[str, Any]
    )
    optional: Annotated[bool, a_truth] = False

    def matches(self, module: str) -> bool:
        """True if the override applies to a module.

        Raises:
            OptionError: The regular expression is none, or one that may take for ever.
        """
        if not self.modules.startswith(REGEX):
            globs = self.modules.split(AND)
            return all(fnmatch.fnmatchcase(module, one.strip()) for one in globs)
        return _expression(self.modules.removeprefix(REGEX)).fits(module)

    def as_dict(self) -> dict[str, Any]:
        """The override as plain data, without what it leaves as it is."""
        fields = dataclasses.asdict(self) | {"weights": self.weights and plain(self.weights)}
        return {name: value for name, value in fields.items() if value}


@functools.lru_cache
def _expression(text: str) -> Expression:
    return Expression(text, "overrides", OptionError)


OverrideLike: TypeAlias = Override | Mapping[str, Any]


def read_overrides(given: Any) -> tuple[Override, ...]:
    """Parse overrides: a list of mappings with the fields of `Override`.

    Raises:
        OptionError: They are anything else.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise OptionError(f"overrides is {quoted(given)}; it must be a list")
    return tuple(map(_override, given))


def _override(given: Any) -> Override:
    if isinstance(given, Override):
        return given
    if not isinstance(given, Mapping) or "modules" not in given:
        raise OptionError(f"overrides: {quoted(given)} must be a mapping with the key modules")
    try:
        return Override(**parse_fields(Override, given))
    except OptionError as error:
        raise OptionError(f"overrides: {error}") from error
