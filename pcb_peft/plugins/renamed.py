"""Former names of public functions' keywords, understood for one release."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed_keywords(**new_names: str) -> Callable[[Function], Function]:
    """Let a function take some keywords by their former names, too, with a `DeprecationWarning`.

    Args:
        new_names: By former name, the name of today.

    Returns:
        A decorator for the function.

    Example:
        >>> @renamed_keywords(colour="color")
        ... def paint(*, color):
        ...     return color
        >>> paint(color="red")
        'red'
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            for former in keywords.keys() & new_names.keys():
                name = new_names[former]
                warnings.warn(
                    f"{function.__name__}({former}=...) is now called {name}=; the former name will be removed",
                    DeprecationWarning,
                    stacklevel=2,
                )
                keywords[name] = keywords.pop(former)
            return function(*args, **keywords)

        return call  # type: ignore[return-value]

    return decorate
