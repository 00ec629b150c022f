"""What every method and calibration does, in numpy and float64, written from the papers and not from the package.

A new method needs a function of its name here, in the table that fits; the tests then compare the two:

- ELEMENTWISE: ``f(x, weights, **options)`` of task vectors (T, D), to (D,). A parameter ``uniform`` gets the random
  numbers (T, D) of the package's masks.
- SPECTRAL: ``f(x, **options)`` of the matrices λ_t ΔW_t, to the merged one.
- WITH_STATISTICS: ``f(x, statistics, weights, **options)``, of a statistic of each adapter beside.
- BEFORE and AFTER: calibrations of all deltas of a module, and of the merged one; WHOLE_MODEL: of all modules.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transcriptions
from helpers import Matrix
from numpy.typing import NDArray

Array = NDArray[np.float64]
Masks = NDArray[np.float64]  # uniform numbers

SHAPES = ((7, 11), (1, 5), (6, 1), (4, 30))  # of the blocks of a scope
ROUNDING = 1e-6  # part of the largest singular value that the methods take for 0


# --- elementwise and geometric methods


def linear(x: Array, weights: Array) -> Array:
    return weights @ x


def kept_largest(scores: Array, density: float) -> NDArray[np.bool_]:
    """The int(density D) largest, at least one, and all that tie with the least of them."""
    least = np.sort(scores)[len(scores) - max(1, int(density * len(scores)))]
    return scores >= least


def magnitude_prune(x: Array, weights: Array, density: float) -> Array:
    return sum(w * v * kept_largest(np.abs(v), density) for v, w in zip(x, weights, strict=True))


def majority(x: Array) -> Array:
    """Steps 2 and 3 of TIES: at every entry the mean of those with the sign of their sum."""
    merged = np.zeros(x.shape[1])
    for d, column in enumerate(x.T):
        agreeing = [v for v in column if v * column.sum() > 0]
        merged[d] = np.mean(agreeing) if agreeing else 0
    return merged


def elected(x: Array, weights: Array, elect: str) -> Array:
    """PEFT elects before it weighs: then a weight neither votes nor turns a vote."""
    if elect == "weighted":
        return majority(weights[:, None] * x)
    signs = np.sign(x.sum(axis=0))
    agreeing = (np.sign(x) == signs) & (signs != 0)
    return (weights @ (x * agreeing)) / np.maximum(1, agreeing.sum(axis=0))


def ties(x: Array, weights: Array, density: float, elect: str = "weighted") -> Array:
    kept = np.stack([v * kept_largest(np.abs(v), density) for v in x])
    return elected(kept, weights, elect)


def dropped(x: Array, uniform: Masks, density: float, rescale: bool = True) -> Array:
    return np.where(uniform < density, x, 0) / (density if rescale else 1)


def dare_linear(x: Array, weights: Array, uniform: Masks, **options: Any) -> Array:
    return linear(dropped(x, uniform, **options), weights)


def dare_ties(
    x: Array, weights: Array, uniform: Masks, elect: str = "weighted", **options: Any
) -> Array:
    return elected(dropped(x, uniform, **options), weights, elect)


def keep_probabilities(row: Array, density: float, epsilon: float) -> Array:
    """density − ε/2 for the smallest |v| of a row, density + ε/2 for its largest, evenly spaced between them."""
    epsilon = min(epsilon, 2 * density, 2 - 2 * density)
    if len(row) == 1:
        return np.array([density])
    keep = np.empty(len(row))
    for rank, place in enumerate(np.argsort(np.abs(row), kind="stable")):
        keep[place] = density - epsilon / 2 + epsilon * rank / (len(row) - 1)
    return keep


def della(
    x: Array, weights: Array, uniform: Masks, density: float, epsilon: float, rescale: bool = True
) -> Array:
    survivors = np.zeros_like(x)
    for t, (start, shape) in itertools.product(range(len(x)), starts(SHAPES)):
        for first in range(start, start + math.prod(shape), shape[1]):
            row = slice(first, first + shape[1])
            keep = keep_probabilities(x[t, row], density, epsilon)
            scaled = x[t, row] / (np.maximum(keep, 1e-300) if rescale else 1)
            survivors[t, row] = np.where(uniform[t, row] < keep, scaled, 0)
    return majority(weights[:, None] * survivors)


def breadcrumbs(x: Array, weights: Array, density: float, gamma: float) -> Array:
    size = x.shape[1]
    kept = max(1, int(density * size))
    top = min(int(gamma * size), size - kept)
    merged = np.zeros(size)
    for v, w in zip(x, weights, strict=True):
        ordered = np.sort(np.abs(v))[::-1]
        largest, smallest = ordered[top], ordered[top + kept - 1]
        merged += w * np.where((np.abs(v) >= smallest) & (np.abs(v) <= largest), v, 0)
    return merged


def sce(x: Array, weights: Array, density: float) -> Array:
    selected = x * kept_largest(x.var(axis=0), density)
    energy = (selected**2).sum(axis=1)
    coefficients = energy / energy.sum()
    fused = weights[:, None] * selected
    fused = np.where(fused * fused.sum(axis=0) > 0, fused, 0)
    return coefficients @ fused


def consensus(x: Array, weights: Array, tall: float, votes: int) -> Array:
    x = weights[:, None] * x
    merged = x.sum(axis=0)
    masks = np.abs(x) >= tall * np.abs(merged - x)
    return np.where(masks.sum(axis=0) >= min(votes, len(x)), merged, 0)


def turned(x: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Unit vectors, lengths and masses of those that are not zero."""
    x, weights = x[(weights != 0) & x.any(axis=1)], weights[(weights != 0) & x.any(axis=1)]
    lengths = np.linalg.norm(x, axis=1)
    return np.sign(weights)[:, None] * x / lengths[:, None], lengths, np.abs(weights)


