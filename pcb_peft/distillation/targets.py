"""Targets of the training: class probabilities, next-token probabilities or hidden states of an adapter's own model.

Shape legend: N texts, or tokens of one text; C classes; V tokens of the vocabulary; K of them that are kept.
"""

import dataclasses
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

KEPT = 64  # of a vocabulary: the other tokens share what is left of the probability


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """Log-probabilities of the most likely classes or tokens, and of all others together.

    Attributes:
        log_probabilities: (N, K + 1) where classes are left out, the last their sum; else (N, C).
        indices: Which classes the first K are (N, K); None: all of them, in order.
    """

    log_probabilities: Tensor
    indices: Tensor | None = None

    def divergence(self, logits: Tensor) -> Tensor:
        """Return the mean over N of KL(self ‖ softmax(logits)), for logits (N, C)."""
        given = functional.log_softmax(logits.float(), dim=-1)
        if self.indices is not None:
            given = _with_rest(given.gather(-1, self.indices))
        own = self.log_probabilities
        return (own.exp() * (own - given)).sum(-1).mean()

    def to(self, device: torch.device) -> "Distribution":
        """Return the same distribution on a device."""
        indices = None if self.indices is None else self.indices.to(device)
        return Distribution(self.log_probabilities.to(device), indices)


@dataclasses.dataclass(frozen=True, slots=True)
class States:
    """Hidden states (N, width), for models without a head."""

    values: Tensor

    def divergence(self, states: Tensor) -> Tensor:
        """Return the squared distance relative to the squared size, of states (N, width)."""
        own = self.values
        return (states.float() - own).square().sum() / own.square().sum().clamp(min=1e-12)

    def to(self, device: torch.device) -> "States":
        """Return the same states on a device."""
        return States(self.values.to(device))


Target: TypeAlias = Distribution | States


def distribution(logits: Tensor, kept: int = KEPT) -> Distribution:
    """Return the probabilities of logits (N, C): of all classes, or of the `kept` most likely if there are many."""
    every = functional.log_softmax(logits.float(), dim=-1)
    if every.shape[-1] <= 2 * kept:
        return Distribution(every.cpu())
    values, indices = every.topk(kept, dim=-1)
    return Distribution(_with_rest(values).cpu(), indices.cpu())


def joined(targets: list[Any]) -> Any:
    """Return the targets of several texts as one, text after text."""
    columns = [
        [getattr(one, field.name) for one in targets] for field in dataclasses.fields(targets[0])
    ]
    return type(targets[0])(
        *(None if column[0] is None else torch.cat(column) for column in columns)
    )


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Add the log-probability of everything else: (N, K) to (N, K + 1)."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-8).log()
    return torch.cat([log_probabilities, rest], dim=-1)
