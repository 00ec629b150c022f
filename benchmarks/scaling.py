"""How time and memory of a merge grow, one command per table; each merge runs in a process of its own.

Processor seconds hardly depend on what else the machine does. Of several processes the table has the most of one.

    python benchmarks/scaling.py adapters      # 2 to 16 adapters
    python benchmarks/scaling.py rank          # ranks 4 to 64
    python benchmarks/scaling.py size          # hidden sizes 512 to 2048
    python benchmarks/scaling.py processes     # 1 to 4 processes
    python benchmarks/scaling.py estimated     # what `pcb-peft merge --dry-run` says, and what came of it
    python benchmarks/scaling.py projected     # what it says of Llama's sizes up to 405B

The model of the first five has the shapes of a Llama of two layers. ``projected`` writes the headers of adapters
without their tensors: a dry run reads nothing else.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from dense_pcb import write_adapter

MERGES = {
    "core, module": ("--space", "core", "--scope", "module"),
    "dense, global": ("--space", "dense", "--scope", "global", "--rank", "16"),
}
MODELS = {  # hidden, key and value, mlp, layers
    "1B": (2048, 512, 8192, 16),
    "8B": (4096, 1024, 14336, 32),
    "70B": (8192, 1024, 28672, 80),
    "405B": (16384, 1024, 53248, 126),
}


def shapes(hidden: int, key_value: int, mlp: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linear layers."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


def adapters(folder: Path, count: int, rank: int, hidden: int) -> list[str]:
    """Random ones."""
    paths = [folder / str(seed) for seed in range(count)]
    for seed, path in enumerate(paths):
        write_adapter(path, 2, rank, seed, shapes(hidden, hidden // 4, 4 * hidden))
    return list(map(str, paths))


def headers(folder: Path, count: int, rank: int, model: str) -> list[str]:
    """Adapters without tensors, as large as if they had them."""
    *sizes, layers = MODELS[model]
    tensors: dict[str, object] = {}
    end = 0
    for layer in range(layers):
        for module, (rows, cols) in shapes(*sizes).items():
            for part, shape in (("lora_A", (rank, cols)), ("lora_B", (rows, rank))):
                start, end = end, end + 2 * shape[0] * shape[1]
                name = f"base_model.model.model.layers.{layer}.{module}.{part}.weight"
                tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    header = json.dumps(tensors).encode()
    targets = [module.split(".")[1] for module in shapes(*sizes)]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    paths = [folder / str(number) for number in range(count)]
    for path in paths:
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        with (path / "adapter_model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)  # a file with a hole
    return list(map(str, paths))


def child() -> None:
    """A merge of the command line; then its seconds, its processor seconds and its peak GiB."""
    from pcb_peft.commands.cli import main

    started, used = time.perf_counter(), time.process_time()
    failed = main(["merge", *sys.argv[2:]])
    seconds, busy = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    if not failed:
        print("cost", seconds, busy, peak)


def measured(words: Sequence[str], processes: int = 1) -> list[float]:
    """Seconds, processor seconds and peak, each the most that one of the processes that merge together has."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "child", *words, "-o", str(Path(scratch, "merged"))]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
        runs = [
            subprocess.Popen(
                command,
                env=os.environ
                | common
                | {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(processes)
        ]
        lines = [run.communicate()[0].splitlines()[-1].split() for run in runs]
    return [max(map(float, column)) for column in list(zip(*lines, strict=True))[1:]]


def runs(table: str, folder: Path) -> Iterator[tuple[int, list[str], int]]:
    """What grows, the adapters, and the number of processes."""
    if table == "adapters":
        paths = adapters(folder, 16, 16, 512)
        yield from ((count, paths[:count], 1) for count in (2, 4, 8, 16))
    elif table == "rank":
        for rank in (4, 16, 64):
            yield rank, adapters(folder / str(rank), 4, rank, 512), 1
    elif table == "size":
        for hidden in (512, 1024, 2048):
            yield hidden, adapters(folder / str(hidden), 4, 16, hidden), 1
    else:
        paths = adapters(folder, 4, 16, 1024)
        yield from ((count, paths, count) for count in (1, 2, 4))


def measure(table: str, folder: Path) -> None:
    """Prints a table of measurements."""
    print(f"| {table} | merge | seconds | processor seconds | peak GiB |")
    print("|---|---|---|---|---|")
    for size, paths, processes in runs(table, folder):
        for merge, words in MERGES.items():
            costs = measured([*paths, *words], processes)
            columns = " | ".join(f"{cost:.2f}" for cost in costs)
            print(f"| {size} | {merge} | {columns} |", flush=True)


def compare(folder: Path) -> None:
    """Prints estimates beside measurements."""
    from pcb_peft import Recipe, estimate_merge

    print("| merge | seconds: estimated | measured | peak GiB: estimated | measured |")
    print("|---|---|---|---|---|")
    paths = adapters(folder, 4, 16, 1024)
    for space in ("core", "dense", "factor", "knots"):
        for scope in ("global", "module"):
            recipe = Recipe.parse(adapters=paths, space=space, scope=scope, rank=16)
            found = estimate_merge(recipe)
            words = ["--space", space, "--scope", scope, "--rank", "16"]
            seconds, _, peak = measured([*paths, *words])
            memory = found.memory / (1 << 30)
            print(
                f"| {space}, {scope} | {found.seconds:.2g} | {seconds:.2g} | {memory:.2f} | {peak:.2f} |",
                flush=True,
            )


def project(folder: Path) -> None:
    """Prints what dry runs say."""
    from pcb_peft import Recipe, Source, estimate_merge

    print("| model | adapters | merge | values per adapter | hours | peak GiB | GiB written |")
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        for count in (4, 16):
            place = folder / f"{model}-{count}"
            place.mkdir()
            sources = tuple(map(Source, headers(place, count, 16, model)))
            for merge, words in MERGES.items():
                recipe = Recipe.parse(
                    adapters=sources,
                    space=words[1],
                    scope=words[3],
                    rank=16 if "--rank" in words else None,
                )
                found = estimate_merge(recipe)
                print(
                    f"| {model} | {count} | {merge} | {found.values:.3g} | {found.seconds / 3600:.2g} "
                    f"| {found.memory / (1 << 30):.2g} | {found.written / (1 << 30):.2g} |",
                    flush=True,
                )


def main() -> None:
    """Reads the command line."""
    if sys.argv[1:2] == ["child"]:
        child()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "table", choices=["adapters", "rank", "size", "processes", "estimated", "projected"]
    )
    table = parser.parse_args().table
    torch.set_num_threads(1)  # as the merges that are measured
    with tempfile.TemporaryDirectory() as scratch:
        if table == "projected":
            project(Path(scratch))
        elif table == "estimated":
            compare(Path(scratch))
        else:
            measure(table, Path(scratch))


if __name__ == "__main__":
    main()
