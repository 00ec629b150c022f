import errno
import filecmp
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pcb_peft.errors import OutputError
from pcb_peft.writing import atomic, growing_file
from pcb_peft.writing.atomic import copy_file, replace_directory, write_file_atomically
from pcb_peft.writing.growing_file import GrowingFile
from pcb_peft.writing.manifest import MANIFEST
from pcb_peft.writing.tensors_file import save_tensors


def write(target, text="new", *, overwrite=False):
    with replace_directory(target, overwrite=overwrite) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text(text)


def content(target):
    return (target / "sub" / "file").read_text()


@pytest.fixture
def without_exchange(monkeypatch):
    """As on a file system that cannot exchange two directories."""
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_new_directory_appears_with_its_parents_and_nothing_beside_it(tmp_path):
    target = tmp_path / "a" / "b"
    write(target)
    assert content(target) == "new"
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_directory_is_replaced(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    write(target)
    assert content(target) == "new"


def test_a_full_directory_is_replaced_only_on_request(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    with pytest.raises(OutputError, match=r"overwrite=True, --overwrite"):
        write(target)
    assert content(target) == "old"
    write(target, overwrite=True)
    assert content(target) == "new"
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, "sub"]
    assert list(tmp_path.iterdir()) == [target]


def added(target):
    (target / "notes.txt").write_text("of the user")


def added_folder(target):
    (target / "sub" / "more").mkdir()


def changed(target):
    (target / "sub" / "file").write_text("edited")


def linked(target):
    (target / "sub" / "link").symlink_to(target)


def from_elsewhere(target):
    (target / MANIFEST).unlink()


@pytest.mark.parametrize("change", [added, added_folder, changed, linked, from_elsewhere])
def test_what_this_package_did_not_write_is_replaced_only_on_a_second_word(tmp_path, change):
    target = tmp_path / "out"
    write(target, "old")
    change(target)
    before = sorted(target.rglob("*"))
    with pytest.raises(OutputError, match=r"did not write.+overwrite='all', --overwrite-all"):
        write(target, overwrite=True)
    assert sorted(target.rglob("*")) == before
    write(target, overwrite="all")
    assert content(target) == "new"


@pytest.mark.parametrize("of_output", [".", "..", "in", "../other/../out", "../link"])
def test_an_output_does_not_contain_its_inputs_nor_lie_in_them(tmp_path, of_output):
    target = tmp_path / "out"
    write(target, "old")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "other").mkdir()
    (target / "in").mkdir()
    given = target / of_output
    with (
        pytest.raises(OutputError, match=r"from which the output is made"),
        replace_directory(target, overwrite="all", inputs=["a/hub-id", None, given]),
    ):
        pytest.fail("it was let in")
    assert content(target) == "old"


