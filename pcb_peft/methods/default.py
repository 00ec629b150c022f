"""The method of a merge that names none."""

from collections.abc import Collection

from pcb_peft.methods.registry import MergeMethod, get_method

AUTO = "auto"  # the method in a recipe that names none

DEFAULT_METHODS = ("flat", "pcb")
"""The methods of a merge that names none, best first: it takes the first that suits what is merged, and how.

The evidence is in ``docs/methods.md``, "What merges keep": mean and worst task on test texts, in % of each adapter's
own accuracy, with every weight at 1. Eight LoRA adapters of a text encoder: `flat` 92.5 / 76.5, `pcb` 86.6 / 66.9,
`iso_c` 84.5 / 57.5, `tsv` 83.0 / 43.5. Five of a language model, 60 texts each: `flat` 85.3 / 69.8, `tsv` 81.1 / 61.8,
`pcb` 75.7 / 39.6. With the base model (``metric="random"``) `flat` keeps 93.5 / 82.8 and 90.1 / 79.2 of these. Six
(IA)³ adapters: `pcb` 88.9 / 69.4, `ties` 88.4 / 67.2, `flat` 86.9 / 63.4.
"""


def default_method(
    options: Collection[str], *, full_rank: bool, vectors: bool, by_energy: bool
) -> tuple[MergeMethod, list[str]]:
    """Choose the method of a merge that names none.

    Args:
        options: Names of the options that are given.
        full_rank: A delta has full rank, such as that of a DoRA or of a full fine-tune. A method that sees whole
            matrices would decompose every ΔW; none was measured there.
        vectors: All deltas are (IA)³ vectors.
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
        if vectors and method.whole_matrix:
            return "makes directions equally strong, and an (IA)³ vector has only one"
        if by_energy and method.knows_rank:
            return "makes directions equally strong, so that the rank cannot be chosen by energy"
        return None

    obstacles = [obstacle(method) for method in methods]
    chosen = obstacles.index(None) if None in obstacles else 0
    if chosen == 0:
        return methods[0], []
    method, first = methods[chosen].name, methods[0].name
    return methods[chosen], [f"no method is named: it is {method}, because {first} {obstacles[0]}"]
