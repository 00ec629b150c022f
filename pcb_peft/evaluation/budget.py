"""The number of texts that a budget of time or tokens allows."""

import re
import time
from collections.abc import Callable, Sequence

from pcb_peft.errors import OptionError

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
TIME = re.compile(r"([\d.]+)\s*([smh]?)")
TOKENS = re.compile(r"([\d.]+)\s*([kM]?)\s*tokens?")
SHARE = 0.8  # of the time that is planned for: the rest is for loading
ROUND = 8  # texts: the same budget gives the same texts on a machine that is a little slower
PROBED = 4  # texts of each task that are run to measure the speed


def parse_budget(budget: float | str) -> tuple[float | None, float | None]:
    """Seconds, or tokens.

    Args:
        budget: Seconds as a number, "90s", "5m", "2h", or tokens: "200000 tokens", "200k tokens".

    Raises:
        OptionError: It is neither.

    Example:
        >>> parse_budget("5m"), parse_budget("200k tokens")
        ((300.0, None), (None, 200000.0))
    """
    text = str(budget).strip()
    try:
        if found := TOKENS.fullmatch(text):
            return None, float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]]
        if found := TIME.fullmatch(text):
            return float(found[1]) * UNITS[found[2]], None
    except ValueError:
        pass
    raise OptionError(
        f"budget is {budget!r}; it must be a time such as 90s, 5m or 2h, or a number of tokens such as '200k tokens'"
    )


def texts_within(lengths: Sequence[Sequence[int]], passes: Sequence[int], tokens: float) -> int:
    """The largest number of texts per task with which all passes stay within so many tokens; at least 1.

    Args:
        lengths: Tokens of each text, by task.
        passes: How often each task is run.
        tokens: The budget.
    """
    means = [sum(task) / len(task) for task in lengths]
    longest = max(map(len, lengths))

    def cost(count: int) -> float:
        return sum(
            mean * min(count, len(task)) * n
            for mean, task, n in zip(means, lengths, passes, strict=True)
        )

    count = next((n for n in range(longest, 0, -1) if cost(n) <= tokens), 1)
    return count if count == longest or count < ROUND else count // ROUND * ROUND


def tokens_per_second(run: Callable[[], int]) -> float:
    """The speed of a run that returns how many tokens it took."""
    begin = time.perf_counter()
    tokens = run()
    return tokens / max(1e-6, time.perf_counter() - begin)
