import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import Workshop
from launching import Launcher
from tokenizers import Tokenizer, models, pre_tokenizers

from pcb_peft import (
    OptionError,
    Recipe,
    Source,
    UnsupportedError,
    load_adapter,
    merge,
    read_recipe,
    search,
)
from pcb_peft.adapters.adapter import Adapter
from pcb_peft.commands import cli
from pcb_peft.searching.climb import climb
from pcb_peft.searching.knobs import Choice, Interval, Knob
from pcb_peft.searching.optimisers import OPTIMISERS, optimiser_named
from pcb_peft.searching.result import GroupMerge, SearchResult
from pcb_peft.searching.space import SearchSpace, search_space
from pcb_peft.searching.together import LeftOut, losing_nothing
from pcb_peft.searching.trials import Objective, Trial, TrialLog

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz01"]
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def base(shared_workshop: Workshop) -> Path:
    directory = shared_workshop.base("llama")
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(shared_workshop: Workshop) -> list[Path]:
    return shared_workshop.adapters("llama", [LORA, LORA])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    generator, directory = random.Random(0), tmp_path_factory.mktemp("texts")
    files = [directory / "one.jsonl", directory / "two.jsonl"]
    for file in files:
        rows = [{"text": " ".join(generator.choices(WORDS[4:], k=6))} for _ in range(12)]
        file.write_text("\n".join(map(json.dumps, rows)))
    return files


def deltas(model: torch.nn.Module) -> torch.Tensor:
    """All that an adapter adds to the query projections."""
    layers = [layer for name, layer in model.named_modules() if name.endswith("q_proj")]
    changes = [
        layer.get_delta_weight("default") if hasattr(layer, "lora_A") else 0 * layer.weight
        for layer in layers
    ]
    return torch.stack([change.detach() for change in changes])


def nearness_to(adapter: Path):
    """A task at which nobody is better than the adapter itself."""
    loaded = load_adapter(adapter)
    target = torch.stack([loaded.delta(m) for m in loaded.modules if m.endswith("q_proj")])
    return lambda model: float(1 / (1 + (deltas(model) - target).norm() / target.norm()))


def recipe_of(adapters: list[Path], base: Path, **fields: Any) -> Recipe:
    sources = tuple(Source(str(adapter)) for adapter in adapters)
    return Recipe.parse(adapters=sources, base_model=str(base), **fields)


def test_the_common_weight_is_found(base: Path, adapters: list[Path]):
    """One adapter at a weight of 0.4: it comes back at 1/0.4 = 2.5 times that, in one trial."""
    recipe = recipe_of(adapters[:1], base, method="linear", weights=(0.4,))
    found = search(recipe, [nearness_to(adapters[0])], vary={}, cache=False)
    assert len(found.trials) == 1
    scale, score = found.best.best(found.objective)
    assert scale == pytest.approx(2.5, rel=0.15)
    assert score > 0.85
    again = merge(found.recipe)
    wanted = load_adapter(adapters[0])
    for module in wanted.modules:
        Workshop.assert_close(again.delta(module), 0.4 * scale * wanted.delta(module), 1e-5)


@pytest.mark.slow
def test_the_better_method_wins(base: Path, adapters: list[Path], tmp_path: Path):
    """Only linear without a calibration returns the single adapter; regmean has no data and does not count.

    There are six candidates. Each is tried once, though more trials are asked for.
    """
    recipe = recipe_of(adapters[:1], base, method="magnitude_prune", options={"density": 0.2})
    vary = {"method": ["magnitude_prune", "linear", "regmean"], "after": [None, "norm"]}
    data = [nearness_to(adapters[0])]
    found = search(recipe, data, vary=vary, trials=8, optimiser="random", seed=2, cache=False)
    assert (found.recipe.method, found.test) == ("linear", None)
    assert found.best.best(found.objective)[1] > 0.9
    assert found.trials[0].best(found.objective)[1] < 0.8
    failed = [trial for trial in found.trials if not trial.kept]
    assert failed
    assert len(found.trials) == 4 + len(failed)
    assert len({str(trial.candidate) for trial in found.trials}) == len(found.trials) == 6
    assert "all 6 recipes that --vary (vary) allows were tried" in str(found)
    assert all("statistics" in trial.error for trial in failed)
    assert "could not be merged, such as method=regmean" in str(found)
    found.save(tmp_path / "best.yaml", tmp_path / "search.png")
    assert read_recipe(tmp_path / "best.yaml") == found.recipe
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_that_can_be_merged(base: Path, adapters: list[Path]):
    recipe = recipe_of(adapters[:1], base, method="regmean")
    with pytest.raises(OptionError, match=r"2 candidates in a row could not be merged.*statistics"):
        search(recipe, [nearness_to(adapters[0])], vary={"seed": [1, 2]}, cache=False)
    with pytest.raises(OptionError, match="20 candidates in a row could not be merged"):
        search(recipe, [nearness_to(adapters[0])], vary={"weights": (1, 2)}, cache=False)


