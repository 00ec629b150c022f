"""Many processes make the bytes that one makes, or stop together."""

import json
import signal
from pathlib import Path

import peft
import pytest
from helpers import content

from pcb_peft.runtime.processes import ALONE, Processes, all_processes, current, stoppable

HERE = Path(__file__).parent
CASES = {
    "pcb": {"method": "pcb", "space": "dense", "scope": "global"},
    "pcb-paper": {"method": "pcb", "space": "core", "scope": "global", "formula": "paper"},
    "knots": {"method": "pcb", "space": "knots", "scope": "module"},
    "dare": {"method": "dare_linear", "space": "dense", "scope": "global", "rank": 3},
    "ties": {"method": "ties", "space": "dense", "scope": "global"},
    "svc": {"method": "tsv", "after": ["svc", "amplitude"]},
    "budget": {"method": "linear", "rank": "budget:40"},
    "mixed": {
        "method": "ties",
        "scope": "global",
        "overrides": [{"modules": "*.self_attn.q_proj", "method": "linear", "scope": "global"}],
    },
}
FOLDS = {
    "folded": {"method": "pcb", "space": "dense", "scope": "global", "rank": "full"},
    "folded-lowrank": {"method": "ties", "space": "core", "scope": "module"},
}


@pytest.fixture(scope="module")
def adapters(shared_workshop):
    configs = [
        peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"])
        for rank in (2, 3, 4)
    ]
    return [str(path) for path in shared_workshop.adapters("llama", configs)]


@pytest.fixture(scope="module")
def base(shared_workshop):
    """The model, in three files."""
    directory = shared_workshop.directory / "sharded"
    shared_workshop.model("llama").save_pretrained(directory, max_shard_size="8KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return str(directory)


def merged_by(launch, count, directory, adapters, cases, **options):
    """The cases, merged by so many processes into a new directory."""
    directory.mkdir()
    words = {"adapters": adapters, "cases": cases, "output": str(directory)}
    file = directory.with_suffix(".json")
    file.write_text(json.dumps(words))
    return launch(count, [HERE / "launched.py", file], **options)


@pytest.fixture(scope="module")
def alone(launch, shared_workshop, adapters, base):
    """What one process makes of all cases."""
    directory = shared_workshop.directory / "alone"
    cases = CASES | {name: case | {"fold": base} for name, case in FOLDS.items()}
    codes, _, errors = merged_by(launch, 1, directory, adapters, cases)
    assert codes == [0], errors
    return content(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "names", "fresh"),
    [
        (4, [*CASES, *FOLDS], False),
        # new interpreters, with hash seeds that differ; importing takes longer than what they merge
        (2, ["mixed", "budget", "folded"], True),
    ],
    ids=["4", "2-with-other-hash-seeds"],
)
def test_many_processes_make_the_bytes_of_one(
    launch, tmp_path, adapters, base, alone, count, names, fresh
):
    every = CASES | {name: case | {"fold": base} for name, case in FOLDS.items()}
    cases = {name: every[name] for name in names}
    codes, _, errors = merged_by(launch, count, tmp_path / "together", adapters, cases, fresh=fresh)
    assert codes == [0] * count, errors
    together = content(tmp_path / "together")
    wanted = {name: text for name, text in alone.items() if name.split("/")[0] in cases}
    assert {name.split("/")[0] for name in together} == cases.keys()
    assert together.keys() == wanted.keys()
    assert [name for name in wanted if together[name] != wanted[name]] == []