def slerp(x: Array, weights: Array, t: float | None = None) -> Array:
    (one, other), lengths, masses = turned(x, weights)
    t = masses[1] / masses.sum() if t is None else t
    angle = np.arccos(one @ other)
    direction = (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)
    return masses.mean() * ((1 - t) * lengths[0] + t * lengths[1]) * direction


def multislerp(x: Array, weights: Array) -> Array:
    units, lengths, masses = turned(x, weights)
    mean = masses @ units
    return mean / np.linalg.norm(mean) * (masses * lengths).mean()


def logarithms(point: Array, units: Array) -> Array:
    """Where on the sphere the units lie, as tangents at a point: their direction there, as long as the angle."""
    tangents = units - (units @ point)[:, None] * point
    sines = np.linalg.norm(tangents, axis=1)
    return tangents * (np.arctan2(sines, units @ point) / np.maximum(sines, 1e-300))[:, None]


def karcher(x: Array, weights: Array) -> Array:
    units, lengths, masses = turned(x, weights)
    point = units[0]
    for _ in range(300):  # gradient descent, in the space itself
        tangent = 0.5 * masses @ logarithms(point, units) / masses.sum()
        angle = np.linalg.norm(tangent)
        point = np.cos(angle) * point + np.sinc(angle / np.pi) * tangent
        point /= np.linalg.norm(point)
    return point * (masses * lengths).mean()


def model_stock(x: Array, weights: Array) -> Array:
    units = turned(x, weights)[0]
    count = len(units)
    cosine = np.mean([units[i] @ units[j] for i in range(count) for j in range(i)])
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return max(0, ratio) * linear(x, weights) / count


def starts(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
    """Where each block begins in a flattened task vector."""
    sizes = [math.prod(shape) for shape in shapes]
    return list(zip(itertools.accumulate([0, *sizes[:-1]]), shapes, strict=True))


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (
        linear,
        ties,
        magnitude_prune,
        breadcrumbs,
        dare_linear,
        dare_ties,
        della,
        sce,
        consensus,
        slerp,
        multislerp,
        karcher,
        model_stock,
    )
}
BY_FORMULA = {"pcb": transcriptions.pcb_es}  # test_formulas compares all of its formulas


# --- spectral methods


