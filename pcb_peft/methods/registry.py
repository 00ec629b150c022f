"""What a merge method is, and the shelf on which they stand.

A method is a function from the task vectors of a scope to the merged ones. Its keyword-only parameters are its options.
Its docstring says what it does (first line), and, after ``Good at:`` and ``Measured:``, what for and on what evidence.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import Option, did_you_mean, options_of
from pcb_peft.tasks.task_vectors import Merged, TaskVectors

_REGISTRY: dict[str, "MergeMethod"] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class MergeMethod:
    """A merge method and what the engine has to know of it.

    Attributes:
        name: As recipes and the command line call it.
        function: ``function(tasks, **options) -> Merged``.
        paper: Where it was published.
        space: The space it works in unless the caller says otherwise.
        scope: The scope likewise: "global" or "module".
        keeps_one: A single adapter comes back as it is, times its weight.
        takes: How many adapters it merges, apart from one that it keeps; None: any number.
        data: What it has to know of each module beside the adapters, by the name of the statistic; None: nothing.
        matrices: It merges the matrix of a module as a whole, not entry by entry.
    """

    name: str
    function: Callable[..., Merged]
    paper: str
    space: str
    scope: str
    identity_on_one: bool = False
    arity: int | None = None
    needs_statistic: str | None = None
    whole_matrix: bool = False

    def accepts_count(self, count: int) -> bool:
        """Whether it merges so many adapters."""
        return self.arity in (None, count) or (count == 1 and self.identity_on_one)

    @property
    def options(self) -> dict[str, Option]:
        return options_of(self.function)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def good_at(self) -> str:
        """What one would take it for; empty where its docstring does not say so."""
        return self._paragraph("Good at")

    @property
    def measured(self) -> str:
        """What it keeps of the tasks in ``docs/methods.md``; empty where nothing was measured."""
        return self._paragraph("Measured")

    def _paragraph(self, heading: str) -> str:
        found = re.search(
            rf"^{heading}: (.+(?:\n.+)*)", inspect.getdoc(self.function) or "", re.MULTILINE
        )
        return " ".join(found[1].split()) if found else ""

    def __call__(self, tasks: TaskVectors, **options: Any) -> Merged:
        return self.function(tasks, **options)


def merge_method(
    name: str,
    *,
    paper: str,
    space: str = "core",
    scope: str = "global",
    identity_on_one: bool = False,
    arity: int | None = None,
    needs_statistic: str | None = None,
    whole_matrix: bool = False,
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Puts a function on the shelf; the function itself stays as it is. The arguments are `MergeMethod`'s."""

    def register(function: Callable[..., Merged]) -> Callable[..., Merged]:
        _REGISTRY[name] = MergeMethod(
            name,
            function,
            paper,
            space,
            scope,
            identity_on_one,
            arity,
            needs_statistic,
            whole_matrix,
        )
        return function

    return register


def list_methods() -> dict[str, MergeMethod]:
    """All merge methods, by name."""
    return dict(sorted(_REGISTRY.items()))


def get_method(method: str | MergeMethod) -> MergeMethod:
    """The method of that name.

    Raises:
        OptionError: There is none.
    """
    if isinstance(method, MergeMethod):
        return method
    if method not in _REGISTRY:
        known = ", ".join(list_methods())
        raise OptionError(
            f"no merge method {method!r}{did_you_mean(method, _REGISTRY)}; there are {known}"
        )
    return _REGISTRY[method]
