"""One weight, one name: adapters of one base model that call its modules by different names.

An adapter's names depend on the class that the model was loaded as, and on the version of transformers. Where the base
model is known, its own code says which names mean one weight (`pcb_peft.base.canonical`). Where it is not, names that
may mean one weight are refused: merged as two modules, one of the two adapters would be lost without a word.
"""

import importlib.metadata
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import CanonicalNames, canonical_names
from pcb_peft.base.config import read_config
from pcb_peft.base.hub import configuration_directory
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import BaseModelError, MismatchError, PcbPeftError
from pcb_peft.merging.image_names import image_adapters
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.runtime.shown import some_of


def under_one_name(
    adapters: Sequence[Adapter], base: Callable[[], BaseModel] | None
) -> tuple[list[Adapter], list[str]]:
    """Call every module by one name in all adapters.

    Args:
        adapters: The adapters that are merged.
        base: The base model, if the caller gave one. Otherwise the model that the adapters name is looked at, if its
            configuration is on this machine and their names alone do not settle the matter.

    Returns:
        The adapters, renamed where they have to be; and notes for the report.

    Raises:
        MismatchError: A module is not in the base model that was given; two names of one adapter mean one module; or
            names may mean one weight, and no base model says whether they do.
    """
    if any(adapter.image for adapter in adapters):
        return image_adapters(adapters)
    opened, notes = _opened(base)
    names = (
        _names_of_named(adapters, notes)
        if opened is None
        else _names_of(opened.directory, adapters)
    )
    if not names:
        _refuse_equal_tails(adapters)
        return list(adapters), notes
    if (skeleton := names.skeleton) is not None:
        adapters = [adapter.split_as(skeleton) for adapter in adapters]
    paths = [[*adapter.modules, *_replaced_modules(adapter)] for adapter in adapters]
    renamed: list[Adapter] = []
    for adapter, found in zip(adapters, names.of(paths), strict=True):
        if opened is not None:
            _refuse_unknown(adapter, [m for m in adapter.modules if found[m] is None], opened)
        changed = {old: new for old, new in found.items() if new is not None and new != old}
        renamed.append(adapter.renamed(changed))
        if changed:
            old, new = next(iter(changed.items()))
            notes.append(
                f"{adapter.name}: {len(changed)} modules have other names today: {old} is {new}"
            )
    return renamed, notes


def _opened(base: Callable[[], BaseModel] | None) -> tuple[BaseModel | None, list[str]]:
    """Open the base model; one that is not on this machine settles the adapters' names for it, and no more."""
    try:
        return (None if base is None else base()), []
    except BaseModelError as error:
        return None, [f"no module was looked up in the base model: {error}"]


def _names_of_named(adapters: Sequence[Adapter], notes: list[str]) -> CanonicalNames:
    """Return the names in the model that the adapters name; none, and a note, where it cannot be built."""
    directory = _named_model(adapters)
    if directory is None:
        return CanonicalNames([])
    names = _names_of(directory, adapters)
    try:
        bool(names)
    except BaseModelError as error:
        notes.append(f"the base model that the adapters name was not looked at: {error}")
        return CanonicalNames([])
    return names


def _names_of(directory: Path, adapters: Sequence[Adapter]) -> CanonicalNames:
    return canonical_names(directory, [adapter.task_type for adapter in adapters])


def _replaced_modules(adapter: Adapter) -> list[str]:
    """Return the modules whose parameters or token rows an adapter replaces."""
    parameters = (name.rpartition(".")[0] for name in adapter.head.parameters)
    return [m for m in dict.fromkeys([*parameters, *adapter.head.rows]) if m not in adapter.modules]


def _named_model(adapters: Sequence[Adapter]) -> Path | None:
    """Return the directory of the base model that the adapters name, if its architecture has to be looked at.

    It has to where the model consists of several (a language and a vision model, say), or where equal layers lie under
    different paths; transformers takes seconds to import.
    """
    bases = {str(adapter.base_model) for adapter in adapters if adapter.base_model}
    directory = (
        configuration_directory(bases.pop(), adapters[0].revision) if len(bases) == 1 else None
    )
    if directory is None:
        return None
    try:
        config = read_config(directory)
    except BaseModelError:
        return None
    nested = any(isinstance(part, dict) for part in _model_parts(config))
    return directory if nested or any(_equal_tails(adapters)) else None


def _model_parts(config: dict[str, object]) -> Iterator[object]:
    return (
        value for key, value in config.items() if key.endswith("_config") and "quant" not in key
    )


def _refuse_unknown(adapter: Adapter, modules: Collection[str], base: BaseModel) -> None:
    """Refuse modules that the base model does not have, in memory or in its files."""
    missing = [module for module in sorted(modules) if not _is_in_files(module, base)]
    if missing:
        raise MismatchError(
            f"{adapter.name}: {some_of(missing)} not in the base model {base.source}"
            f"{did_you_mean(missing[0], base.names.files)}; give the base that the adapter was trained on. If it is, "
            f"another version of transformers may name them so: {importlib.metadata.version('transformers')} does not"
        )


def _is_in_files(module: str, base: BaseModel) -> bool:
    try:
        return bool(base.shape(module))
    except PcbPeftError:
        return False


def _refuse_equal_tails(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that share no list of layers, but have layers of the same names under different paths."""
    for one, module, other, counterpart in _equal_tails(adapters):
        raise MismatchError(
            f"{one.name} has {module}, and {other.name} has {counterpart}: they may be one weight under two names (of "
            "two classes of the model, or two versions of transformers), and merged as two, one of them would be lost; "
            "give the base model, which settles it: base_model=…, --base-model …"
        )


def _equal_tails(adapters: Sequence[Adapter]) -> Iterator[tuple[Adapter, str, Adapter, str]]:
    """Yield pairs of modules in lists of layers that two adapters name alike, under different paths."""
    listed = [(adapter, _lists(adapter)) for adapter in adapters]
    for (one, lists), (other, others) in itertools.combinations(listed, 2):
        if not lists.keys().isdisjoint(others):
            continue
        for (path, module), (path_there, counterpart) in itertools.product(
            lists.items(), others.items()
        ):
            alike = path.rpartition(".")[2] == path_there.rpartition(".")[2]
            if alike and not _different_shapes(one, path, other, path_there):
                yield one, module, other, counterpart


def _different_shapes(one: Adapter, path: str, other: Adapter, path_there: str) -> bool:
    """Return whether equal modules of two lists of layers have different shapes: then they are two lists."""
    pairs = ((module, path_there + module.removeprefix(path)) for module in one.modules)
    entries, there = one.modules.entries, other.modules.entries
    return any(b in there and entries[a].shape != there[b].shape for a, b in pairs)


def _lists(adapter: Adapter) -> dict[str, str]:
    """Return the lists of layers that an adapter touches: the path of each, and its first module."""
    lists: dict[str, str] = {}
    for module in adapter.modules:
        parts = module.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal() and i), None)
        if place is not None:
            lists.setdefault(".".join(parts[:place]), module)
    return lists
