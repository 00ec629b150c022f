"""The best common weight of a merge: all weights times s give s times the merge, so that one merge serves all."""

from collections.abc import Callable, Mapping

from pcb_peft.searching.trials import Objective

RATIO = 1.25  # from one common weight to the next
STEPS = 4  # at most so many in each direction
HOPELESS = 0.05  # so far below the best that no other common weight is tried


def climb(
    kept: Callable[[float], Mapping[str, float]],
    objective: Objective,
    begin: float,
    best: float | None,
) -> dict[float, Mapping[str, float]]:
    """Measure some common weights, from one on in both directions as long as it improves.

    Args:
        kept: Measures a common weight.
        objective: What is to improve.
        begin: The first common weight.
        best: The best value so far: where the first weight is far below, no other is tried. None: the first trial.

    Returns:
        What is kept of each task, by common weight.
    """
    found = {begin: kept(begin)}
    first = objective(found[begin])
    if best is not None and first < best - HOPELESS:
        return found
    for factor in (RATIO, 1 / RATIO):
        scale, before = begin, first
        for _ in range(STEPS):
            scale *= factor
            found[scale] = kept(scale)
            now = objective(found[scale])
            if now <= before:
                break
            before = now
        if before > first:
            break
    return found
