"""Merge methods: a function from the task vectors of a scope to the merged ones, and where each is registered.

A method's keyword-only parameters are its options. One of the name `rank` is no option: the engine passes the integer
rank that the result will have, or None. A docstring has a first line that says what the method does, and paragraphs
``Good at:``, ``Measured:`` and ``Source:``.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from pcb_peft.plugins.options import RANK
from pcb_peft.plugins.registry import Plugin, Registry
from pcb_peft.plugins.renamed import renamed_keywords
from pcb_peft.tasks.task_vectors import Merged, TaskVectors

Function = TypeVar("Function", bound=Callable[..., Merged])


@dataclasses.dataclass(frozen=True, slots=True)
class MergeMethod(Plugin):
    """A merge method and what the engine has to know about it.

    Attributes:
        name: Its name in recipes and on the command line.
        function: ``function(tasks, **options) -> Merged``.
        paper: The publication, such as "arXiv:2306.01708".
        space: The default space.
        scope: The default scope: "global" or "module".
        identity_on_one: Whether a single adapter comes back unchanged, times its weight.
        arity: The number of adapters that it merges (besides one, if `identity_on_one`); None: any number.
        needs_statistic: The task statistic that it needs of every adapter, such as "gram"; None: none.
        whole_matrix: Whether it merges a module's matrix as a whole, not entry by entry.

    Example:
        >>> from pcb_peft import get_method
        >>> get_method("ties").options["density"].default
        0.2
    """

    paper: str
    space: str
    scope: str
    identity_on_one: bool = False
    arity: int | None = None
    needs_statistic: str | None = None
    whole_matrix: bool = False

    @property
    def knows_rank(self) -> bool:
        """True if it is told the rank of the result, because what it keeps depends on it."""
        return RANK in inspect.signature(self.function).parameters

    def accepts_count(self, count: int) -> bool:
        """Return whether it merges this number of adapters."""
        return self.arity in (None, count) or (count == 1 and self.identity_on_one)

    @property
    def good_at(self) -> str:
        """The ``Good at:`` paragraph of the docstring: when to choose this method; empty if there is none."""
        return self.paragraph("Good at")

    @property
    def measured(self) -> str:
        """The ``Measured:`` paragraph: scores from ``docs/methods.md``; empty if nothing was measured."""
        return self.paragraph("Measured")

    def __call__(self, tasks: TaskVectors, **options: Any) -> Merged:
        return self.function(tasks, **options)


_REGISTRY = Registry[MergeMethod]("merge method", entry_points="pcb_peft.methods")


@renamed_keywords(
    keeps_one="identity_on_one",
    takes="arity",
    data="needs_statistic",
    matrices="whole_matrix",
)
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
) -> Callable[[Function], Function]:
    """Register a function as a merge method; the function itself stays as it is.

    Args:
        name: Its name in recipes and on the command line. A name that another method has is refused.
        paper: The publication, such as "arXiv:2306.01708".
        space: The default space.
        scope: The default scope: "global" or "module".
        identity_on_one: A single adapter comes back unchanged, times its weight.
        arity: The number of adapters that it merges (besides one, if `identity_on_one`); None: any number.
        needs_statistic: The task statistic that it needs of every adapter, such as "gram"; None: none.
        whole_matrix: It merges a module's matrix as a whole, not entry by entry.

    Returns:
        A decorator for the function.

    Raises:
        OptionError: Another method has that name.

    Example:
        >>> from pcb_peft import list_methods, merge_method
        >>> @merge_method("half_sum", paper="none")
        ... def half_sum(tasks):
        ...     '''Add half of every task vector.'''
        ...     return tasks.combine(lambda x, weights: (weights * x).sum(0) / 2)
        >>> list_methods()["half_sum"].summary
        'Add half of every task vector.'
    """

    def register(function: Function) -> Function:
        method = MergeMethod(
            name=name,
            function=function,
            paper=paper,
            space=space,
            scope=scope,
            identity_on_one=identity_on_one,
            arity=arity,
            needs_statistic=needs_statistic,
            whole_matrix=whole_matrix,
        )
        _REGISTRY.add(name, method, defined_by=function)
        return function

    return register


def list_methods() -> dict[str, MergeMethod]:
    """Return all merge methods by name.

    Returns:
        Names and methods, in alphabetical order, those of other installed packages included.

    Example:
        >>> from pcb_peft import list_methods
        >>> list_methods()["linear"].paper
        'arXiv:2212.04089'
    """
    return _REGISTRY.list()


def get_method(method: str | MergeMethod) -> MergeMethod:
    """Return the method of a name; a `MergeMethod` is returned as it is.

    Args:
        method: A name from `list_methods()`, or a `MergeMethod`.

    Returns:
        The method.

    Raises:
        OptionError: There is no method of that name.

    Example:
        >>> from pcb_peft import get_method
        >>> get_method("ties").summary
        'Trim each task vector, elect a sign per entry, average those that have it.'
    """
    return method if isinstance(method, MergeMethod) else _REGISTRY.get(method)