def run(base: Path, adapters: list[Path], texts: list[Path], log: Path | None, **options: Any):
    given = {"vary": {"weights": (0.5, 2.0)}, "trials": 3, "cache": False, "log": log, **options}
    return search(adapters, texts, base_model=base, **given)


@pytest.mark.slow
def test_the_winner_is_measured_on_texts_that_were_not_searched_on(
    base: Path, adapters: list[Path], texts: list[Path], tmp_path: Path
):
    file = tmp_path / "twice.jsonl"  # each text twice, in the same half
    file.write_text(texts[0].read_text() + "\n" + texts[0].read_text())
    found = run(base, adapters, [file, texts[1]], None, trials=2)
    assert found.test is not None
    assert (found.test["adapter1"].texts, found.test["adapter2"].texts) == (12, 6)
    assert "among the validation texts" not in str(found)
    assert "the other half is the test" in "".join(found.notes)
    assert "The winner keeps" in str(found)
    given = run(base, adapters, texts, None, test_data=texts, trials=1, vary={})
    assert {task.texts for task in given.test.tasks} == {12}
    assert "adapter1: 12 of 12 test texts are among the validation texts" in str(given)


@pytest.mark.parametrize(
    "optimiser",
    ["random", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ngopt", "tpe"))],
)
def test_a_search_goes_on_from_its_log(
    optimiser: str, base: Path, adapters: list[Path], tmp_path: Path
):
    """After a stop it makes the trials that it would have made: the optimiser is where it was."""
    log, data = tmp_path / "log.jsonl", [nearness_to(adapter) for adapter in adapters]

    def run(count: int, log: Path, **options: Any):
        given = {"vary": {"weights": (0.5, 2.0)}, "optimiser": optimiser, "cache": False}
        return search(adapters, data, base_model=base, trials=count, log=log, **given, **options)

    first = run(4, log)
    assert "an earlier run" not in str(first)
    whole = first.trials
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:40])  # as a kill leaves it
    second = run(4, log)
    assert f"trials of an earlier run, read from {log}: 2" in str(second)
    again = second.trials
    assert again[:2] == whole[:2]
    assert [(t.number, t.candidate, t.kept) for t in again] == [
        (t.number, t.candidate, t.kept) for t in whole
    ]
    more = run(5, log).trials
    assert more[:4] == again
    assert len(more) == 5
    for other in ({"objective": "worst"}, {"max_length": 8}, {"dtype": torch.bfloat16}):
        with pytest.raises(OptionError, match="log of another search"):
            run(4, log, **other)


class Attentive:
    """An optimiser whose proposals depend on all that it was asked and told, in order."""

    def __init__(self, knobs: Mapping[str, Knob], seed: int, trials: int) -> None:
        del seed, trials
        self._knobs, self._heard = knobs, list[float | None]()

    def ask(self) -> dict[str, Any]:
        generator = random.Random(repr(self._heard))
        self._heard.append(None)
        return {name: knob.draw(generator) for name, knob in self._knobs.items()}

    def tell(self, candidate: Mapping[str, Any], score: float) -> None:
        del candidate
        self._heard.append(score)


