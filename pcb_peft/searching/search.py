"""Search for a better merge: try candidates on validation texts, and measure the winner once on test texts."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.adapters.names import named_apart
from pcb_peft.adapters.source import Source
from pcb_peft.base.model import lazy_base
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.budget import parse_budget
from pcb_peft.evaluation.cache import digest_of
from pcb_peft.evaluation.pairing import TaskData
from pcb_peft.evaluation.settings import Settings
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.recipes.recipe import Recipe, read_recipe
from pcb_peft.runtime.paths import expanded
from pcb_peft.searching.knobs import Values
from pcb_peft.searching.optimisers import AUTO, best_installed, optimiser_named
from pcb_peft.searching.picture import check_picture
from pcb_peft.searching.result import SearchResult
from pcb_peft.searching.run import Run
from pcb_peft.searching.space import SearchSpace, search_space
from pcb_peft.searching.trials import Objective, TrialLog
from pcb_peft.searching.trying import Trier
from pcb_peft.searching.validation import prepare
from pcb_peft.searching.workers import trying

Data: TypeAlias = Mapping[str, TaskData] | Sequence[TaskData] | TaskData


def search(  # noqa: PLR0913  (every choice of a search, by name)
    start: Recipe | str | Path | Sequence[str | Path | Source],
    data: Data,
    *,
    test_data: Data | None = None,
    base_model: str | Path | None = None,
    vary: Mapping[str, Values] | str | None = None,
    layers: int = 1,
    objective: str | float = "mean",
    optimiser: str = AUTO,
    trials: int = 20,
    budget: float | str | None = None,
    leave_one_out: bool = False,
    clusters: bool = False,
    log: str | Path | None = None,
    plot: str | Path | None = None,
    seed: int = 0,
    workers: int = 1,
    **settings: Any,
) -> SearchResult:
    """Search for the recipe that keeps most of all tasks.

    The first trial is the recipe that the search starts from, or the nearest one that may be tried. Each trial merges
    once, and measures that merge at several common weights, because a merge is linear in them. A search that was
    stopped goes on from its log.

    Args:
        start: A recipe or its file, or adapters.
        data: Validation texts, as `evaluate` takes them.
        test_data: Texts for the winner alone; default: one half of the texts of `data`, which the search then does not
            see.
        base_model: Path or hub id; default: what the recipe or the first adapter says.
        vary: What may change: a list of values, or (low, high), by name: "weights" (one factor per adapter), a field
            of the recipe ("method", "space", "scope", "rank", "before", "after"), an option ("density"), or that of a
            calibration ("after.exponent.power"). "all": everything that these adapters allow. Default: the weights,
            from 0.4 to 2.5. {} searches the common weight alone.
        layers: How many weights each adapter has, from the first layers to the last.
        objective: "mean" or "worst" of what is kept of the tasks, or the share of the worst in a mixture of both.
        optimiser: "random"; with the extra `search`: "ngopt" or "cma" (nevergrad), "tpe" (Optuna). "auto": "ngopt" if
            it is installed, else "random".
        trials: How many merges to try, those in the log included. Candidates that cannot be merged do not count. One,
            where nothing may change but the common weight.
        budget: The time after which no trial is begun, such as "30m"; the time of the trials in the log is part of it.
        leave_one_out: Also measure what the other tasks gain if one adapter is left out.
        clusters: Also find which adapters go together, and the fewest merges that lose no task.
        log: A file of JSON lines, to which every trial is written when it is done, and from which a search goes on.
        plot: A file for a picture of the trials; it needs matplotlib.
        seed: Of the optimiser.
        workers: Trials at a time, each in a process that holds a model of its own.
        **settings: How tasks are measured, as in `evaluate`: `limit`, `rename`, `labels`, `batch_size`, `threshold` …

    Returns:
        The winner with its score on the test texts, and all trials.

    Raises:
        OptionError: A value that is not allowed, or a log of another search.
        PcbPeftError: What `merge` and `evaluate` raise.

    Example:
        >>> found = search(["math-lora", "code-lora"], ["math.jsonl", "code.jsonl"], trials=10)
        >>> print(found)
        >>> found.save("best.yaml")
    """
    check_picture(plot)
    chosen, goal, seconds = _settings(settings), Objective.named(objective), _seconds(budget)
    recipe, adapters = _started(start, base_model, dequantize=chosen.dequantize)
    chosen = dataclasses.replace(chosen, dequantize=recipe.dequantize)
    space = search_space(vary, recipe, adapters, layers)
    trials = int(min(_at_least_one(trials), space.size))
    name, notes = _optimiser(optimiser)
    optimiser_named(name, space.knobs, seed, trials)  # before anything is measured
    validation = prepare(recipe, adapters, data, test_data, chosen)
    trier = Trier(space=space, adapters=adapters, validation=validation, objective=goal)
    make = functools.partial(_trier, recipe, space, goal, data, test_data, chosen, validation.own)
    files = [a.source and (a.source.sha256, a.source.config_sha256) for a in adapters]
    facts = [recipe.to_yaml(), files, repr(space.knobs), validation.facts, goal.worst, name, seed]
    trial_log = TrialLog(None if log is None else expanded(log), digest_of(facts), trials)
    logged, planned = trial_log.read()
    with trial_log.alone(), trying(trier, make, workers) as try_all:
        run = Run(
            trier=trier,
            optimiser=optimiser_named(name, space.knobs, seed, planned),
            log=trial_log,
            logged=logged,
            try_all=try_all,
            at_a_time=workers,
            progress=chosen.progress,
        )
        done = run.search(trials, seconds)
        result = run.result(done, chosen, without=leave_one_out, clusters=clusters, notes=notes)
    if plot is not None:
        result.plot(plot)
    return result


def _trier(
    recipe: Recipe,
    space: SearchSpace,
    objective: Objective,
    data: Data,
    test_data: Data | None,
    settings: Settings,
    own: Mapping[str, float],
) -> Trier:
    """The trier of a process of its own."""
    quiet = dataclasses.replace(settings, progress=False)
    _, adapters = _started(recipe, None, dequantize=recipe.dequantize)
    validation = prepare(recipe, adapters, data, test_data, quiet, own)
    return Trier(space=space, adapters=adapters, validation=validation, objective=objective)


def _started(
    start: Recipe | str | Path | Sequence[str | Path | Source],
    base_model: str | Path | None,
    *,
    dequantize: bool,
) -> tuple[Recipe, list[Adapter]]:
    """The recipe that the search starts from, and its adapters by different names."""
    if isinstance(start, str | Path):
        if Path(start).suffix not in (".yaml", ".yml"):
            raise OptionError(
                f"start is {str(start)!r}; it must be a recipe (.yaml) or a list of adapters: [{str(start)!r}, …]"
            )
        start = read_recipe(Path(start))
    if not isinstance(start, Recipe):
        start = Recipe.parse(adapters=list(start))
    base = base_model or start.base_model
    recipe = dataclasses.replace(
        start,
        base_model=None if base is None else str(base),
        dequantize=dequantize or start.dequantize,
    )
    opened = lazy_base(base, dequantize=recipe.dequantize)
    return recipe, named_apart(load_adapters(recipe.adapters, base_model=opened))


def _settings(given: Mapping[str, Any]) -> Settings:
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            raise OptionError(
                f"search has no option {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
    return Settings(**given)


def _optimiser(given: str) -> tuple[str, list[str]]:
    """The optimiser's name, and a note where another one would be better."""
    if given != AUTO:
        return given, []
    name = best_installed()
    note = "candidates were drawn at random; better optimisers come with pip install 'pcb-peft[search]'"
    return name, [note] if name == "random" else []


def _at_least_one(trials: int) -> int:
    if trials < 1:
        raise OptionError(f"trials is {trials}; it must be 1 or more")
    return trials


def _seconds(budget: float | str | None) -> float | None:
    if budget is None:
        return None
    seconds, _ = parse_budget(budget)
    if seconds is None:
        raise OptionError(f"budget is {budget!r}; that of a search must be a time, such as 30m")
    return seconds
