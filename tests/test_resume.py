"""A fold that was killed goes on from its last whole shard, and ends with the bytes of one that was not."""

import errno
import signal

import pytest
from helpers import content, lora

from pcb_peft import load_adapter, merge_adapters
from pcb_peft.errors import NoSpaceError, OptionError
from pcb_peft.writing import fold
from pcb_peft.writing.growing_file import GrowingFile
from pcb_peft.writing.resume import NOTES

KILLED = """
import os, sys
from pcb_peft.commands import cli
from pcb_peft.writing import growing_file
write, files = growing_file.GrowingFile.write, set()
def killed(self, content):
    files.add(self._path)
    if len(files) > 2:
        write(self, content[: len(content) // 2])
        os.kill(os.getpid(), 9)
    write(self, content)
growing_file.GrowingFile.write = killed
sys.exit(cli.main())
"""


@pytest.fixture
def base(workshop):
    """The model, in more than two files."""
    directory = workshop.directory / "sharded"
    workshop.model("llama").save_pretrained(directory, max_shard_size="8KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture
def adapter(workshop):
    return workshop.adapter("llama", lora("q_proj", "down_proj"), "math")


@pytest.fixture
def killed(launch, base, adapter, tmp_path):
    """The directory that a fold left, which was killed while it wrote its third shard."""
    target = tmp_path / "place" / "out"
    codes, _, errors = launch(1, ["-c", KILLED, "fold", adapter, base, "-o", target])
    assert codes == [-signal.SIGKILL], errors
    (leftover,) = target.parent.iterdir()
    assert len(list((leftover / NOTES).iterdir())) == 2
    return target


@pytest.fixture
def written(monkeypatch):
    """The names of the shards that are written from now on."""
    names = []

    class Watched(GrowingFile):
        def __init__(self, path):
            names.append(path.name)
            super().__init__(path)

    monkeypatch.setattr(fold, "GrowingFile", Watched)
    return names


def folded_anew(adapter, base, directory):
    load_adapter(adapter).fold(base, directory)
    return content(directory)


@pytest.mark.slow
def test_a_killed_fold_goes_on_where_it_was_and_makes_the_same_bytes(
    killed, base, adapter, tmp_path, written
):
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    with pytest.warns(UserWarning, match=f"2 of {len(shards)} shards .+ are whole"):
        load_adapter(adapter).fold(base, killed, resume=True)
    assert written == shards[2:]
    assert list(killed.parent.iterdir()) == [killed]
    assert content(killed) == folded_anew(adapter, base, tmp_path / "anew")


@pytest.mark.slow
def test_a_shard_whose_checksum_is_another_is_written_again(
    killed, base, adapter, tmp_path, written
):
    (leftover,) = killed.parent.iterdir()
    first, second = sorted(base.glob("*.safetensors"))[:2]
    damaged = bytearray((leftover / first.name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (leftover / first.name).write_bytes(damaged)
    (leftover / "stray").touch()
    with pytest.warns(UserWarning, match="1 of . shards"):
        load_adapter(adapter).fold(base, killed, resume=True)
    assert second.name not in written
    assert content(killed) == folded_anew(adapter, base, tmp_path / "anew")


def another_adapter(workshop, base):
    return workshop.adapter("llama", lora("q_proj", "down_proj"), "math", seed=2), base


def another_base(workshop, base):
    file = sorted(base.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return workshop.directory / "math", base


@pytest.mark.slow
@pytest.mark.parametrize("change", [another_adapter, another_base])
def test_another_adapter_or_base_starts_anew_and_says_so(
    killed, base, workshop, tmp_path, written, change
):
    adapter, base = change(workshop, base)
    with pytest.warns(UserWarning, match="was removed; it held no whole shard of the same fold"):
        load_adapter(adapter).fold(base, killed, resume=True)
    assert len(written) == len(list(base.glob("*.safetensors")))
    assert content(killed) == folded_anew(adapter, base, tmp_path / "anew")


def test_what_a_run_does_not_finish_is_left_for_the_next_one_if_that_is_asked_for(
    base, adapter, tmp_path, monkeypatch
):
    target, write, files = tmp_path / "place" / "out", GrowingFile.write, set()

    def full(self, content):
        files.add(self._path)
        if len(files) > 2:
            raise NoSpaceError(errno.ENOSPC, "No space left on device")
        write(self, content)

    merged = merge_adapters([adapter, adapter], weights=[1, 2], rank="full")
    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "write", full)
        with pytest.raises(NoSpaceError), pytest.warns(UserWarning, match="is left there, for a"):
            merged.fold(base, target, resume=True)
        files.clear()
        with (
            pytest.raises(NoSpaceError),
            pytest.warns(UserWarning, match="a killed run .+ was removed$"),
        ):
            merged.fold(base, target)
        assert list(target.parent.iterdir()) == []
        files.clear()
        with pytest.raises(NoSpaceError), pytest.warns(UserWarning, match="is left there, for a"):
            merged.fold(base, target, resume=True)
    with pytest.warns(UserWarning, match="2 of . shards"):
        merged.fold(base, target, resume=True)
    merged.fold(base, tmp_path / "anew")
    assert content(target) == content(tmp_path / "anew")


def test_what_no_other_run_knows_again_is_refused(workshop, base, adapter, tmp_path):
    live = workshop.peft_model("llama", lora("q_proj"))
    with pytest.raises(OptionError, match="resume: default is in memory"):
        load_adapter((live, "default")).fold(base, tmp_path / "out", resume=True)
    with pytest.raises(OptionError, match="would not be compared"):
        load_adapter(adapter).fold(base, tmp_path / "out", resume=True, compare_base=base)


@pytest.mark.slow
def test_other_numbers_of_processes_continue_it(launch, killed, base, adapter, tmp_path):
    words = ["-m", "pcb_peft", "fold", adapter, base, "-o", killed, "--resume"]
    codes, _, errors = launch(2, words)
    assert codes == [0, 0], errors
    assert "shards of a run that was ended are whole" in errors[0]
    assert content(killed) == folded_anew(adapter, base, tmp_path / "anew")
