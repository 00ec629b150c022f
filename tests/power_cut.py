"""A disk that forgets what was not synced, when the power fails: what it may hold after each call of a program.

The calls are those that the layer of faults.py notes. A file has its content if it was synced after it was last
written, and is empty otherwise. The names in a directory are those of its last sync, and of any number of the changes
after it, in their order, as file systems with a journal keep them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

Names: TypeAlias = dict[str, "File | Folder"]


@dataclasses.dataclass(eq=False)
class File:
    synced: bool = False

    def sync(self) -> None:
        self.synced = True


@dataclasses.dataclass(eq=False)
class Folder:
    names: Names = dataclasses.field(default_factory=dict)
    history: list[Names] = dataclasses.field(default_factory=lambda: [{}])  # since the last sync

    def change(self, changed: Mapping[str, "File | Folder | None"]) -> None:
        self.names = {n: f for n, f in (self.names | changed).items() if f is not None}
        self.history.append(self.names)

    def sync(self) -> None:
        self.history = [self.names]


class Disk:
    """The files below a directory, as a program changes them."""

    def __init__(self, root: Path, content: Mapping[str, bytes]) -> None:
        """Take the files that are there at the beginning, all of them synced."""
        self.root, self.folder = root, Folder()
        for name in content:
            folder = self.folder
            *above, last = Path(name).parts
            for part in above:
                folder = folder.names.setdefault(part, Folder())  # type: ignore[assignment]
            folder.names[last] = File(synced=True)
        self.content = {self._at(root / name): text for name, text in content.items()}
        self._sync_all(self.folder)

    def _sync_all(self, folder: Folder) -> None:
        folder.sync()
        for one in folder.names.values():
            if isinstance(one, Folder):
                self._sync_all(one)

    def _has(self, folder: Path) -> bool:
        try:
            self._at(folder)
        except (KeyError, ValueError):  # not there, or above the root
            return folder == self.root.parent
        return True

    def _at(self, path: Path) -> File | Folder:
        found: File | Folder = self.folder
        for part in path.relative_to(self.root).parts:
            assert isinstance(found, Folder)
            found = found.names[part]
        return found

    def call(self, name: str, path: Path, other: Path) -> None:
        """Apply one call; those that change nothing are passed over."""
        if not path.is_relative_to(self.root) or not self._has(path.parent):
            return  # elsewhere, or in a folder that is not there, where every call fails
        if name not in ("create", "mkdir"):
            self._find(path)
        if name in ("fsync", "fdatasync"):
            self._at(path).sync()
        elif name in ("write", "writev", "pwrite64", "ftruncate64", "sendfile64"):
            self._at(path).synced = False  # type: ignore[union-attr]
        elif name in ("create", "mkdir", "unlink", "rmdir") and path != self.root:
            self._change_one(name, path)
        elif name in ("rename", "exchange"):
            self._move(path, other, exchange=name == "exchange")

    def _find(self, path: Path) -> None:
        """Rename a file that safetensors has renamed: it writes into ``.tmp…``, and asks the kernel past the layer."""
        if path == self.root or path.name in (names := self._folder(path).names):
            return
        for name in [name for name in names if name.startswith(".tmp")]:
            self._move(path.with_name(name), path, exchange=False)

    def _move(self, path: Path, other: Path, *, exchange: bool) -> None:
        changes = {path: self._at(other) if exchange else None, other: self._at(path)}
        if path.parent == other.parent:
            self._folder(path).change({place.name: file for place, file in changes.items()})
            return
        for place, file in changes.items():
            self._folder(place).change({place.name: file})

    def _folder(self, path: Path) -> Folder:
        folder = self._at(path.parent)
        assert isinstance(folder, Folder)
        return folder

    def _change_one(self, name: str, path: Path) -> None:
        folder, new = self._folder(path), {"create": File(), "mkdir": Folder()}.get(name)
        if new is None or path.name not in folder.names:
            folder.change({path.name: new})
        elif name == "create":  # and cut to nothing
            self._at(path).synced = False  # type: ignore[union-attr]


def states(
    root: Path, before: Mapping[str, bytes], after: Mapping[str, bytes], log: Sequence[str]
) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Yield, for each call and each way in which the power may fail there, the files that are there afterwards.

    Args:
        root: The directory.
        before: Its files at the beginning.
        after: Its files at the end.
        log: The calls, as the layer notes them.

    Yields:
        The call, and path to content; None for a folder.
    """
    calls = [line.split("\t")[1:] for line in log]
    disk = Disk(root, before)
    steps: list[tuple[str, list[dict[str, tuple[File, bool] | None]]]] = []
    for name, path, other in calls:
        disk.call(name, Path(path), Path(other))
        ways = [dict(_files(names, "")) for names in disk.folder.history]
        steps.append((f"{name} {Path(path).name}", ways))
    contents = {disk._at(disk.root / name): text for name, text in after.items()} | disk.content
    for call, ways in steps:
        for way in ways:
            yield (
                call,
                {
                    path: None if file is None else contents.get(file[0], b"") if file[1] else b""
                    for path, file in way.items()
                },
            )


def _files(names: Names, above: str) -> Iterator[tuple[str, tuple[File, bool] | None]]:
    """Yield path to file, and whether it is synced now; folders have the names of their last sync."""
    for name, one in names.items():
        if isinstance(one, File):
            yield above + name, (one, one.synced)
        else:
            yield above + name, None
            yield from _files(one.history[0], f"{above}{name}/")