@pytest.mark.slow
def test_what_rescales_w_is_the_same_too(launch, tmp_path, shared_workshop, adapters, base):
    """A delta comes from another process without its W, which is read again."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], use_dora=True)
    workshop = type(shared_workshop)(tmp_path)
    paths = [str(workshop.adapter("llama", config, f"dora{seed}", seed=seed)) for seed in (1, 2)]
    cases = {
        "pcb": {"method": "pcb", "scope": "global"},
        "budget": {"method": "linear", "rank": "budget:30"},
        "folded": {"method": "pcb", "fold": base},
        "folded-budget": {"method": "linear", "rank": "budget:30", "fold": base},
    }
    cases = {name: case | {"base_model": base} for name, case in cases.items()}
    for count, name in ((1, "one"), (2, "two")):
        codes, _, errors = merged_by(launch, count, tmp_path / name, [*paths, adapters[0]], cases)
        assert codes == [0] * count, errors
    assert json.loads(content(tmp_path / "two")["pcb/adapter_config.json"])["use_dora"]
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_a_metric_is_measured_once_for_all_processes(launch, tmp_path, adapters, base):
    """Each count has a cache of its own, so that the model is run each time."""
    case = {"method": "flat", "rank": 2, "metric": "random", "base_model": base}
    for count, name in ((1, "one"), (2, "two")):
        cache = str(tmp_path / f"cache of {name}")
        made = merged_by(
            launch, count, tmp_path / name, adapters, {"out": case}, XDG_CACHE_HOME=cache
        )
        assert made.codes == [0] * count, made.errors
        assert len(list((tmp_path / f"cache of {name}").rglob("*.safetensors"))) == 1
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_threads_that_merge_modules_side_by_side_make_the_bytes_of_one(
    launch, tmp_path, adapters, base, alone
):
    cases = CASES | {name: case | {"fold": base} for name, case in FOLDS.items()}
    codes, _, errors = merged_by(launch, 1, tmp_path / "threads", adapters, cases, threads=3)
    assert codes == [0], errors
    assert content(tmp_path / "threads") == alone


@pytest.mark.slow
def test_the_command_line_in_more_processes_than_there_are_modules(
    launch, tmp_path, shared_workshop
):
    configs = [
        peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0]) for _ in "ab"
    ]
    workshop = type(shared_workshop)(tmp_path)
    paths = workshop.adapters("llama", configs)
    words = ["-m", "pcb_peft", "merge", *paths, "--space", "dense", "--scope", "global"]
    codes, (_, *silent), errors = launch(1, [*words, "-o", tmp_path / "one"])
    assert codes == [0], errors
    codes, (said, *silent), errors = launch(3, [*words, "-o", tmp_path / "three"])
    assert codes == [0, 0, 0], errors
    assert said.count("written to") == 1
    assert silent == ["", ""]
    assert content(tmp_path / "three") == content(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise ValueError('no luck')", "process 1 of 3: ValueError: no luck"),
        ("import os; os._exit(9)", "ended without a word"),
        ("import os; os.kill(os.getpid(), 2)", "ended without a word"),
        ("import os; os.kill(os.getpid(), 15)", "ended without a word"),
        ("raise SystemExit(3)", "ended without a word"),
    ],
)
def test_if_one_fails_all_stop_with_its_error_and_nothing_is_left(
    launch, tmp_path, adapters, how, message
):
    cases = {"out": {"fail": {1: how}, "method": "failing"}}
    codes, _, errors = merged_by(launch, 3, tmp_path / "failed", adapters, cases)
    assert all(codes)
    assert message in errors[0]
    assert message in errors[2]
    assert list((tmp_path / "failed").iterdir()) == []


WAIT_FOR_ITS_END = "import os, time\nwhile True: os.kill(pids[0], 0), time.sleep(0.1)"
IN_THE_CALL = """
import os, torch.distributed as dist
barrier = dist.barrier
def interrupted(**words):
    work = barrier(**words)
    os.kill(os.getpid(), {number})
    return work
