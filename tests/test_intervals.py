import math

import pytest

from pcb_peft.errors import OptionError
from pcb_peft.evaluation.budget import parse_budget, texts_within
from pcb_peft.evaluation.intervals import mean_interval, paired_p_value, wilson_interval
from pcb_peft.evaluation.scores import Score, TaskScores, worst_first


@pytest.fixture(scope="module", name="stats")
def _stats():
    import scipy.stats

    return scipy.stats


@pytest.mark.parametrize(("correct", "count"), [(0, 7), (39, 100), (100, 100), (1, 1), (613, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_is_that_of_scipy(stats, correct: int, count: int, confidence: float):
    wanted = stats.binomtest(correct, count).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, count, confidence) == pytest.approx(tuple(wanted), abs=1e-9)


def test_the_interval_of_a_mean_is_that_of_scipy(stats):
    values = [0.3, 1.2, 2.0, 0.1, 5.0]
    wanted = stats.norm.interval(0.95, loc=sum(values) / 5, scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(wanted)
    assert mean_interval([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("better", "worse", "equal"), [(5, 0, 3), (7, 2, 10), (3, 3, 1), (20, 41, 9)]
)
def test_the_test_of_paired_answers_is_the_sign_test(stats, better: int, worse: int, equal: int):
    first = [1.0] * better + [0.0] * worse + [1.0] * equal
    second = [0.0] * better + [1.0] * worse + [1.0] * equal
    wanted = stats.binomtest(better, better + worse, 0.5).pvalue
    assert paired_p_value(first, second) == pytest.approx(wanted)


def test_the_test_of_paired_losses_is_near_the_paired_t_test(stats):
    first = [0.1 * (i % 7) + 0.5 for i in range(200)]
    second = [0.1 * (i % 5) + 0.55 for i in range(200)]
    wanted = stats.ttest_rel(first, second).pvalue
    assert paired_p_value(first, second) == pytest.approx(wanted, rel=0.1)


def task(name: str, base: int, own: int | None, merged: int, **options: float) -> TaskScores:
    """So many of 100 texts right; those that a better model gets right include those of a worse one."""

    def score(right: int) -> Score:
        return Score.of([1.0] * right + [0.0] * (100 - right), losses=False)

    adapter = None if own is None else score(own)
    return TaskScores(
        name=name,
        metric="accuracy",
        texts=100,
        base=score(base),
        adapter=adapter,
        merged=score(merged),
        **options,
    )


def test_verdicts():
    lost = task("nli", 37, 55, 39)
    assert lost.lost
    assert lost.verdict == "LOST: keeps 71%, less than 80%"
    assert lost.kept == pytest.approx(39 / 55)
    assert lost.gain_kept == pytest.approx(2 / 18)
    no_better = task("spam", 86, 98, 87)
    assert no_better.verdict == "LOST: not clearly better than the base"
    assert task("mr", 60, 82, 81).verdict == "kept"
    assert task("mr", 40, 90, 75).verdict == "kept in part"
    assert "unclear" in task("mr", 60, 61, 61).verdict
    assert task("other", 50, None, 70).verdict == "better than the base"
    assert task("other", 50, None, 20).verdict == "worse than the base"
    assert task("other", 50, None, 51).verdict == "level with the base"
    assert not task("nli", 37, 55, 39, threshold=0.5).kept < 0.5


def test_a_task_that_keeps_its_gain_is_not_lost_because_few_texts_prove_it():
    """The base has 78, the adapter 82: too few texts to tell, and the merge is half way."""
    assert not task("mr", 78, 84, 82).lost


def test_the_lost_come_first():
    tasks = [task("good", 30, 80, 80), task("none", 30, None, 30), task("spam", 86, 98, 87)]
    assert [one.name for one in worst_first(tasks)] == ["spam", "good", "none"]


def test_scores_of_losses_are_inverse_perplexities():
    score = Score.of([1.0, 2.0, 3.0], losses=True)
    assert score.value == pytest.approx(1 / math.exp(2.0))
    row = TaskScores(name="a", metric="1/perplexity", texts=3, base=score, merged=score)
    low, high = row.interval(score) or (0, 0)
    assert low < score.value < high


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (90, (90, None)),
        ("90s", (90, None)),
        ("5m", (300, None)),
        ("2h", (7200, None)),
        ("200k tokens", (None, 200000)),
        ("7 tokens", (None, 7)),
    ],
)
def test_budgets(budget: float | str, wanted: tuple[float | None, float | None]):
    assert parse_budget(budget) == wanted


@pytest.mark.parametrize("budget", ["soon", "5 days", "-3", ""])
def test_a_budget_that_is_none_is_refused(budget: str):
    with pytest.raises(OptionError, match="budget is"):
        parse_budget(budget)


def test_texts_within_a_budget_of_tokens():
    lengths = [[10] * 100, [20] * 30]
    for tokens in (1, 100, 1000, 2500, 10**6):
        count = texts_within(lengths, [3, 2], tokens)
        cost = 10 * 3 * min(count, 100) + 20 * 2 * min(count, 30)
        assert cost <= tokens or count == 1
    assert texts_within(lengths, [3, 2], 10**6) == 100
