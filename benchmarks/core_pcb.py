"""Compare PCB-Merging in core and knots space with PEFT's ``svd`` merge, at the same rank.

The shapes are those of Llama-3-8B.

    python benchmarks/core_pcb.py                       # all 32 layers; PEFT on one small layer and one square one
    python benchmarks/core_pcb.py --layers 2 --peft k_proj

PEFT's ``add_weighted_adapter(combination_type="svd")`` adds up the dense ΔW of each layer and computes the full SVD;
``ties_svd`` and the others do the same. PEFT merges the layers that ``--peft`` names. The time for all layers is
extrapolated from the largest of these by rows · cols · min(rows, cols), the cost of an SVD. Each side runs in its own
process.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from dense_pcb import write_adapter

HIDDEN, KEY_VALUE, MLP = 4096, 1024, 14336  # Llama-3-8B
SHAPES = {  # (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
RUNS = {  # space, and whether the rank is cut
    "core, lossless": ("core", False),
    "core, truncated": ("core", True),
    "knots, truncated": ("knots", True),
}


def run_ours(adapters: list[str], space: str, rank: int | None) -> None:
    """Merge all layers, from files to files."""
    import warnings

    from pcb_peft import merge_adapters

    warnings.simplefilter("ignore")  # random adapters do not fit into a low rank
    with tempfile.TemporaryDirectory() as scratch:
        merged = merge_adapters(adapters, "pcb", space=space, rank=rank)
        merged.save_pretrained(Path(scratch, "merged"))


def run_peft(layer: str, count: int, rank: int) -> None:
    """Merge one layer in memory with PEFT and print the seconds, without those that making the adapters takes."""
    import peft

    rows, cols = next(shape for name, shape in SHAPES.items() if name.endswith(layer))
    base = torch.nn.Sequential(torch.nn.Linear(cols, rows, bias=False))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(base, config, adapter_name="0")
    for number in range(1, count):
        model.add_adapter(str(number), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    names = [str(number) for number in range(count)]
    started = time.perf_counter()
    model.add_weighted_adapter(names, [1.0] * count, "merged", "svd", svd_rank=rank)
    print(time.perf_counter() - started)


def measured(*words: object) -> list[float]:
    """Return the seconds and the peak resident GiB of one side, measured in its own process."""
    command = [sys.executable, __file__, *map(str, words)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(value) for value in output.split()]


def child(arguments: argparse.Namespace) -> None:
    """Run one side, in the measured process."""
    if arguments.run == "peft":
        run_peft(arguments.peft[0], arguments.count, arguments.rank)
    else:
        space, cut = RUNS[arguments.run]
        started = time.perf_counter()
        run_ours(arguments.adapters, space, arguments.rank if cut else None)
        print(time.perf_counter() - started)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20))


def work(layer: str) -> int:
    """Return the cost of an SVD of this layer, up to a factor."""
    rows, cols = next(shape for name, shape in SHAPES.items() if name.endswith(layer))
    return rows * cols * min(rows, cols)


def report(arguments: argparse.Namespace) -> None:
    """Measure both sides and print them side by side."""
    modules = arguments.layers * len(SHAPES)
    print(f"{arguments.count} adapters of rank {arguments.rank}, {torch.get_num_threads()} threads")
    print("| merge | modules | seconds | seconds per module | peak GiB |")
    print("|---|---|---|---|---|")
    ours: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch, str(seed)) for seed in range(arguments.count)]
        for seed, path in enumerate(paths):
            write_adapter(path, arguments.layers, arguments.rank, seed, SHAPES)
        os.sync()  # or the disk is still busy with the adapters while they are read
        for run in RUNS:
            ours[run], peak = measured(*paths, "--run", run, "--rank", arguments.rank)
            each = ours[run] / modules
            print(f"| pcb, {run} | {modules} | {ours[run]:.1f} | {each:.3f} | {peak:.2f} |")
    theirs: dict[str, float] = {}
    for layer in arguments.peft:
        words = ("--run", "peft", "--peft", layer, "--count", arguments.count)
        theirs[layer], peak = measured(*words, "--rank", arguments.rank)
        print(f"| PEFT svd, {layer} | 1 | {theirs[layer]:.1f} | {theirs[layer]:.3f} | {peak:.2f} |")
    largest = max(theirs, key=work)
    whole = sum(work(name) for name in SHAPES) * arguments.layers / work(largest) * theirs[largest]
    print(f"extrapolated from {largest}, PEFT takes {whole:.0f} s for {modules} modules")
    for run, seconds in ours.items():
        print(f"that is {whole / seconds:.0f} times as long as pcb, {run}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--count", type=int, default=8, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peft", nargs="+", default=["k_proj", "q_proj"], help="its layers")
    arguments = parser.parse_args()
    if arguments.run:
        child(arguments)
        return
    report(arguments)


if __name__ == "__main__":
    main()
