"""Optimisers, which propose the next candidate: random numbers, nevergrad (NGOpt, CMA-ES), or Optuna (TPE).

Each is asked for a candidate, and told how it did. A search that goes on asks for the candidates of its log again, and
tells again how they did: the optimiser is then where it was.
"""

import importlib
import importlib.util
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pcb_peft.errors import OptionError
from pcb_peft.searching.knobs import Candidate, Choice, Knob


class Optimiser(Protocol):
    """Proposes candidates."""

    def ask(self) -> Candidate:
        """Return the next candidate to try. Several may be asked for before one is told."""
        ...

    def tell(self, candidate: Candidate, score: float) -> None:
        """Learn how a candidate did: the higher, the better. It may be one that was not asked for."""
        ...


class RandomSearch:
    """Independent random candidates."""

    def __init__(self, knobs: Mapping[str, Knob], seed: int, trials: int) -> None:
        self._knobs, self._generator = knobs, random.Random(seed)
        del trials

    def ask(self) -> Candidate:
        """Return a random candidate."""
        return {name: knob.draw(self._generator) for name, knob in self._knobs.items()}

    def tell(self, candidate: Candidate, score: float) -> None:
        """Learn nothing."""
        del candidate, score


class Nevergrad:
    """An optimiser of nevergrad.

    Source: Rapin, Teytaud 2018, Nevergrad; CMA-ES: Hansen, Ostermeier 2001.
    """

    def __init__(self, name: str, knobs: Mapping[str, Knob], seed: int, trials: int) -> None:
        ng, _ = imported("nevergrad"), imported("cma")
        self._parameters = ng.p.Dict(
            **{key: _nevergrad_parameter(ng, knob) for key, knob in knobs.items()}
        )
        self._parameters.random_state.seed(seed)
        # Two workers, because some optimisers for one never return if they are told what they have not asked for.
        self._optimizer = ng.optimizers.registry[name](
            parametrization=self._parameters, budget=max(1, trials), num_workers=2
        )
        self._asked: list[Any] = []

    def ask(self) -> Candidate:
        """Return the library's next candidate."""
        with warnings.catch_warnings():  # that an optimiser is not made for so few trials
            warnings.simplefilter("ignore")
            self._asked.append(self._optimizer.ask())
        return _plain(self._asked[-1].value)

    def tell(self, candidate: Candidate, score: float) -> None:
        """Hand the score on; the library wants losses."""
        found = [asked for asked in self._asked if _plain(asked.value) == candidate]
        self._asked = [asked for asked in self._asked if asked not in found[:1]]
        told = found[0] if found else self._parameters.spawn_child(new_value=candidate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._optimizer.tell(told, -score)


class OptunaTpe:
    """The tree-structured Parzen estimator of Optuna.

    Source: Bergstra, Bardenet, Bengio, Kégl 2011, Algorithms for hyper-parameter optimization.
    """

    def __init__(self, knobs: Mapping[str, Knob], seed: int, trials: int) -> None:
        del trials
        self._optuna = imported("optuna")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._knobs = knobs
        self._distributions = {
            name: _optuna_distribution(self._optuna, knob) for name, knob in knobs.items()
        }
        sampler = self._optuna.samplers.TPESampler(seed=seed)
        self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: list[tuple[Candidate, Any]] = []

    def ask(self) -> Candidate:
        """Return the library's next candidate."""
        trial = self._study.ask(self._distributions)
        candidate = {name: self._value(name, value) for name, value in trial.params.items()}
        self._asked.append((candidate, trial))
        return candidate

    def tell(self, candidate: Candidate, score: float) -> None:
        """Hand the score on."""
        found = [pair for pair in self._asked if pair[0] == candidate][:1]
        self._asked = [pair for pair in self._asked if pair not in found]
        if found:
            self._study.tell(found[0][1], score)
            return
        params = {name: self._place(name, value) for name, value in candidate.items()}
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=params, distributions=self._distributions, value=score
            )
        )

    def _value(self, name: str, drawn: Any) -> Any:
        knob = self._knobs[name]
        return knob.values[drawn] if isinstance(knob, Choice) else drawn

    def _place(self, name: str, value: Any) -> Any:
        """The place of a choice: the library wants plain values."""
        knob = self._knobs[name]
        return knob.values.index(value) if isinstance(knob, Choice) else value


OPTIMISERS: dict[str, Callable[[Mapping[str, Knob], int, int], Optimiser]] = {
    "random": RandomSearch,
    "ngopt": lambda knobs, seed, trials: Nevergrad("NGOpt", knobs, seed, trials),
    "cma": lambda knobs, seed, trials: Nevergrad("CMA", knobs, seed, trials),
    "tpe": OptunaTpe,
}
"""The optimisers, by the name that users give."""

AUTO = "auto"


def best_installed() -> str:
    """Return the name of the best optimiser whose package is installed."""
    packages = ("nevergrad", "cma")
    return "ngopt" if all(map(importlib.util.find_spec, packages)) else "random"


def optimiser_named(name: str, knobs: Mapping[str, Knob], seed: int, trials: int) -> Optimiser:
    """Make an optimiser.

    Raises:
        OptionError: There is none of that name, or its package is not installed.
    """
    if not knobs:
        return RandomSearch(knobs, seed, trials)
    if name not in OPTIMISERS:
        raise OptionError(f"optimiser is {name!r}; it must be one of {', '.join(OPTIMISERS)}")
    return OPTIMISERS[name](knobs, seed, trials)


def imported(package: str) -> Any:
    """Import a package of the extra `search`.

    Raises:
        OptionError: It is not installed.
    """
    with warnings.catch_warnings():  # about plots and extras that are not asked for
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(package)
        except ImportError as error:
            raise OptionError(
                f"this optimiser needs another package ({error}): pip install 'pcb-peft[search]', or take "
                "optimiser='random' (--optimiser random)"
            ) from error


def _plain(values: Mapping[str, Any]) -> Candidate:
    """A candidate as the log keeps it: numbers as Python's."""
    return {k: float(v) if isinstance(v, float) else v for k, v in values.items()}


def _nevergrad_parameter(ng: Any, knob: Knob) -> Any:
    if isinstance(knob, Choice):
        return ng.p.Choice(list(knob.values))
    if knob.logarithmic:
        return ng.p.Log(lower=knob.low, upper=knob.high)
    return ng.p.Scalar(lower=knob.low, upper=knob.high)


def _optuna_distribution(optuna: Any, knob: Knob) -> Any:
    if isinstance(knob, Choice):
        return optuna.distributions.CategoricalDistribution(list(range(len(knob.values))))
    return optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.logarithmic)
