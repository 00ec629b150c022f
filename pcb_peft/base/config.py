"""The configuration of a base model, ``config.json``: what its fields may hold, and how large they may be."""

import contextlib
import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch.nn.modules.module import register_module_module_registration_hook

from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.schema import MOST, Count, checked
from pcb_peft.runtime.shown import quoted

_MOST_MODULES = 300_000  # mixtures of experts, one by one, have the most: some 115,000
WAY_OUT = "give the directory of a transformers checkpoint, or fetch the model again"
_MOST = {  # end of a field's name to the largest number that it may hold; the largest models have 128 and 16,384
    re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)$"): 2_000,
    re.compile(r"(^|_)(experts?|heads?|groups?)$"): 100_000,
}


class BaseConfig(msgspec.Struct):
    """The fields that are read here; transformers reads and checks the others."""

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: Count | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] | None = None


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json`` of a checkpoint, all of whose numbers are of a size that a model may have.

    Raises:
        BaseModelError: There is no such file, or a field holds something that it may not hold.
    """
    refuse_adapter(directory)
    path = directory / "config.json"
    config = read_json_file(path, BaseModelError, WAY_OUT)
    checked(config, BaseConfig, str(path), BaseModelError, WAY_OUT)
    for name, value in _numbers(config):
        most = next((most for end, most in _MOST.items() if end.search(name)), MOST)
        if abs(value) > most:
            raise BaseModelError(
                f"{path}: {quoted(name)} is {quoted(value)}; it may be {most} at most; {WAY_OUT}"
            )
    return config


def refuse_adapter(directory: Path) -> None:
    """Refuse the directory of an adapter as that of a base model.

    Raises:
        BaseModelError: It is one.
    """
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise BaseModelError(
            f"{directory} is an adapter, and no base model; give the model that it was trained on"
        )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the integers in a configuration, with the key that they stand under."""
    if isinstance(value, Mapping):
        for key, inner in value.items():  # pyright: ignore[reportUnknownVariableType]
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _numbers(inner, name)
    elif isinstance(value, int):
        yield name, value


@contextlib.contextmanager
def bounded_modules() -> Generator[None]:
    """Raise BaseModelError where the block builds more modules than the largest models have."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise BaseModelError(
                f"config.json describes a model of more than {_MOST_MODULES} modules; {WAY_OUT}"
            )

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()
