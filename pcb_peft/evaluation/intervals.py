"""Confidence intervals of a score, and tests of two scores on the same texts."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Interval = tuple[float, float]


def wilson_interval(correct: float, count: int, confidence: float = 0.95) -> Interval:
    """Return the confidence interval of a share, such as an accuracy.

    Args:
        correct: How many texts were right.
        count: How many texts there were, 1 or more.
        confidence: The share of such intervals that hold the true value.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    Example:
        >>> low, high = wilson_interval(39, 100)
        >>> round(low, 3), round(high, 3)
        (0.3, 0.488)
    """
    z = _quantile(confidence)
    share, weight = correct / count, z * z / count
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the confidence interval of a mean, by the normal approximation."""
    mean = fmean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    half = _quantile(confidence) * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p-value that two models are equally good on the same texts.

    Of answers that are right (1) or wrong (0) it is McNemar's exact test, which counts the texts on which the two
    differ; of other values the normal approximation to the mean difference.

    Args:
        first: One value per text.
        second: The values of the other model, in the same order.

    Source: McNemar 1947, Note on the sampling error of the difference between correlated proportions.

    Example:
        >>> paired_p_value([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
        0.0625
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if set(differences) <= {-1, 0, 1}:
        better, worse = differences.count(1), differences.count(-1)
        tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1))
        return min(1.0, 2 * tail / 2 ** (better + worse))
    spread = stdev(differences) if len(differences) > 1 else math.inf
    z = math.inf if spread == 0 else abs(fmean(differences)) * math.sqrt(len(differences)) / spread
    return 2 * (1 - NormalDist().cdf(z))


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
