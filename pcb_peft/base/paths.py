"""Paths of modules: the layer that one belongs to, and the last name in it."""

from collections.abc import Iterable


def layer_of(module: str) -> int | None:
    """The number of the layer that a module belongs to: the first number in its path.

    >>> layer_of("model.layers.12.mlp.up_proj")
    12
    """
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def target_of(module: str) -> str:
    """Return the last part of a module's path that is no number.

    >>> target_of("model.layers.3.self_attn.q_proj"), target_of("unet.to_out.0")
    ('q_proj', 'to_out')
    """
    return next((part for part in reversed(module.split(".")) if not part.isdecimal()), module)


def distinct_targets(modules: Iterable[str]) -> dict[str, str]:
    """Return the last parts of each module's path, as many as tell it from other kinds; numbers are left out.

    >>> distinct_targets(["layer.0.out.dense", "layer.0.up.dense", "layer.1.up.dense", "layer.0.q"])
    {'layer.0.out.dense': 'out.dense', 'layer.0.up.dense': 'up.dense', 'layer.1.up.dense': 'up.dense', 'layer.0.q': 'q'}
    """
    kinds = {m: tuple(part for part in m.split(".") if not part.isdecimal()) for m in modules}
    owners: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for kind in set(kinds.values()):
        for start in range(len(kind)):
            owners.setdefault(kind[start:], set()).add(kind)
    labels = {
        kind: next(
            (
                kind[start:]
                for start in reversed(range(len(kind)))
                if len(owners[kind[start:]]) == 1
            ),
            kind,
        )
        for kind in set(kinds.values())
    }
    return {module: ".".join(labels[kind]) or module for module, kind in kinds.items()}
