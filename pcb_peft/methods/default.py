"""The method of a merge that names none."""

from collections.abc import Collection

from pcb_peft.methods.registry import MergeMethod, get_method

AUTO = "auto"  # the method in a recipe that names none

DEFAULT_METHODS = ("flat", "pcb")
"""The methods of a merge that names none, best first: it takes the first that suits what is merged, and how.

The evidence is in ``docs/methods.md``, "What merges keep": mean and worst task on test texts, in % of each adapter's
own accuracy, with every weight at 1. Six LoRA adapters of a text encoder: `flat` 91.3 / 66.9, `pcb` 88.9 / 66.9, `tsv`
82.8 / 44.8. Four LoRA adapters of a language model, 60 texts each: `tsv` 87.1 / 81.8, `flat` 86.1 / 75.5, `pcb` 80.6 /
66.0. Of the methods that were measured on both, `flat` alone is first, or level with the first, on both. Validation
texts agree: 93.6 / 76.6, 91.4 / 73.0, 84.6 / 48.7 in this order; and 92.8 / 83.7, 91.0 / 63.3, 81.5 / 46.9.
Six (IA)³ adapters: `pcb` 88.9 / 69.4, `ties` 88.4 / 67.2, `flat` 86.9 / 63.4; on validation texts, and on pairs of the
adapters, these three were level.
"""


def default_method(
    options: Collection[str], *, full_rank: bool, by_energy: bool
) -> tuple[MergeMethod, list[str]]:
    """Choose the method of a merge that names none.

    Args:
        options: Names of the options that are given.
        full_rank: A delta has full rank, such as that of a DoRA or of a full fine-tune. A method that sees whole
            matrices would decompose every ΔW; none was measured there.
        by_energy: The rank is chosen by the energy of the merge's directions. A method that knows the rank makes them
            equal.

    Returns:
        The method, and a note on why it is not the first one, if it is not.
    """
    methods = [get_method(name) for name in DEFAULT_METHODS]
    known = {name for method in methods for name in method.options}

    def obstacle(method: MergeMethod) -> str | None:
        if lacking := [name for name in options if name in known - method.options.keys()]:
            return f"has no option {lacking[0]}"
        if full_rank and method.whole_matrix:
            return "decomposes whole matrices, and some of these have full rank (DoRA, full fine-tunes …)"
        if by_energy and method.knows_rank:
            return (
                "makes all directions equally strong, so that the rank cannot be chosen by energy"
            )
        return None

    obstacles = [obstacle(method) for method in methods]
    chosen = obstacles.index(None) if None in obstacles else 0
    if chosen == 0:
        return methods[0], []
    method, first = methods[chosen].name, methods[0].name
    return methods[chosen], [f"no method is named: it is {method}, because {first} {obstacles[0]}"]
