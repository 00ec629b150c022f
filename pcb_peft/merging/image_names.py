"""One weight, one name among LoRAs of image and video models, whose trainers name the same modules in many ways."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.saving import check_format
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import MismatchError, UnsupportedError
from pcb_peft.formats import LazyDelta
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.fused import rows_of_parts, split_entry
from pcb_peft.images.metadata import merged_from
from pcb_peft.images.names import (
    COMFYUI,
    DIFFUSERS,
    EMBEDDING,
    KOHYA,
    ImageLora,
    architecture_of_version,
    is_canonical,
    stated_version,
)
from pcb_peft.images.rows import parts_of
from pcb_peft.images.targets import refuse_embeddings, with_components

KEPT = ("ss_base_model_version", "modelspec.architecture", "ss_v2")
"""Metadata that a merge has if all its sources have them alike."""


def image_adapters(adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[str]]:
    """Call every module of image LoRAs by one name in all of them.

    Args:
        adapters: The adapters that are merged, of which one at least is the file of an image model.

    Returns:
        The adapters, and notes for the report.

    Raises:
        MismatchError: They belong to different base models, or names may mean one weight, and nothing says whether
            they do.
    """
    _refuse_other_models(adapters)
    named = [_with_components(adapter) for adapter in adapters]
    _refuse_unknown_names(named)
    mixed = _kept_whole_and_in_parts(named)
    notes = [
        f"{len(mixed)} matrices, such as {name}, are whole in some adapters and in parts in others: merged in parts"
        for name in sorted(mixed)[:1]
    ]
    return [_split(adapter, mixed) for adapter in named], notes


def common_image(adapters: Sequence[Adapter]) -> ImageLora | None:
    """Return what a merge of image LoRAs is known by; its format is the one that its sources came in.

    Where they came in several, it is the first of them that has a name for every module.
    """
    images = [adapter.image for adapter in adapters if adapter.image is not None]
    if not images:
        return None
    known = [set(image.architectures) for image in images if image.architectures]
    common = set.intersection(*known) if known else set[str]()
    names = tuple(name for image in images[:1] for name in image.architectures if name in common)
    metadata: dict[str, Any] = {
        key: images[0].metadata[key]
        for key in KEPT
        if key in images[0].metadata
        and all(image.metadata.get(key) == images[0].metadata[key] for image in images)
    }
    sources = [adapter for adapter in adapters if adapter.image is not None]
    hashes = [one.files.sha256 if one.files else None for one in sources]
    metadata |= merged_from(images, [one.name for one in sources], hashes)
    dialects = list(dict.fromkeys(image.dialect for image in images))
    found = names or tuple(sorted(common))
    first = dialects[0] if len(dialects) == 1 else ""
    merged = ImageLora(first, found, metadata, tuple(dialects))
    for dialect in dict.fromkeys((*dialects, DIFFUSERS, COMFYUI, KOHYA)):
        try:
            _check_format(dialect, adapters, merged)
        except UnsupportedError:
            continue
        return dataclasses.replace(merged, dialect=dialect)
    return dataclasses.replace(merged, dialect=dialects[0])


def checked_image(file_format: str | None, adapters: Sequence[Adapter]) -> ImageLora | None:
    """Return what a merge of image LoRAs is known by.

    Raises:
        PcbPeftError: The format that was asked for has no place for them.
    """
    image = common_image(adapters)
    if file_format is not None:
        _check_format(file_format, adapters, image)
    return image


def _check_format(file_format: str, adapters: Sequence[Adapter], image: ImageLora | None) -> None:
    """Raise PcbPeftError where adapters have no place in a format."""
    check_format(file_format, shapes_of(adapters), image)
    refuse_embeddings([name for one in adapters for name in one.head.parameters], file_format)


def refuse_different_embeddings(heads: Mapping[str, Replacements]) -> None:
    """Refuse embeddings of one word that differ between LoRAs of image models.

    Args:
        heads: Name of each source to what is kept for it alone.
    """
    words = sorted({name for head in heads.values() for name in head.parameters})
    words = [name for name in words if name.startswith(EMBEDDING)]
    if words:
        raise MismatchError(
            f"{', '.join(heads)} have different embeddings of one word, {words[0]}: heads='first' (--heads first) "
            "takes that of the first adapter; or take it out of one of the files"
        )


def format_notes(adapters: Sequence[Adapter], image: ImageLora | None) -> list[str]:
    """Return a note on the format of a merge, where it is not that of all its sources."""
    others = sorted(
        {one.image.dialect for one in adapters if one.image} - {image and image.dialect}
    )
    if image is None or not others:
        return []
    return [
        f"adapters came as {', '.join(others)}; the merge is saved as {image.dialect} unless another format is given"
    ]


def shapes_of(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Return the shapes of all modules of adapters."""
    return {name: e.shape for one in adapters for name, e in one.modules.entries.items()}


