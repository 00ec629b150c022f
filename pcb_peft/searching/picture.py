"""A picture of a search: scores over the trials, and the worst task against the mean. It needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from pcb_peft.errors import OptionError
from pcb_peft.runtime.plots import figure_of
from pcb_peft.searching.files import MARK, is_from_a_search
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.targets import Overwrite

Point = tuple[float, float]

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: str | Path | None) -> None:
    """Check that a picture can be drawn, before a search takes its time.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OptionError: The name of the file does not say what it is.
    """
    if path is None:
        return
    if Path(path).suffix not in SUFFIXES:
        raise OptionError(f"{path}: a picture's name must end in {', '.join(SUFFIXES)}")
    figure_of((1, 1))


def draw(
    path: str | Path,
    scores: Sequence[float],
    points: Sequence[Point],
    front: Sequence[Point],
    *,
    overwrite: Overwrite = True,
) -> None:
    """Draw two panels side by side.

    Args:
        path: The file.
        scores: The objective of each trial, in order.
        points: Mean and worst of everything that was measured.
        front: The Pareto front: those of them that no other beats in both.
        overwrite: Replace a file that exists: True, if a search drew it; "all", whatever it is.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    figure = figure_of((9, 3.6), layout="constrained")
    over_time, against = figure.subplots(1, 2)
    numbers = range(1, len(scores) + 1)
    over_time.plot(numbers, scores, "o", label="trial")
    best = [max(scores[:number]) for number in numbers]
    over_time.step(numbers, best, where="post", label="best so far")
    over_time.set(title="Score over trials", xlabel="trial", ylabel="score")
    against.plot(*_columns(points), "o", alpha=0.5, label="merge at a weight")
    against.plot(*_columns(sorted(front)), "o-", label="Pareto front")
    against.set(title="Worst task against mean", xlabel="mean kept", ylabel="worst kept")
    for axes in (over_time, against):
        axes.legend()
        axes.grid(alpha=0.3)
    path = Path(path)
    key = "Software" if path.suffix == ".png" else "Creator"
    write_file_atomically(
        path,
        lambda place: figure.savefig(place, metadata={key: MARK}),
        overwrite=overwrite,
        is_ours=is_from_a_search,
    )


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [mean for mean, _ in points], [worst for _, worst in points]