def test_a_file_to_which_an_input_leads_by_a_link_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights").symlink_to(target / "sub" / "file")
    with (
        pytest.raises(OutputError, match=r"out contains what .+in/weights leads to"),
        replace_directory(target, overwrite=True, inputs=[tmp_path / "in"]),
    ):
        pytest.fail("it was let in")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_failure_the_old_directory_is_there_and_nothing_else(tmp_path, error):
    target = tmp_path / "out"
    write(target, "old")

    def fails():
        with replace_directory(target, overwrite=True) as directory:
            (directory / "half").touch()
            raise error

    with pytest.raises(error):
        fails()
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("without_exchange")
def test_if_the_last_rename_fails_the_old_directory_comes_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write(target, "old")
    rename = Path.rename

    def fails(self, to):
        if self.suffix == ".tmp":
            raise PermissionError(to)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="cannot be written"):
        write(target, overwrite=True)
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("without_exchange")
def test_an_interruption_after_the_last_rename_leaves_nothing_beside(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write(target, "old")
    rename = Path.rename

    def interrupted(self, to):
        rename(self, to)
        if self.suffix == ".tmp":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(target, overwrite=True)
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interruption_while_the_half_is_removed_leaves_nothing(tmp_path, monkeypatch):
    calls = []
    rmtree = shutil.rmtree

    def interrupted(directory, **options):
        calls.append(directory)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(directory, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)

    def fails():
        with replace_directory(tmp_path / "out", overwrite=False) as directory:
            (directory / "half").touch()
            raise ValueError

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_a_growing_file_has_no_thread_before_it_has_work(tmp_path):
    """One that an interruption leaves behind before the block begins would keep the process from ending."""
    before = threading.active_count()
    file = GrowingFile(tmp_path / "file")
    assert threading.active_count() == before
    with file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_what_the_disk_says_while_a_file_grows_is_not_lost(tmp_path, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(growing_file, "_SYNCED_AT_ONCE", 1)
    monkeypatch.setattr(os, "fsync", broken)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        GrowingFile(tmp_path / "file") as file,
    ):
        file.write(b"content")


def test_a_directory_filled_in_the_meantime_is_not_replaced(tmp_path):
    target = tmp_path / "out"

    def is_late():
        with replace_directory(target, overwrite=False):
            write(target, "of another process")

    with pytest.raises(OutputError, match="not empty"):
        is_late()
    assert content(target) == "of another process"


KILLED = """
import os, signal, sys
from pathlib import Path
from pcb_peft.writing import atomic
step, target = sys.argv[1], Path(sys.argv[2])
rename, exchange, sync = Path.rename, atomic.exchange, atomic._sync
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
def renamed(path, to):
    rename(path, to)
    kill()
if step == "writing": atomic._sync = kill
if step == "exchanged": atomic._sync_directory = lambda path: kill() if path == target.parent else None
if step in ("aside", "moved"): atomic.exchange = lambda *_: False
if step == "aside": Path.rename = renamed
if step == "moved": atomic.remove = kill
with atomic.replace_directory(target, overwrite=True) as directory:
    (directory / "sub").mkdir()
    (directory / "sub" / "file").write_text("killed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "left", "said"),
    [
        ("writing", "old", "was removed"),
        ("exchanged", "killed", "was removed"),
        ("aside", None, "its new content is there now"),
        ("moved", "killed", "was removed"),
    ],
)
def test_a_killed_run_leaves_the_old_or_the_new_and_the_next_one_repairs_and_says_it(
    tmp_path, step, left, said
):
    target = tmp_path / "out"
    write(target, "old")
    command = [sys.executable, "-c", KILLED, step, str(target)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (content(target) if target.exists() else None) == left
    with pytest.warns(UserWarning, match=said), pytest.raises(OutputError, match="not empty"):
        write(target)
    assert content(target) == (left or "killed")
    assert list(tmp_path.iterdir()) == [target]
    write(target, overwrite=True)
    assert content(target) == "new"


def test_an_old_directory_that_was_set_aside_alone_comes_back(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    target.rename(tmp_path / f".out.{'0' * 32}.old")
    with pytest.warns(UserWarning, match="its old content is there again"):
        write(target, overwrite=True)
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_directory_of_a_live_run_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with replace_directory(target, overwrite=True) as directory:
        write(target, "of another run")
        assert directory.is_dir()
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("of this one")
    assert content(target) == "of this one"


def test_names_of_the_greatest_length_are_written(tmp_path):
    target = tmp_path / ("x" * 255)
    write(target)
    write_file(tmp_path / ("y" * 255))
    assert content(target) == "new"


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "loop"])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError):
        write(tmp_path / name)
    with pytest.raises(OutputError):
        write_file(tmp_path / name)


def test_modes_are_those_that_the_umask_gives(tmp_path, umask):
    with replace_directory(tmp_path / "out", overwrite=False) as directory:
        (directory / "sub").mkdir()
        for name in ("closed", "sub/closed"):
            (directory / name).touch(mode=0o600)
        (directory / "open").touch()
        (directory / "open").chmod(0o777)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))
    }
    files, folders = 0o666 & ~umask, 0o777 & ~umask
    assert modes.pop(MANIFEST) == files
    assert modes == {"out": folders, "sub": folders, "closed": files, "open": files}


@pytest.mark.parametrize("mode", [0o700, 0o2775, 0o555])
def test_a_directory_that_is_replaced_hands_on_its_mode(tmp_path, mode):
    target = tmp_path / "out"
    write(target, "old")
    target.chmod(mode)
    write(target, overwrite=True)
    assert content(target) == "new"
    assert stat.S_IMODE(target.stat().st_mode) == mode
    target.chmod(0o755)


def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path):
    target = tmp_path / "out"
    write_file(target, "old")
    target.chmod(0o640)
    write_file(target, overwrite=True)
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("target", [".", "..", "/", ""])
def test_the_current_directory_and_those_above_it_are_refused(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="current directory"):
        write(Path(target), overwrite=True)


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "out")
    with pytest.raises(OutputError, match="mount point"):
        write(tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file cannot be written"):
        write(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match=r"proc/out cannot be written"):
        write(Path("/proc/out"))  # where mkdir finds no place, again and again


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "new"


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    fsync, rename = os.fsync, Path.rename

    def record(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(self, to):
        wanted = {path.stat().st_ino for path in (self, *self.rglob("*"))}
        assert wanted <= set(synced)
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", check)
    write(tmp_path / "out")
    assert tmp_path.stat().st_ino == synced[-1]


def write_file(target, text="new", *, overwrite=False):
    write_file_atomically(target, lambda path: path.write_text(text), overwrite=overwrite)


def test_a_new_file_appears_alone_and_has_the_mode_of_the_umask(tmp_path, umask):
    def closed(path):
        path.touch(mode=0o600)
        path.write_text("new")

    target = tmp_path / "out"
    write_file_atomically(target, closed, overwrite=False)
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_only_on_request(tmp_path):
    target = tmp_path / "out"
    write_file(target, "old")
    with pytest.raises(OutputError, match=r"exists.*overwrite=True, --overwrite"):
        write_file(target)
    assert target.read_text() == "old"
    write_file(target, overwrite=True)
    assert target.read_text() == "new"


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out").read_text() == "new"


@pytest.mark.parametrize("write_output", [write, write_file], ids=["directory", "file"])
def test_what_another_process_wrote_in_the_last_moment_is_not_replaced(
    tmp_path, monkeypatch, write_output
):
    target, checked = tmp_path / "out", []

    def too_early(place, **options):
        check(place, **options)
        checked.append(place)
        if len(checked) == 2:
            monkeypatch.undo()
            write_output(place, "of another process")

    name = "check_target" if write_output is write else "check_file_target"
    check = getattr(atomic, name)
    monkeypatch.setattr(atomic, name, too_early)
    with pytest.raises(OutputError, match="cannot be written"):
        write_output(target)
    text = content(target) if write_output is write else target.read_text()
    assert text == "of another process"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_while_a_file_is_written_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "out"
    write_file(target, "old")

    def fails(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        write_file_atomically(target, fails, overwrite=True)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_a_process_that_is_killed_before_the_rename_leaves_the_old_file(tmp_path):
    target = tmp_path / "out"
    write_file(target, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from pcb_peft.writing import atomic\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write = lambda path: path.write_text('new')\n"
        "atomic.write_file_atomically(Path(sys.argv[1]), write, overwrite=True)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_a_file_is_synced_before_it_is_renamed_and_its_directory_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(self, to):
        calls.append("rename")
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_file(tmp_path / "out", overwrite=True)
    assert calls == ["file", "rename", "directory"]


def test_a_full_disk_is_said_in_words(tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device; make room"):
        write_file_atomically(tmp_path / "out", full, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_cannot_take_the_place_of_a_directory_or_lie_nowhere(tmp_path):
    with pytest.raises(OutputError, match="is a directory"):
        write_file(tmp_path, overwrite=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="a device or a pipe"):
        write_file(tmp_path / "pipe", overwrite="all")
    with pytest.raises(OutputError, match="nowhere, which does not exist"):
        write_file(tmp_path / "nowhere" / "out")


def test_a_copy_takes_no_more_place_than_the_original(tmp_path):
    source, target = tmp_path / "sparse", tmp_path / "copy"
    with source.open("wb") as file:
        for place in (0, 1 << 20, (1 << 28) - 9):
            file.seek(place)
            file.write(b"content")
        file.truncate(1 << 28)
    copy_file(source, target)
    assert target.stat().st_size == 1 << 28
    assert target.stat().st_blocks <= source.stat().st_blocks
    assert filecmp.cmp(source, target, shallow=False)
    (tmp_path / "empty").touch()
    copy_file(tmp_path / "empty", target)
    assert target.read_bytes() == b""


def test_a_directory_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    scan = os.scandir

    def broken(path):
        if ".tmp" in str(path) and not isinstance(path, int):
            raise OSError(errno.EIO, "Input/output error", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == "old"


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path):
    metadata = dict.fromkeys("zyxwvutsrq", "text")
    for number in range(3):
        save_tensors({"weight": torch.ones(2)}, tmp_path / str(number), metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