def test_a_search_of_several_trials_at_a_time_goes_on_within_a_round(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The candidates that were asked for together are told together, though a stop came in between."""

    @contextlib.contextmanager
    def in_this_process(here, there, workers):
        del there, workers
        yield lambda proposals: map(here, proposals)

    monkeypatch.setattr("pcb_peft.searching.search.trying", in_this_process)
    monkeypatch.setitem(OPTIMISERS, "random", Attentive)
    log, data = tmp_path / "log.jsonl", [nearness_to(adapter) for adapter in adapters]
    given: dict[str, Any] = {"vary": {"weights": (0.5, 2.0)}, "optimiser": "random"}

    def run() -> list[Any]:
        options = {"trials": 4, "workers": 2, "log": log, "cache": False, **given}
        found = search(adapters, data, base_model=base, **options)
        return [(trial.number, trial.candidate, trial.kept) for trial in found.trials]

    whole = run()  # the recipe, two at a time, and one
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]))
    assert run() == whole


@pytest.mark.slow
def test_a_killed_search_goes_on(
    launch: Launcher, base: Path, adapters: list[Path], texts: list[Path], tmp_path: Path
):
    log = tmp_path / "log"
    words = ["search", *adapters, "--data", *texts, "--base-model", base, "--no-cache"]
    words += ["--log", log, "-o", tmp_path / "best.yaml", "--trials"]
    code = (
        "import os; from pcb_peft.commands import cli; from pcb_peft.searching.trials import TrialLog\n"
        "append = TrialLog.append\n"
        "def killed(log, trial):\n"
        "    append(log, trial)\n"
        f"    if trial.number == 1: os.kill(os.getpid(), {signal.SIGKILL:d})\n"
        "TrialLog.append = killed; cli.main()"
    )
    assert launch(1, ["-c", code, *words, 200]).codes == [-signal.SIGKILL]
    before = [json.loads(line) for line in log.read_text().splitlines()]
    (code,), _, errors = launch(1, ["-m", "pcb_peft", *words, 3])
    assert code == 0, errors
    after = [json.loads(line) for line in log.read_text().splitlines()]
    assert after[1:3] == before[1:]
    assert [trial["number"] for trial in after[1:]] == [0, 1, 2]
    assert read_recipe(tmp_path / "best.yaml").method == "flat"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sessions of processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_search(
    base: Path, adapters: list[Path], tmp_path: Path, number: int
):
    """Their own trial, which would take an hour, is given up."""
    task = (
        "def slow(model):\n    import time\n    open('begun', 'a').close()\n    time.sleep(3600)\n"
    )
    (tmp_path / "tasks.py").write_text(task)
    code = (
        "import sys; from tasks import slow; from pcb_peft import search\n"
        "from pcb_peft.runtime.processes import stoppable\n"
        "if __name__ == '__main__':\n"
        "    with stoppable():\n"
        "        search(sys.argv[2:], [slow, slow], base_model=sys.argv[1], workers=2, cache=False)\n"
    )
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "script.py", *map(str, (base, *adapters))]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "begun").exists():
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(20) in (128 + number, -number)
        while process_group_lives(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "Traceback" not in (tmp_path / "said").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def process_group_lives(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_trials_in_several_processes(base: Path, adapters: list[Path], texts: list[Path]):
    alone = run(base, adapters, texts, None, optimiser="random")
    found = run(base, adapters, texts, None, optimiser="random", workers=2)
    assert [t.candidate for t in found.trials] == [t.candidate for t in alone.trials]
    assert found.trials[:2] == tuple(
        dataclasses.replace(trial, seconds=other.seconds)
        for trial, other in zip(alone.trials[:2], found.trials, strict=False)
    )
    with pytest.raises(OptionError, match="cannot be sent to another process"):
        search(adapters[:1], [lambda _: 1.0], base_model=base, workers=2, cache=False)


def test_leaving_one_out(base: Path, adapters: list[Path]):
    """Without the other adapter, the merge is the adapter itself, and keeps all of its task."""
    recipe = recipe_of(adapters, base, method="linear")
    data = [nearness_to(adapter) for adapter in adapters]
    found = search(recipe, data, vary={}, trials=1, leave_one_out=True, cache=False)
    assert [one.name for one in found.left_out] == ["adapter1", "adapter2"]
    for one in found.left_out:
        assert one.kept < 0.9
        assert one.kept_without > 0.9
    assert "without adapter2 the others gain" in str(found)
    some = search(recipe, {"adapter1": data[0]}, vary={}, trials=1, cache=False)
    assert "no data for adapter2: the search does not mind if their tasks are lost" in str(some)
    assert str(LeftOut("c", 0.801, 0.805)).startswith("without c the others gain nothing:")
    assert str(LeftOut("c", 0.80, 0.75)).startswith("without c the others lose 5.0 points:")


@pytest.mark.slow
def test_adapters_that_go_together(base: Path, adapters: list[Path], tmp_path: Path):
    """x and 1.1 x go together; −x does not go with them."""
    x = load_adapter(adapters[0])
    opposed, alike = tmp_path / "opposed", tmp_path / "alike"
    x.scaled(-1).save_pretrained(opposed)
    x.scaled(1.1).save_pretrained(alike)
    members = [adapters[0], opposed, alike]
    recipe, log = recipe_of(members, base, method="linear"), tmp_path / "log"
    data = [nearness_to(adapter) for adapter in members]
    options: dict[str, Any] = {"vary": {}, "trials": 1, "clusters": True, "cache": False}
    found = search(recipe, data, log=log, **options)
    assert [len(one.groups) for one in found.groupings] == [1, 2, 3]
    assert {frozenset(group) for group in found.groupings[1].groups} == {
        frozenset({"adapter1", "alike"}),
        frozenset({"opposed"}),
    }
    assert min(found.groupings[0].kept.values()) < 0.6
    alone, pair = sorted(found.merges, key=lambda merge: len(merge.members))
    assert (alone.members, alone.recipe) == (("opposed",), None)
    assert "2 merges are the fewest that lose no task; use opposed alone" in str(found)
    files = found.save(tmp_path / "best.yaml")
    assert [file.name for file in files] == ["best.yaml", "best-1.yaml"]
    again = merge(read_recipe(files[1]))
    assert [source.name for source in again.recipe.adapters] == ["adapter1", "alike"]
    assert again.recipe.scale == pair.recipe.scale
    lines = log.read_text()
    assert search(recipe, data, log=log, **options).groupings == found.groupings
    assert log.read_text() == lines  # nothing was merged again


def test_a_merge_that_loses_no_task_need_not_be_the_winner(tmp_path: Path):
    def trial(number: int, kept: Mapping[float, tuple[float, float]]) -> Trial:
        tasks = {scale: {"a": a, "b": b} for scale, (a, b) in kept.items()}
        return Trial(number=number, candidate={}, members=("a", "b"), kept=tasks)

    mean = Objective.named("mean")
    winner = trial(0, {1.0: (1.2, 0.7), 1.25: (0.8, 0.8)})
    safe = trial(1, {1.0: (0.9, 0.75), 1.25: (0.9, 0.85)})
    assert losing_nothing([winner, safe], mean, 0.8) == (safe, 1.25)
    assert losing_nothing([winner], mean, 0.8) == (winner, 1.25)
    assert losing_nothing([winner, safe], mean, 0.9) is None
    one, other = (Recipe.parse(adapters=["a", "b"], scale=scale) for scale in (1.0, 1.25))
    found = SearchResult(
        recipe=one,
        best=winner,
        trials=(winner, safe),
        objective=mean,
        merges=(GroupMerge(members=("a", "b"), recipe=other),),
    )
    assert "one merge loses no task, and it is not the winner" in str(found)
    files = found.save(tmp_path / "best.yaml")
    assert [read_recipe(file).scale for file in files] == [1.0, 1.25]


KNOBS: dict[str, Knob] = {
    "a": Interval(0.1, 10.0),
    "b": Interval(-1.0, 1.0),
    "c": Choice(("x", None, 3, [{"svc": {}}])),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_proposes_what_is_allowed_and_learns(name: str):
    def score(candidate: Mapping[str, Any]) -> float:
        return -((candidate["a"] - 2) ** 2) - (candidate["b"] - 0.5) ** 2 - (candidate["c"] != 3)

    optimiser = optimiser_named(name, KNOBS, seed=0, trials=60)
    optimiser.tell({"a": 1.0, "b": 0.0, "c": None}, -2.0)  # that it did not ask for
    scores = []
    for _ in range(30):
        two = [optimiser.ask(), optimiser.ask()]
        for candidate in two:
            assert candidate.keys() == KNOBS.keys()
            assert 0.1 <= candidate["a"] <= 10
            assert -1 <= candidate["b"] <= 1
            assert candidate["c"] in KNOBS["c"].values
            scores.append(score(candidate))
            optimiser.tell(json.loads(json.dumps(candidate)), scores[-1])
    assert max(scores) > -2
    if name != "random":
        assert sum(scores[30:]) / 30 > sum(scores[:30]) / 30


def test_packages_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, base: Path, adapters: list[Path]
):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(OptionError, match=r"pip install 'pcb-peft\[search\]'"):
        optimiser_named("cma", KNOBS, seed=0, trials=1)
    with pytest.raises(OptionError, match="optimiser is 'sgd'"):
        optimiser_named("sgd", KNOBS, seed=0, trials=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"need matplotlib.*pcb-peft.plots"):
        search(adapters, [], base_model=base, plot="search.png")
    with pytest.raises(OptionError, match="trials is 0; it must be 1 or more"):
        search(adapters, [], base_model=base, trials=0)
    with pytest.raises(OptionError, match=r"must end in .png"):
        search(adapters, [], base_model=base, plot="search.jpeg2000")


RECIPE = Recipe.parse(
    adapters=(Source("a"), Source("b")), method="pcb", weights=(1, 2), options={"density": 0.3}
)


def space_of(vary: Any, recipe: Recipe = RECIPE, **options: Any) -> SearchSpace:
    return search_space(vary, recipe, [Adapter(name=name, modules={}) for name in "ab"], **options)


def test_knobs_and_the_recipe_they_make():
    space = space_of({"weights": (0.5, 3), "density": (0.1, 0.5), "method": ["pcb", "linear"]})
    start = space.start()
    assert start == {"weights[a]": 1, "weights[b]": 2, "density": 0.3, "method": "pcb"}
    assert space.recipe_of(start) == RECIPE
    other = space.recipe_of({**start, "weights[b]": 0.5, "method": "linear"}, scale=2)
    assert (other.method, other.weights, other.scale, other.options) == ("linear", (1, 0.5), 2, {})
    alone = space.recipe_of(start, members=["b"])
    assert (alone.adapters, alone.weights) == ((Source("b"),), (2,))


def test_weights_by_layer():
    recipe = RECIPE.changed(weights=[1, [0.5, 1.5, 3]])
    space = space_of({"weights": (0.5, 2.5)}, recipe, layers=2)
    start = space.start()
    names = ["weights[a][1]", "weights[a][2]", "weights[b][1]", "weights[b][2]"]
    assert start == dict(zip(names, [1, 1, 0.5, 2.5], strict=True))
    assert space.recipe_of(start).weights == ((1, 1), (0.5, 2.5))


def test_calibrations_with_their_options():
    recipe = RECIPE.changed(after="svc")
    vary = {"after": [None, "svc", ["exponent", "norm"]], "after.exponent.power": (0.0, 1.0)}
    space = space_of(vary, recipe)
    start = space.start()
    assert start == {"after": [{"svc": {}}], "after.exponent.power": 0.5}
    assert space.recipe_of(start) == recipe
    other = space.recipe_of({**start, "after": [{"exponent": {}}, {"norm": {}}]})
    assert other.after == ({"exponent": {"power": 0.5}}, {"norm": {}})


def test_everything_that_these_adapters_allow(adapters: list[Path]):
    loaded = [load_adapter(adapter) for adapter in adapters]
    space = search_space("all", recipe_of(adapters, Path("base")), loaded)
    assert {"weights[adapter1]", "method", "space", "density", "before", "after"} <= {*space.knobs}
    assert "regmean" not in space.knobs["method"].values
    assert "dense" not in space.knobs["space"].values
    assert space.recipe_of(space.start()).method == "flat"


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"densty": [1]}, "did you mean 'density'"),
        ({"density": (0.5, 0.1)}, "smaller"),
        ({"density": []}, "list of values"),
        ({"density": "0.1"}, "list of values"),
        ({"after": ["svd"]}, "svc"),
        ({"after.exponent.power": (0, 1)}, "neither a field"),
        ("everything", "it must be 'all'"),
    ],
)
def test_knobs_that_are_none(vary: Any, message: str):
    with pytest.raises(OptionError, match=message):
        space_of(vary)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_searches_do_not_write_one_log(base: Path, adapters: list[Path], tmp_path: Path):
    log, data = tmp_path / "log.jsonl", [nearness_to(adapter) for adapter in adapters]
    refused = []

    def run(data: Any) -> int:
        return len(search(adapters, data, base_model=base, log=log, trials=2, cache=False).trials)

    def searching_too(model: Any) -> float:
        if log.exists():
            with pytest.raises(OptionError, match="log of a search that is running; wait"):
                run(data)
            refused.append(log)
        return data[0](model)

    assert run([searching_too, data[1]]) == 2
    assert refused
    assert run(data) == 2  # and goes on from it afterwards


def test_objectives():
    kept = {"a": 0.5, "b": 1.0}
    assert Objective.named("mean")(kept) == 0.75
    assert Objective.named("worst")(kept) == 0.5
    assert Objective.named(0.5)(kept) == Objective.named("0.5")(kept) == 0.625
    for wrong in ("best", 2, -0.1):
        with pytest.raises(OptionError, match="objective is"):
            Objective.named(wrong)


def test_climbing_stops_where_it_gets_worse_and_gives_up_what_is_hopeless():
    tried: list[float] = []

    def kept(scale: float) -> dict[str, float]:
        tried.append(scale)
        return {"a": 1 - (scale - 1.5) ** 2}

    found = climb(kept, Objective(0), 1.0, None)
    assert max(found, key=lambda s: found[s]["a"]) == pytest.approx(1.5625)
    assert tried == pytest.approx([1, 1.25, 1.5625, 1.953125])
    assert list(climb(kept, Objective(0), 1.0, 0.9)) == [1.0]


@pytest.mark.parametrize("left", [0, 1, 20, 60])
def test_whatever_a_kill_leaves_of_the_last_line_is_dropped(tmp_path: Path, left: int):
    trial = Trial(number=0, candidate={"density": 0.1}, members=("a",), kept={1.5: {"a": 0.7}})
    log = TrialLog(tmp_path / "log", "this search", 7)
    assert log.read() == ([], 7)
    log.append(trial)
    whole = (tmp_path / "log").read_bytes()
    with (tmp_path / "log").open("ab") as stream:
        stream.write(trial.to_json().encode()[:left])
    assert log.read() == ([trial], 7)
    log.append(trial)
    assert dataclasses.replace(log, planned=9).read() == ([trial, trial], 7)
    assert (tmp_path / "log").read_bytes().startswith(whole)


def test_the_command(
    base: Path,
    adapters: list[Path],
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    words = ["search", *map(str, adapters), "--data", *map(str, texts), "--base-model", str(base)]
    words += ["--trials", "2", "--no-cache", "--plot", "plot.svg"]
    words += ["--vary", "density=0.1..0.5", "method=pcb,ties", "after=none,exponent:power=0.9+norm"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "the winning recipe is in best.yaml" in out
    assert read_recipe(tmp_path / "best.yaml").method in ("pcb", "ties")
    assert {path.name for path in tmp_path.iterdir()} == {"best.yaml", "plot.svg", "search.jsonl"}
    assert cli.main([*words, "--vary", "density"]) == 64
    assert "is not NAME=VALUES" in capsys.readouterr().err
