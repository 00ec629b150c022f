"""Merging formulas in plain float64 numpy: the expected values of the tests.

Nothing here is shared with the package. `x` has shape (T, D): one flattened task vector per row.
`weights` has shape (T,): the papers' lambda of each task. Each returns the merged vector, (D,).

PCB is Du et al., NeurIPS 2024, arXiv 2410.02396. `pcb_paper` follows its equations 2 to 7; the
other four the arithmetic of the code paths of github.com/duguodong7/pcb-merging at 5897888:

    pcb_reference   pcb-merging.py: PCB_merge
    pcb_nlp         nlp_source_code/utils/merge_utils.py: task_para_att_merge
    pcb_vision      vision_source_code/pcb.py, the main block
    pcb_es          vision_source_code/pcb_ES.py: PCB

All five weigh the task vectors after the balancing only: lambda never enters a score. Where they
differ, with u_t = min-max of the winsorised |x_t|, N_t = sign(x_t) u_t, and every sum over j
including j = t:

                 winsor   intra                    inter
    paper        none     Softmax(T Norm(x_t^2))   sum_j Softmax(Norm(x_t x_j))
    reference    1e-4     exp(T u_t^2)             tanh(x_t sum_j x_j)
    nlp          1e-2     exp(T u_t^2)             tanh(x_t sum_j x_j)
    vision       1e-2     exp(T u_t^2)             tanh(x_t sum_j N_j)
    es           1e-2     exp(T u_t^2)             sum_j tanh(N_t N_j)

    score = intra * inter: positive in the paper, signed in the code.
    The paper masks: beta = score where score >= threshold, else 0; and averages x_t by beta.
    The code clips the score to [threshold, max], takes its min-max as the share of the task, in
    [0, 1], and averages the winsorised x_t by the shares.

So an entry in conflict has a small score in the paper and a negative one in the code; the entry at
the threshold itself is kept by the paper and has share 0 in the code; and the code gives every task
the same largest share, 1. The paper does not define Norm: min-max, as in the code, is our reading.

TIES is Yadav et al., NeurIPS 2023, arXiv 2306.01708. Weights come before trimming here, where the
paper scales the result. `ties` keeps int(density D) entries per task, where the authors' `kthvalue`
keeps one more. Where the kept entries sum to zero nothing is elected; the authors elect there the
sign that most other entries have.

Constant rows divide zero by zero and tiny D breaks the indices, as in the originals: pass neither.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear(x: Array, weights: Array) -> Array:
    """sum_t w_t x_t."""
    return weights @ x


def ties(x: Array, weights: Array, density: float) -> Array:
    """Mean of the v_t with sign(v_t) = sign(sum_s v_s), v_t = trim(w_t x_t); 0 where none has."""
    trimmed = np.stack([trim(row, density) for row in weights[:, None] * x])
    majority_sign_mask = np.sign(trimmed.sum(axis=0))
    agrees = (np.sign(trimmed) == majority_sign_mask) & (trimmed != 0)
    return np.where(agrees, trimmed, 0.0).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


def trim(row: Array, density: float) -> Array:
    """The int(density D) largest |v|, and all that tie with the last of them; 0 elsewhere."""
    keep = int(density * row.size)
    if keep == 0:
        return np.zeros_like(row)
    magnitude = np.abs(row)
    return np.where(magnitude >= np.sort(magnitude)[row.size - keep], row, 0.0)


def pcb_reference(x: Array, weights: Array, density: float, winsor: float = 1e-4) -> Array:
    """score_t = exp(T u_t^2) tanh(x_t sum_j x_j)."""
    return merge_balanced(
        x, intra(x, winsor) * np.tanh(x * x.sum(axis=0)), weights, density, winsor
    )


def pcb_nlp(x: Array, weights: Array, density: float, winsor: float = 0.01) -> Array:
    """score_t = exp(T u_t^2) tanh(x_t sum_j x_j): the reference, winsorised at another quantile."""
    return pcb_reference(x, weights, density, winsor)


def pcb_vision(x: Array, weights: Array, density: float, winsor: float = 0.01) -> Array:
    """score_t = exp(T u_t^2) tanh(x_t sum_j N_j), with x_t raw."""
    inter = np.tanh(x * normalized(x, winsor).sum(axis=0))
    return merge_balanced(x, intra(x, winsor) * inter, weights, density, winsor)


def pcb_es(x: Array, weights: Array, density: float, winsor: float = 0.01) -> Array:
    """score_t = exp(T u_t^2) sum_j tanh(N_t N_j)."""
    N = normalized(x, winsor)
    inter = np.stack([sum(np.tanh(N_t * N_j) for N_j in N) for N_t in N])
    return merge_balanced(x, intra(x, winsor) * inter, weights, density, winsor)


def intra(x: Array, winsor: float) -> Array:
    """exp(T u_t^2), where u_t = min-max of the winsorised |x_t|."""
    return np.exp(len(x) * min_max(winsorised_magnitude(x, winsor)) ** 2)


def normalized(x: Array, winsor: float) -> Array:
    """N_t = sign(x_t) u_t, where u_t = min-max of the winsorised |x_t|."""
    return np.sign(x) * min_max(winsorised_magnitude(x, winsor))


def winsorised_magnitude(x: Array, q: float) -> Array:
    """|x_t| clipped to [s[int(D q)], s[int(D (1 - q) - 1)]], where s = sorted(|x_t|)."""
    D = x.shape[1]
    s = np.sort(np.abs(x), axis=1)
    low, high = s[:, [int(D * q)]], s[:, [int(D * (1 - q) - 1)]]
    return np.minimum(np.maximum(np.abs(x), low), high)


def min_max(rows: Array) -> Array:
    """(v - min) / (max - min), per row."""
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    return (rows - low) / (high - low)


def merge_balanced(x: Array, score: Array, weights: Array, density: float, winsor: float) -> Array:
    """sum_t w_t share_t x_t / max(sum_t share_t, 1e-12), with x_t winsorised."""
    share = balanced_share(score, density)
    winsorised = np.sign(x) * winsorised_magnitude(x, winsor)
    mixed = (weights[:, None] * share * winsorised).sum(axis=0)
    return mixed / np.maximum(share.sum(axis=0), 1e-12)


def balanced_share(score: Array, density: float) -> Array:
    """Min-max of score_t clipped to [s[int(D (1 - density))], s[D - 1]], s = sorted(score_t)."""
    D = score.shape[1]
    s = np.sort(score, axis=1)
    threshold, largest = s[:, [int(D * (1 - density))]], s[:, [D - 1]]
    return min_max(np.minimum(np.maximum(score, threshold), largest))


def pcb_paper(x: Array, weights: Array, density: float) -> Array:
    """sum_t w_t beta_t x_t / sum_t beta_t, kept: beta_t >= sorted(beta_t)[int((1 - density) D)]."""
    beta = paper_score(x)
    D = x.shape[1]
    threshold = np.sort(beta, axis=1)[:, [int((1 - density) * D)]]
    beta = np.where(beta >= threshold, beta, 0.0)
    total = beta.sum(axis=0)
    mixed = (weights[:, None] * beta * x).sum(axis=0)
    return np.divide(mixed, total, out=np.zeros(D), where=total > 0)


def paper_score(x: Array) -> Array:
    """beta_t = Softmax(T Norm(x_t x_t)) sum_j Softmax(Norm(x_t x_j)), both over the D entries."""
    intra = softmax(len(x) * min_max(x * x))
    inter = np.stack([softmax(min_max(x_t * x)).sum(axis=0) for x_t in x])
    return intra * inter


def softmax(rows: Array) -> Array:
    """exp(v) / sum(exp(v)), per row; v is at most T, so no shift is needed."""
    return np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
