"""The method of a merge that names none."""

from collections.abc import Collection

from pcb_peft.methods.registry import MergeMethod, get_method

AUTO = "auto"  # the method in a recipe that names none

DEFAULT_METHODS = ("flat", "pcb")
"""The methods of a merge that names none, best first: it takes the first that suits what is merged, and how.

Chosen on validation texts of six tasks, with adapters of one small text encoder (tables in ``docs/methods.md``). All
six LoRA adapters, mean and worst task in % of each adapter's own: `flat` 94.1 / 79.3, `pcb` 91.1 / 74.4, `iso_c` 88.2
/ 66.5, `tsv` 84.6 / 44.8, `linear` 78.0 / 31.9. All pairs of them: `flat` 97.3 / 95.0, `tsv` 94.8 / 89.5, `pcb` 94.2
/ 88.7. (IA)³ adapters are merged equally well by `flat`, `pcb` and `ties`: 90.4, 91.1 and 90.7; in pairs 94.2, 93.8
and 93.9.
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