def _refuse_other_models(adapters: Sequence[Adapter]) -> None:
    """Refuse LoRAs of different base models, by what their files say and by their modules."""
    known = [(one, one.image) for one in adapters if one.image and one.image.architectures]
    for (one, image), (other, theirs) in itertools.combinations(known, 2):
        if not set(image.architectures) & set(theirs.architectures):
            raise MismatchError(
                f"{one.name} is a LoRA of {_model(image)}, and {other.name} of {_model(theirs)}: LoRAs of different "
                "base models cannot be merged; merge those of one model"
            )


def _model(image: ImageLora) -> str:
    """Return the name of a LoRA's base model, and what its file says about it."""
    stated = stated_version(image.metadata)
    said = f" ({stated})" if architecture_of_version(stated) else ""
    return " or ".join(image.architectures) + said


def _with_components(adapter: Adapter) -> Adapter:
    """Return an adapter of PEFT's with the component in its modules' names; any other as it is."""
    if adapter.image is not None:
        return adapter
    entries = adapter.modules.entries
    try:
        found = with_components(entries, None, DIFFUSERS)
    except UnsupportedError as error:
        of_base = f" of {adapter.base_model}" if adapter.base_model else ""
        raise MismatchError(
            f"{adapter.name} is an adapter{of_base} with modules of no image model that is known, such as "
            f"{min(entries)}, and others are LoRAs of an image model: merge adapters of one base model"
        ) from error
    new = zip(entries, found, strict=True)
    return adapter.renamed({old: name for old, name in new if name != old})


def _refuse_unknown_names(adapters: Sequence[Adapter]) -> None:
    """Refuse names that no table has, unless all adapters have them in the same form and share some."""
    unknown = [{name for name in one.modules if not is_canonical(name)} for one in adapters]
    pairs = itertools.combinations(zip(adapters, unknown, strict=True), 2)
    for (one, names), (other, theirs) in pairs:
        if not (names or theirs) or names & theirs:
            continue
        if (names and theirs) or _dialect(one) != _dialect(other):
            first, second = (one, other) if names else (other, one)
            raise MismatchError(
                f"{first.name} has {min(names or theirs)}, a name of a model that is not known here, and "
                f"{second.name} has {min(second.modules)}: whether they have weights in common cannot be told; save "
                "both with the same program, such as diffusers, and merge what it writes"
            )


def _dialect(adapter: Adapter) -> str:
    return "" if adapter.image is None else adapter.image.dialect


def _kept_whole_and_in_parts(adapters: Sequence[Adapter]) -> set[str]:
    """Return the fused modules of which some adapter has a part, in a form that can be compared.

    Raises:
        MismatchError: Their shapes do not fit.
    """
    shapes = shapes_of(adapters)
    mixed = {name for name in shapes if any(p in shapes for p in parts_of(name)) and "{" in name}
    for name in mixed:
        for part, rows in rows_of_parts(name, shapes[name]).items():
            if part in shapes and shapes[part][0] != rows.stop - rows.start:
                raise MismatchError(
                    f"{part} has {shapes[part][0]} rows in one adapter, and {rows.stop - rows.start} in {name} of "
                    "another: they belong to different base models"
                )
    return mixed


def _split(adapter: Adapter, mixed: set[str]) -> Adapter:
    """Return an adapter with its fused modules in parts."""
    if not mixed & adapter.modules.entries.keys():
        return adapter
    entries: dict[str, LazyDelta] = {}
    for name, entry in adapter.modules.entries.items():
        entries |= split_entry(name, entry) if name in mixed else {name: entry}
    reopen = adapter.reopen and functools.partial(_split_again, adapter, mixed)
    return dataclasses.replace(adapter, modules=DeltaMapping(entries), reopen=reopen)


def _split_again(adapter: Adapter, mixed: set[str], base: Base) -> Adapter:
    return _split(adapter.on(base), mixed)
