"""Compare folding a LoRA into a checkpoint with copying the checkpoint.

    python benchmarks/fold.py                          # Llama-3.2-1B's layers, 2.1 GiB in bfloat16
    python benchmarks/fold.py --layers 48 --directory /scratch

The base has four layers per file; the adapter has rank 16 on all seven linear layers. Both have just been written to a
scratch directory, so they are in the page cache. The table has the best of ``--repeat`` runs each:

- cp: ``cp -r``, which returns before anything is on the disk;
- cp, synced: the same, and waiting for the disk, without which no copy survives a power failure;
- fold: ``python -m pcb_peft fold``, the whole process. It waits for the disk too;
- fold, without start: the same in a process that has already imported torch and transformers.

Each output is removed just before the next run of its kind, so that this run reuses its memory. (A virtual machine may
have given other memory back, and getting it again costs more than copying. The whole process of a fold pays for that
anyway, while it imports.) Processor seconds are the sum over all threads, without the kernel's for writing to the disk.
"""

import argparse
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from dense_pcb import HIDDEN, KEY_VALUE, MLP, SHAPES, write_adapter
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, HEAD, LAYERS_PER_FILE = 32000, 64, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HIDDEN // HEAD,
    "num_key_value_heads": KEY_VALUE // HEAD,
    "tie_word_embeddings": False,
}
Cost = tuple[float, float, float]
"""Seconds, processor seconds and peak resident GiB of a run."""


def write_base(directory: Path, layers: int) -> None:
    """Write a Llama with random weights in bfloat16."""
    directory.mkdir(parents=True)
    files = [range(n, min(n + LAYERS_PER_FILE, layers)) for n in range(0, layers, LAYERS_PER_FILE)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        tensors: dict[str, Tensor] = {}
        for layer in part:
            prefix = f"model.layers.{layer}"
            for module, shape in SHAPES.items():
                tensors[f"{prefix}.{module}.weight"] = random_weight(*shape)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        if number == 1:
            tensors["model.embed_tokens.weight"] = random_weight(VOCABULARY, HIDDEN)
        if number == len(files):
            tensors["lm_head.weight"] = random_weight(VOCABULARY, HIDDEN)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def random_weight(rows: int, cols: int) -> Tensor:
    """Return a random matrix of values as large as weights are."""
    return torch.randn(rows, cols).mul_(0.02).bfloat16()


def cost_of(command: list[str]) -> Cost:
    """Run a process and return its cost, from its start to its end."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} has failed")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1 << 20)


def copied(base: Path, output: Path) -> Cost:
    """Run ``cp``."""
    return cost_of(["cp", "-r", str(base), str(output)])


def synced(base: Path, output: Path) -> Cost:
    """Run ``cp`` and wait for the disk."""
    started = time.perf_counter()
    _, busy, peak = copied(base, output)
    for path in output.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started, busy, peak


def folded(adapter: Path, base: Path, output: Path) -> Cost:
    """Fold with the command line."""
    command = [sys.executable, "-m", "pcb_peft", "fold", str(adapter), str(base), "-o", str(output)]
    return cost_of(command)


def folded_when_started(adapter: Path, base: Path, output: Path) -> Cost:
    """Fold in this process, which has imported everything; the peak is that of the whole process."""
    from pcb_peft import fold_adapter

    started, used = time.perf_counter(), time.process_time()
    fold_adapter(adapter, base, output, progress=False)
    seconds, busy = time.perf_counter() - started, time.process_time() - used
    return seconds, busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def print_when_started(adapter: Path, base: Path, output: Path, repeat: int) -> None:
    """Print the cost of folds in a process that has imported torch, transformers and its code for the model."""
    from pcb_peft.base.model import open_base_model

    open_base_model(base).layer("model.embed_tokens")
    print(*best(functools.partial(folded_when_started, adapter, base), output, repeat))


def without_start(adapter: Path, base: Path, output: Path, repeat: int) -> Cost:
    """Return what `print_when_started` prints, in its own process."""
    command = [sys.executable, __file__, "--repeat", str(repeat), "--run"]
    command += [str(adapter), str(base), str(output)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, busy, peak = map(float, printed.split())
    return seconds, busy, peak


def best(way: Callable[[Path], Cost], output: Path, repeat: int) -> Cost:
    """Return the least seconds, processor seconds and memory of a few runs, each into a new directory."""
    costs: list[Cost] = []
    for _ in range(repeat):
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        costs.append(way(output))
    shutil.rmtree(output)
    seconds, busy, peak = map(min, zip(*costs, strict=True))
    return seconds, busy, peak


def write_both(scratch: Path, layers: int, rank: int) -> None:
    """Write the model and the adapter."""
    write_base(scratch / "base", layers)
    write_adapter(scratch / "adapter", layers, rank, seed=0)


def report(scratch: Path, repeat: int) -> None:
    """Measure all ways and print the table."""
    base, adapter = scratch / "base", scratch / "adapter"
    size = sum(path.stat().st_size for path in base.iterdir()) / (1 << 30)
    output = scratch / "out"
    ways: Mapping[str, Callable[[], Cost]] = {
        "cp": lambda: best(functools.partial(copied, base), output, repeat),
        "cp, synced": lambda: best(functools.partial(synced, base), output, repeat),
        "fold": lambda: best(functools.partial(folded, adapter, base), output, repeat),
        "fold, without start": lambda: without_start(adapter, base, output, repeat),
    }
    print(f"{size:.2f} GiB, {torch.get_num_threads()} threads\n")
    print("| | seconds | GiB/s | of cp | of cp, synced | processor seconds | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    known: dict[str, float] = {}
    for name, way in ways.items():
        seconds, busy, peak = way()
        known[name] = seconds
        plain, waited = (known.get(other, seconds) / seconds for other in ("cp", "cp, synced"))
        print(
            f"| {name} | {seconds:.2f} | {size / seconds:.2f} | {plain:.2f} | {waited:.2f} | {busy:.2f} | {peak:.2f} |"
        )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to make the scratch directory")
    arguments = parser.parse_args()
    if arguments.run:
        print_when_started(*arguments.run, arguments.repeat)
        return
    if arguments.write:
        write_both(arguments.write, arguments.layers, arguments.rank)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        # in a process of its own: a child's peak is never less than what its parent held when it was started
        subprocess.run([sys.executable, *sys.argv, "--write", scratch], check=True)
        report(Path(scratch), arguments.repeat)


if __name__ == "__main__":
    main()
