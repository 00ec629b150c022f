"""Paths of modules: the layer that one belongs to, and the last name in it."""


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