def svd(matrix: Matrix, scale: float | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """The triplets of the numerical rank."""
    u, s, vh = np.linalg.svd(matrix)
    rank = int((s > ROUNDING * (s[0] if scale is None else scale)).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def polar(columns: Matrix) -> Matrix:
    """C (CᵀC)^{-1/2}, the inverse on the range."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > ROUNDING**2 * values[-1]
    return columns @ (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def tsv(x: Sequence[Matrix], density: float = 1.0) -> Matrix:
    u, s, v = [], [], []
    for matrix in x:
        left, values, right = svd(matrix)
        count = int(np.ceil(density * len(values)))
        u.append(left[:, :count])
        s.append(values[:count])
        v.append(right[:count].T)
    return polar(np.hstack(u)) @ np.diag(np.concatenate(s)) @ polar(np.hstack(v)).T


def iso_c(x: Sequence[Matrix]) -> Matrix:
    u, s, vh = svd(sum(x))
    return s.mean() * u @ vh


def flat(x: Sequence[Matrix], response: float = 0.7) -> Matrix:
    """All directions have room; the scale is found from what the response must be."""
    triplets = [svd(matrix) for matrix in x]
    u, v = (
        polar(np.hstack([u for u, _, _ in triplets])),
        polar(np.vstack([vh for *_, vh in triplets]).T),
    )
    merged = u @ np.diag(np.concatenate([s for _, s, _ in triplets]) ** 0.25) @ v.T
    return at_response(merged, x, response)


def flat_of_rank(x: Sequence[Matrix], rank: int, response: float = 0.7) -> Matrix:
    """Direction by direction of the sum."""
    sizes = [np.linalg.norm(matrix) for matrix in x]
    u, _, vh = svd(sum(x), np.linalg.norm(sizes))
    merged = np.zeros_like(x[0])
    for left, right in zip(u.T[:rank], vh[:rank], strict=True):
        shares = [
            (left @ matrix @ right / size) ** 2 for matrix, size in zip(x, sizes, strict=True)
        ]
        merged += np.average(sizes, weights=shares) ** 0.25 * np.outer(left, right)
    return at_response(merged, x, response)


def at_response(merged: Matrix, x: Sequence[Matrix], least: float) -> Matrix:
    """Directions at the scale at which they keep the share of the adapters' response that `flat` wants."""
    squares = [np.linalg.norm(matrix) ** 2 for matrix in x]
    kept = np.linalg.norm(sum(x)) ** 2 / sum(squares)
    wanted = max(least, (kept / len(x)) ** (1 / 6)) * min(1, 2 * kept)
    own = [np.sum(merged * matrix) for matrix in x]
    mean = np.mean([each / square for each, square in zip(own, squares, strict=True)])
    return merged * wanted / max(mean, sum(own) / sum(squares))


def iso_cts(x: Sequence[Matrix], common: float = 0.8) -> Matrix:
    u, s, vh = svd(sum(x))
    rank = len(s)
    own = min(round((rank - int(rank * common)) / len(x)), rank // len(x))
    k = rank - own * len(x)
    left, values, right = [u[:, :k]], [s[:k]], [vh[:k].T]
    for matrix in x:
        rest = matrix - u[:, :k] @ u[:, :k].T @ matrix
        a, b, c = svd(rest, np.linalg.norm(matrix))
        left.append(a[:, :own])
        values.append(b[:own])
        right.append(c[:own].T)
    return np.concatenate(values).mean() * polar(np.hstack(left)) @ polar(np.hstack(right)).T


def wudi(x: Sequence[Matrix], ridge: float = 0.03) -> Matrix:
    """The least-norm solution of the normal equations of the objective."""
    grams = [matrix.T @ matrix / np.linalg.norm(matrix) ** 2 for matrix in x]
    left = sum(grams) + ridge * np.eye(x[0].shape[1])
    kappa = min(1, sum(np.linalg.norm(m) ** 2 for m in x) / np.linalg.norm(sum(x)) ** 2)
    right = sum(matrix @ gram for matrix, gram in zip(x, grams, strict=True)) + ridge * kappa * sum(
        x
    )
    return np.linalg.lstsq(left, right.T, rcond=ROUNDING**2)[0].T


def stf(x: Sequence[Matrix]) -> Matrix:
    """The smallest ΔW with u_kᵀ ΔW v_k = σ_k: one linear equation in the entries of ΔW per singular triplet."""
    rows, values = [], []
    for matrix in x:
        u, s, vh = svd(matrix)
        rows += [np.outer(u[:, k], vh[k]).ravel() for k in range(len(s))]
        values += list(s)
    solution = np.linalg.lstsq(np.array(rows), np.array(values), rcond=ROUNDING)[0]
    return solution.reshape(x[0].shape)


def robust_merge(x: Sequence[Matrix], density: float = 0.2) -> Matrix:
    def largest(factor: Matrix) -> Matrix:
        count = max(1, int(density * factor.size))
        return factor * (abs(factor) >= np.sort(abs(factor).ravel())[-count])

    factors, scales = [], np.zeros((len(x), min(x[0].shape)))
    for t, matrix in enumerate(x):
        u, s, vh = svd(matrix)
        lora_A, lora_B = np.sqrt(s)[:, None] * vh, u * np.sqrt(s)
        pruned = largest(lora_A)
        for i in range(len(s)):
            if pruned[i].any():
                scales[t, i] = abs(lora_A[i]).sum() / abs(pruned[i]).sum()
        factors.append((largest(lora_B), pruned))
    total = scales.sum(0)
    return sum(
        scales[t, i] / total[i] * np.outer(lora_B[:, i], lora_A[i])
        for t, (lora_B, lora_A) in enumerate(factors)
        for i in range(len(lora_A))
        if total[i]
    )


def fr(x: Sequence[Matrix], cutoff: float = 0.1) -> Matrix:
    rows, cols = (np.fft.fftfreq(length) for length in x[0].shape)
    radius = np.sqrt(rows[:, None] ** 2 + cols**2)
    high = radius >= cutoff * np.sqrt(0.5)
    return sum(np.fft.ifft2(high * np.fft.fft2(matrix)).real for matrix in x)


SPECTRAL: dict[str, Callable[..., Matrix]] = {
    function.__name__: function
    for function in (tsv, iso_c, flat, iso_cts, wudi, stf, robust_merge, fr)
}


# --- methods that need a statistic of each adapter's task


def regmean(deltas, measured, weights, alpha):
    """(Σ_t λ_t ΔW_t G_t)(Σ_t G_t)⁻¹, with the entries of G_t beside its diagonal times alpha."""
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in measured]
    left = sum(w * d @ g for w, d, g in zip(weights, deltas, shrunk, strict=True))
    return left @ np.linalg.pinv(sum(shrunk), rcond=1e-12, hermitian=True)


def sta(deltas, measured, weights, density):
    """Σ_t λ_t ΔW_t where |ΔW_t g_t| is among the int(density D) largest."""
    merged = 0
    for w, d, g in zip(weights, deltas, measured, strict=True):
        importance = np.abs(d * g)
        least = np.sort(importance, axis=None)[-max(1, int(density * d.size))]
        merged = merged + w * d * (importance >= least)
    return merged


WITH_STATISTICS: dict[str, Callable[..., Matrix]] = {"regmean": regmean, "sta": sta}


# --- calibrations


def svc(merged: Matrix, tasks: Sequence[Matrix], floor: float | None = None) -> Matrix:
    u, s, vh = svd(merged)
    tasks = [task for task in tasks if task.any()]
    result = np.zeros_like(merged)
    for r in range(len(s)):
        response = u[:, r] @ merged
        shares = []
        for task in tasks:
            own = u[:, r] @ task
            shares.append(response @ own / (own @ own))
        gain = len(tasks) / sum(max(floor or 1 / len(tasks), share) for share in shares)
        result += gain * s[r] * np.outer(u[:, r], vh[r])
    return result


def pico(tasks: Sequence[Matrix]) -> list[Matrix]:
    present = sum(task.any() for task in tasks)
    u, s, _ = svd(np.hstack(tasks))
    alpha = 1 / (1 + (present - 1) * s**2 / (s**2).sum())
    return [task + u @ np.diag(alpha - 1) @ u.T @ task for task in tasks]


def exponent(matrix: Matrix, power: float = 0.5) -> Matrix:
    u, s, vh = svd(matrix)
    return u * (s**power * s.sum() / (s**power).sum()) @ vh


def equalize(tasks: Sequence[Matrix], beta: float = 0.0) -> list[Matrix]:
    norms = [np.linalg.norm(task) for task in tasks]
    mean = np.mean([norm for norm in norms if norm])
    return [
        task * (beta * norm + (1 - beta) * mean) / norm if norm else task
        for task, norm in zip(tasks, norms, strict=True)
    ]


def norm(merged: Matrix, tasks: Sequence[Matrix], strength: float = 1.0) -> Matrix:
    sizes = [np.linalg.norm(task) for task in tasks if task.any()]
    return merged * strength * np.mean(sizes) / np.linalg.norm(merged)


def response(merged: Matrix, tasks: Sequence[Matrix], least: float = 0.0) -> Matrix:
    tasks = [task for task in tasks if task.any()]
    effective = len(tasks) * sum((t**2).sum() for t in tasks) / (sum(tasks) ** 2).sum()
    share = np.mean([(merged * task).sum() / (task**2).sum() for task in tasks])
    return merged * max(least, effective ** (-1 / 3)) / share


def amplitude(
    merged: Sequence[Matrix], tasks: Sequence[Sequence[Matrix]], strength: float = 1.0
) -> list[Matrix]:
    """Of all modules of a model at once; ``tasks[t]`` are those of adapter t."""
    sizes = [sum(np.linalg.norm(x) ** 2 for x in modules) for modules in tasks]
    size = sum(np.linalg.norm(x) ** 2 for x in merged)
    return [strength * np.sqrt(np.mean(sizes) / size) * x for x in merged]


BEFORE: dict[str, Callable[..., list[Matrix]]] = {
    "pico": pico,
    "equalize": equalize,
    "exponent": lambda tasks, **options: [exponent(x, **options) if x.any() else x for x in tasks],
}
AFTER: dict[str, Callable[..., Matrix]] = {
    "svc": svc,
    "norm": norm,
    "response": response,
    "exponent": lambda merged, _, **options: exponent(merged, **options),
}
WHOLE_MODEL = {"amplitude": amplitude}
