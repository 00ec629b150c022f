"""Loading adapters from directories, from the Hub and from live models."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.live import files_of_model
from pcb_peft.adapters.reading import read_adapter
from pcb_peft.adapters.source import Source, open_files
from pcb_peft.base.model import BaseModel, lazy_base
from pcb_peft.deltas.replacements import Tied
from pcb_peft.errors import OptionError
from pcb_peft.formats.base_weights import Base
from pcb_peft.runtime.shown import quoted
from pcb_peft.runtime.threads import in_order
from pcb_peft.writing.fold import check_fold_target
from pcb_peft.writing.targets import Overwrite

AdapterLike: TypeAlias = str | Path | Source | tuple[Any, str] | Adapter
"""An adapter: its directory or hub id, its `Source`, a PeftModel and a name in it, or one that is loaded."""


def load_adapter(
    source: AdapterLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    base_model: str | Path | BaseModel | Base = None,
    hashed: bool = True,
    dequantize: bool = False,
) -> Adapter:
    """Open an adapter that PEFT saved. Its tensors are read when they are asked for.

    Args:
        source: A directory, a hub id, or (model, adapter name) of a PeftModel, of another model that PEFT's layers were
            injected into, or of a pipeline of diffusers.
        revision: Revision of the hub repository.
        subfolder: Folder in the directory or the repository.
        base_model: Path or hub id of the base model; opened only where a delta depends on W (DoRA, PiSSA, trained
            biases …).
        hashed: Read the whole file once for its hash, by which recipes and random masks know the adapter.
        dequantize: Take a quantised base model; its weights are computed from their codes.

    Returns:
        The adapter: its deltas by module, its head, and methods that save it or fold it into its base model.

    Raises:
        AdapterError: There is no adapter, or its files are damaged.
        UnsupportedError: It holds something that cannot be read; the message names it.

    Example:
        >>> from pcb_peft import load_adapter
        >>> adapter = load_adapter("math-lora")
        >>> adapter.modules["model.layers.0.self_attn.q_proj"].kind_name
        'LoRA'
    """
    base = base_model if callable(base_model) else lazy_base(base_model, dequantize=dequantize)
    if isinstance(source, str | Path):
        source = Source(str(source), revision, subfolder)
    return _opened(source, hashed=hashed)(base)


def load_adapters(
    sources: Sequence[AdapterLike],
    *,
    base_model: Base,
    hashed: bool = True,
) -> list[Adapter]:
    """Open several adapters, whose files are read at the same time, as `load_adapter` does."""
    given = [Source(str(one)) if isinstance(one, str | Path) else one for one in sources]
    opened = in_order(functools.partial(_opened, hashed=hashed), given)
    return [parse(base_model) for parse in opened]


def _opened(source: object, *, hashed: bool) -> Callable[[Base], Adapter]:
    """Open and hash the files of an adapter, and return the function that reads it beside a base model.

    Raises:
        OptionError: The source is nothing that can be an adapter.
    """
    if isinstance(source, Adapter):
        return lambda _: source
    if isinstance(source, tuple):
        model, name = cast("tuple[Any, str]", source)
        return functools.partial(read_adapter, name, None, files_of_model(model, name))
    if not isinstance(source, Source):
        raise OptionError(
            f"adapters: {quoted(source)} is no adapter; it must be a directory, a hub id, (PeftModel, adapter name), "
            "or what load_adapter returns"
        )
    files = open_files(source, hashed=hashed)
    hashes = {"sha256": files.sha256, "config_sha256": files.config_sha256}
    return functools.partial(
        read_adapter, source.name, dataclasses.replace(source, **hashes), files
    )


def fold_adapter(  # noqa: PLR0913  (every choice, by name)
    adapter: AdapterLike,
    base_model: str | Path,
    output: str | Path,
    *,
    tied: Tied | None = None,
    overwrite: Overwrite = False,
    progress: bool | None = None,
    dequantize: bool = False,
    compare_base: str | Path | None = None,
    resume: bool = False,
) -> Adapter:
    """Write the base model with an adapter added into its weights.

    Args:
        adapter: A directory, a hub id, (PeftModel, adapter name), or an adapter that is loaded.
        base_model: Path or hub id, in safetensors: a model of transformers, a pipeline of diffusers, or one file.
        output: Directory to write; a file, if the base model is one.
        tied: Policy for tied weights, as in `Adapter.fold`.
        overwrite: Replace a directory that is not empty: True, if this package wrote everything in it; "all", whatever
            it holds.
        progress: Show a bar; default: on a terminal.
        dequantize: Take a quantised base model, as in `Adapter.fold`.
        compare_base: The same model with or without quantisation, as in `Adapter.fold`.
        resume: Go on from what a killed run of the same fold left, as in `Adapter.fold`.

    Returns:
        The adapter; with `compare_base` its `base_gap` says how far the two base models are from each other.

    Raises:
        AdapterError: There is no adapter, or its files are damaged.
        MismatchError: The base model does not have the adapter's modules, or has them in other shapes.
        BaseModelError: Tied weights would change differently, and the policy refuses it.
        OutputError: The directory cannot be written, must not be replaced, contains an input, or lies in one.

    Example:
        >>> from pcb_peft import fold_adapter
        >>> folded = fold_adapter("math-lora", "base-model", "math-model")
    """
    source = adapter.path if isinstance(adapter, Source) else adapter
    check_fold_target(Path(output), overwrite=overwrite, inputs=(source, base_model))
    loaded = load_adapter(adapter, base_model=base_model, dequantize=dequantize)
    return loaded.fold(
        base_model,
        output,
        tied=tied,
        overwrite=overwrite,
        progress=progress,
        dequantize=dequantize,
        compare_base=compare_base,
        resume=resume,
    )
