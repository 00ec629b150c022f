"""mergekit's merge methods: which methods here they are, and which have no counterpart."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """The meaning of one of mergekit's methods here.

    Attributes:
        name: mergekit's name.
        method: The method here.
        options: mergekit's parameters: for each the option that it is here (None: it becomes weights), a factor, and
            mergekit's default.
        off: Parameters that may be given as false.
        normalised: Whether mergekit divides by the sum of the weights, unless it is told not to.
        weighted: Whether every model needs a weight.
        is_sum: Whether it adds what it keeps of the task vectors.
        exact_in_any_space: Whether the result is the same in every space but that of the factors.
        averages: Whether it averages the entries that agree on a sign.
        counts_base: Whether the base model may be one of the models, and counts in the mean.
        turns: Whether it turns from the first model, which is the base model, to the second.
        on_sphere: Whether it mixes directions, and gives them the mean of all lengths.
        whole_without_base: Whether mergekit mixes whole weights where no base model is named.
        difference: How its numbers differ from mergekit's.
    """

    name: str
    method: str
    options: Mapping[str, tuple[str | None, float, Any]] = dataclasses.field(
        default_factory=dict[str, tuple[str | None, float, Any]]
    )
    off: tuple[str, ...] = ()
    normalised: bool = False
    weighted: bool = True
    is_sum: bool = False
    exact_in_any_space: bool = False
    averages: bool = False
    counts_base: bool = False
    turns: bool = False
    on_sphere: bool = False
    whole_without_base: bool = False
    difference: str = ""


DENSITY = {"density": ("density", 1.0, 1.0)}
RESCALED = {**DENSITY, "rescale": ("rescale", 1.0, True)}
RANDOM = "the entries that are dropped are drawn by other random numbers"
WHOLE = "mergekit goes from one whole weight to the other, and here from one ΔW to the other"

MEANINGS: dict[str, Meaning] = {
    meaning.name: meaning
    for meaning in (
        Meaning(
            name="linear",
            method="linear",
            normalised=True,
            is_sum=True,
            exact_in_any_space=True,
            counts_base=True,
        ),
        Meaning(
            name="task_arithmetic",
            method="linear",
            is_sum=True,
            exact_in_any_space=True,
            off=("rescale",),
        ),
        Meaning(
            name="ties",
            method="ties",
            options=DENSITY,
            normalised=True,
            averages=True,
            off=("rescale",),
        ),
        Meaning(
            name="dare_ties",
            method="dare_ties",
            options=RESCALED,
            averages=True,
            difference=RANDOM,
        ),
        Meaning(
            name="dare_linear",
            method="dare_linear",
            options=RESCALED,
            is_sum=True,
            difference=RANDOM,
        ),
        Meaning(
            name="breadcrumbs",
            method="breadcrumbs",
            options={**DENSITY, "gamma": ("gamma", 1.0, 0.01)},
            is_sum=True,
            off=("rescale",),
        ),
        Meaning(
            name="della",
            method="della",
            options={**RESCALED, "epsilon": ("epsilon", 2.0, 0.15)},
            normalised=True,
            averages=True,
            difference=RANDOM,
        ),
        Meaning(
            name="sce",
            method="sce",
            options={"select_topk": ("density", 1.0, 1.0)},
            weighted=False,
            difference="mergekit weighs the entries of the elected sign anew, and counts the density among entries "
            "that differ",
        ),
        Meaning(
            name="model_stock",
            method="model_stock",
            weighted=False,
            off=("filter_wise",),
            difference="where adapters point away from each other mergekit turns their average around, and here "
            "it is 0; an adapter that does not change a module counts there, and here it does not",
        ),
        Meaning(
            name="multislerp",
            method="multislerp",
            normalised=True,
            on_sphere=True,
            whole_without_base=True,
            off=("eps",),
        ),
        Meaning(
            name="karcher",
            method="karcher",
            weighted=False,
            off=("max_iter", "tol"),
            difference=WHOLE,
        ),
        Meaning(
            name="slerp",
            method="slerp",
            options={"t": (None, 1.0, None)},
            weighted=False,
            turns=True,
            on_sphere=True,
            difference=WHOLE,
        ),
        Meaning(
            name="nuslerp",
            method="slerp",
            normalised=True,
            on_sphere=True,
            whole_without_base=True,
            off=("nuslerp_flatten", "nuslerp_row_wise"),
            difference="mergekit turns vectors of their own lengths, and here their directions are turned",
        ),
    )
}
"""mergekit's methods that this package has, by mergekit's names."""

OTHERS: Mapping[str, str] = {
    "arcee_fusion": "it keeps what matters of one model",
    "breadcrumbs_ties": "breadcrumbs with an election of signs",
    "core_space": "here it is a space: space: core with any method",
    "della_linear": "della without an election of signs",
    "lrp": "it needs relevance scores of tensors",
    "nearswap": "it moves only what is near",
    "passthrough": "it copies tensors, or stacks layers",
    "ram": "it separates what models share from what is their own",
    "ramplus_tl": "it separates what models share from what is their own",
}
"""mergekit's methods that this package does not have, and what they are."""