dist.barrier = interrupted
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("called", [True, False], ids=["calls", "waits"])
def test_a_signal_ends_one_that_calls_or_waits_before_the_others_are_done(
    launch, tmp_path, adapters, number, called
):
    """Process 1 goes on as soon as process 0 is gone."""
    how = {1: f"import os\nos.kill(pids[0], {number:d})\n{WAIT_FOR_ITS_END}"}
    if called:
        how = {0: IN_THE_CALL.format(number=int(number)), 1: WAIT_FOR_ITS_END}
    cases = {"out": {"fail": how, "method": "failing"}}
    codes, _, errors = merged_by(launch, 2, tmp_path / "failed", adapters, cases)
    # 1: a KeyboardInterrupt that reaches the end of Python, while a library is at its own end
    assert codes[0] in (128 + number, -number, 1), errors[
        0
    ]  # as Python says that an interruption ended it
    assert codes[1] == 1
    assert "ended without a word" in errors[1]
    assert list((tmp_path / "failed").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "number"),
    [
        (1, signal.SIGINT),
        (1, signal.SIGTERM),
        (1, signal.SIGHUP),
        (1, signal.SIGQUIT),
        (2, signal.SIGINT),
        (2, signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_fold_with_one_line_and_nothing_is_left(
    launch, tmp_path, adapters, base, count, number
):
    code = (
        "import os, sys; from pcb_peft.commands import cli; from pcb_peft.writing import growing_file\n"
        f"if os.environ['RANK'] == '{count - 1}':\n"
        f"    growing_file.GrowingFile.write = lambda *_: os.kill(os.getpid(), {number:d})\n"
        "sys.exit(cli.main())"
    )
    out = tmp_path / "below" / "out"
    codes, _, errors = launch(count, ["-c", code, "fold", adapters[0], base, "-o", out])
    which = "process 1 of 2: " if count > 1 else ""
    assert codes == [2, 128 + number][-count:]
    assert errors[-1] == f"error: {which}interrupted ({number.name})\n"
    assert "ended without a word" in errors[0] or count == 1
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_after_a_kill_one_that_is_left_says_so_and_a_rerun_succeeds(
    launch, tmp_path, adapters, base, killed
):
    code = (
        "import os, sys; from pcb_peft.commands import cli; from pcb_peft.writing import growing_file\n"
        f"if os.environ['RANK'] == '{killed}':\n"
        f"    growing_file.GrowingFile.write = lambda *_: os.kill(os.getpid(), {signal.SIGKILL:d})\n"
        "sys.exit(cli.main())"
    )
    out = tmp_path / "below" / "out"
    fold = ["fold", adapters[0], base, "-o", out]
    codes, _, errors = launch(2, ["-c", code, *fold])
    assert codes == ([-signal.SIGKILL, 2] if killed == 0 else [2, -signal.SIGKILL])
    assert "another process ended without a word" in errors[1 - killed]
    codes, _, errors = launch(1, ["-m", "pcb_peft", *fold])
    assert codes == [0]
    assert ("was removed" in errors[0]) == (killed == 0)  # the first one makes the directory
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_fold_that_fails_in_one_process_leaves_nothing(launch, tmp_path, adapters, base):
    bad = Path(shard_with(base, "model.layers.1.mlp.down_proj.weight", tmp_path))
    case = {"linear": {"method": "linear", "fold": str(bad)}}
    codes, _, errors = merged_by(launch, 3, tmp_path / "failed", adapters, case)
    assert all(codes)
    assert all("would hold NaN" in error for error in errors)
    assert list((tmp_path / "failed").iterdir()) == []


def shard_with(base, parameter, directory):
    """The base with a NaN in one parameter."""
    import shutil

    from safetensors.torch import load_file, save_file

    copy = directory / "nan"
    shutil.copytree(base, copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"][parameter]
    tensors = load_file(file)
    tensors[parameter][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.slow
def test_processes_that_read_different_adapters_are_stopped(launch, tmp_path, shared_workshop):
    config = peft.LoraConfig(r=2, target_modules=["up"])
    for rank in range(2):
        workshop = type(shared_workshop)(tmp_path / str(rank))
        workshop.adapter("mlp", config, "math", seed=1)
        workshop.adapter("mlp", config, "code", seed=2 + rank)
    code = (
        "import os, sys; from pcb_peft.commands import cli\n"
        f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK']); sys.exit(cli.main())"
    )
    codes, _, errors = launch(2, ["-c", code, "merge", "math", "code", "-o", tmp_path / "out"])
    assert codes == [2, 2]
    assert errors[0].startswith(
        "error: processes 0 and 1 read different files under the name of code;"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_error_of_all_is_said_once_and_without_a_number(launch, tmp_path, adapters):
    words = ["-m", "pcb_peft", "merge", *adapters, "--density", "7", "-o", tmp_path / "out"]
    codes, _, errors = launch(2, words)
    assert codes == [2, 2]
    assert errors[0].startswith("error: method pcb in space knots: density is 7")
    assert "error" not in errors[1]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [[], [1], [5, 1, 1, 1, 1, 1], [1.0] * 7])
def test_items_are_shared_out_each_once_in_order_and_evenly(size, costs):
    items = list(range(len(costs)))
    shares = [Processes(rank, size).partition(items, costs.__getitem__) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_one_process_is_alone():
    assert current() is ALONE
    with all_processes() as processes:
        assert processes is ALONE
        assert processes.reduce(3, sum) == 3
        assert processes.gather_dict({"a": 1}) == {"a": 1}


def test_an_error_of_one_process_is_raised_as_it_is():
    with pytest.raises(ValueError, match=r"^no luck$"), all_processes():
        raise ValueError("no luck")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_parent_ignores_stays_ignored(number):
    """As ``nohup`` asks for: the block neither ends by it nor leaves another handler behind."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stoppable() as came:
            signal.raise_signal(number)
        assert came == []
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])
def test_processes_of_these_tests_hear_what_their_parent_ignores(launch, fresh):
    code = (
        "import os, signal; print(signal.getsignal(2) is signal.default_int_handler, flush=True)\n"
        "os.kill(os.getpid(), 15)"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert launch(1, ["-c", code], fresh=fresh) == ([-15], ["True\n"], [""])
    finally:
        signal.signal(signal.SIGINT, before)
