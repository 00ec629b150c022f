"""Paths of modules: the layer that one belongs to, and the last name in it."""

from collections.abc import Iterable


def layer_of(module: str) -> int | None:
    """The number of the layer that a module belongs to: the first number in its path.

    >>> layer_of("model.layers.12.mlp.up_proj")
    12
    """
    place = _place(module)
    return None if place is None else place[1]


def _place(module: str) -> tuple[tuple[str, ...], int] | None:
    """The path of the list of layers that a module lies in, and the number of its layer; None outside of all."""
    parts = module.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if start is None else (tuple(parts[:start]), int(parts[start]))


def layer_labels(modules: Iterable[str]) -> dict[str, str]:
    """Return the layer of each module that lies in one, from the first layer to the last.

    A layer goes by its number; where a model has several lists of layers, by the beginning of their path, too.

    >>> layer_labels(["model.layers.10.q_proj", "model.layers.9.q_proj", "lm_head"])
    {'model.layers.9.q_proj': '9', 'model.layers.10.q_proj': '10'}
    >>> layer_labels(["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"])
    {'model.encoder.layers.0.fc1': 'encoder 0', 'model.decoder.layers.0.fc1': 'decoder 0'}
    """
    places = {module: place for module in modules if (place := _place(module)) is not None}
    lists = _list_labels(dict.fromkeys(path for path, _ in places.values()))
    order = {path: number for number, path in enumerate(lists)}
    in_order = sorted(places, key=lambda m: (order[places[m][0]], places[m][1]))
    return {m: f"{lists[places[m][0]]} {places[m][1]}".strip() for m in in_order}


def _list_labels(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the beginning of each list's path that tells it from the others; an empty text for the only one."""
    lists = list(paths)
    common = 0
    while len(lists) > 1 and len({path[common : common + 1] for path in lists}) == 1:
        common += 1
    tails = {path: path[common:] for path in lists}
    labels: dict[tuple[str, ...], str] = {}
    for path, tail in tails.items():
        others = [other for other in tails.values() if other != tail]
        length = next(
            (n for n in range(len(tail)) if all(other[:n] != tail[:n] for other in others)),
            len(tail),
        )
        labels[path] = ".".join(tail[:length])
    return labels


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
