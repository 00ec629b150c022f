"""A fold in pieces: the same bytes however it is cut up and shared out, and nothing left behind when it fails."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from pcb_peft.base.model import open_base_model
from pcb_peft.deltas.delta import Dense, Diagonal, LowRank
from pcb_peft.deltas.linalg import row_slices
from pcb_peft.errors import BaseModelError, MismatchError, OutputError
from pcb_peft.runtime.threads import side_by_side
from pcb_peft.writing import chunks, fold, growing_file
from pcb_peft.writing.fold import fold_deltas

SHAPES = {"wide": (70, 900), "high": (515, 64), "row": (1, 33), "plain": (64, 64), "scaled": (9, 5)}


def checkpoint(directory, dtype=torch.bfloat16, **values):
    """Of an architecture that transformers does not know."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()} | values
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    tensors = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return open_base_model(directory)


def deltas():
    torch.manual_seed(1)
    loras = {
        name: LowRank(torch.randn(8, SHAPES[name][1]), torch.randn(SHAPES[name][0], 8), scaling)
        for name, scaling in {"wide": 1.5, "high": -0.5, "row": 1.0}.items()
    }
    return loras | {
        "plain": Dense(torch.randn(64, 64)),
        "scaled": Diagonal(l=torch.randn(5), feedforward=True),
    }


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(fold, "CHUNK_VALUES", 1000)
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1000)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("small_pieces")
def test_neither_pieces_nor_threads_change_a_byte(tmp_path, threads, dtype):
    wider = torch.promote_types(dtype, torch.float32)
    base = checkpoint(tmp_path / "base", dtype)
    fold_deltas(deltas(), base, tmp_path / "out")
    folded = open_base_model(tmp_path / "out")
    for name, delta in deltas().items():
        weight = base.tensor(f"{name}.weight")
        change = delta.delta(weight)
        expected = (weight.to(wider) + change).to(dtype)
        if isinstance(delta, Diagonal):
            expected = (weight.to(wider) * delta.l).to(dtype)
        assert torch.equal(folded.tensor(f"{name}.weight"), expected), name
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "cols"), [(1, 900), (8, 7), (16, 900), (100, 65)])
def test_a_product_by_slices_of_its_rows_is_the_product(rank, cols, dtype):
    for rows in (1, 3, 4, 7, 70, 403):
        torch.manual_seed(0)
        left, right = torch.randn(rows, rank, dtype=dtype), torch.randn(rank, cols, dtype=dtype)
        for height in (1, 5, 17, 64, rows):
            slices = row_slices((rows, cols), height * cols)
            assert torch.equal(torch.cat([left[part] @ right for part in slices]), left @ right)
            assert len(slices) <= max(1, rows // 4)


@pytest.mark.usefixtures("small_pieces", "threads")
def test_a_tensor_that_is_not_changed_is_copied_in_pieces(tmp_path):
    base = checkpoint(tmp_path / "base", other=torch.randint(255, (3001,), dtype=torch.uint8))
    fold_deltas({}, base, tmp_path / "out")
    files = [directory / "model.safetensors" for directory in (base.directory, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_values_whose_sum_alone_is_infinite_are_accepted(tmp_path):
    base = checkpoint(tmp_path / "base", torch.float16, plain=torch.full((64, 64), 6e4).half())
    fold_deltas({"plain": Dense(torch.zeros(64, 64))}, base, tmp_path / "out")
    with pytest.raises(MismatchError, match=r"plain.weight would hold NaN or infinite values"):
        fold_deltas({"plain": Dense(torch.full((64, 64), 1e4))}, base, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def folding_over(old, base, changes=None):
    old.mkdir()
    (old / "kept").write_text("old")
    changes = deltas() if changes is None else changes
    return lambda: fold_deltas(changes, base, old, overwrite="all")


def assert_kept(old):
    assert [path.name for path in old.iterdir()] == ["kept"]
    assert {path.name for path in old.parent.iterdir()} == {"base", old.name}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("changes", [{}, deltas()])
def test_a_file_that_is_cut_off_meanwhile_is_named(tmp_path, changes):
    base = checkpoint(tmp_path / "base")
    folds = folding_over(tmp_path / "out", base, changes)
    os.truncate(tmp_path / "base" / "model.safetensors", 5000)
    with pytest.raises(BaseModelError, match=r"model.safetensors became shorter"):
        folds()
    assert_kept(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="has no limit of a file's size")
@pytest.mark.usefixtures("threads")
def test_a_full_disk_leaves_the_old_output(tmp_path):
    import resource

    folds = folding_over(tmp_path / "out", checkpoint(tmp_path / "base"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"model.safetensors cannot be written.+make room"):
            folds()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_kept(tmp_path / "out")


def test_a_disk_that_fails_behind_the_writer_leaves_the_old_output(tmp_path, monkeypatch):
    folds = folding_over(tmp_path / "out", checkpoint(tmp_path / "base"))
    failures = [OSError(5, "Input/output error")]
    sync = os.fsync

    def fails_once(descriptor):
        if failures:
            raise failures.pop()
        sync(descriptor)

    monkeypatch.setattr(growing_file, "_SYNCED_AT_ONCE", 1000)
    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OutputError, match=r"cannot be written: Input/output error"):
        folds()
    assert not failures
    assert_kept(tmp_path / "out")


def test_items_are_taken_by_the_caller_and_come_back_in_their_order():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    results = side_by_side(lambda number: (number, torch.get_num_threads()), items(), 3)
    assert next(results) == (0, 1)
    assert len(taken) == 7
    assert list(results) == [(number, 1) for number in range(1, 20)]
