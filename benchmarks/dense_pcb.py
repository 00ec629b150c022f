"""Compare global PCB-Merging in dense space with the original algorithm, in time and memory.

    python benchmarks/dense_pcb.py                     # Llama-3.2-1B's shapes, 4 adapters of rank 16
    python benchmarks/dense_pcb.py --layers 2          # a smaller model
    python benchmarks/dense_pcb.py --repeat 3          # on a busy machine: the best of three rounds

The engine (this package) merges all layers three times: with an empty compiler cache, with the cache that this run
filled, and without a compiler. The original algorithm sorts whole task vectors in memory; it merges as many layers as
``--original-layers`` says. Each runs in its own process, so that peak memory and compiling count for itself. Processor
time is the sum over all threads; other work on the machine changes it less than the seconds.

The limit is a lower bound for three passes over tiles computed from the factors: three products of the factors, and the
tanh and exp of two scores. Each is measured alone on one tile in a core's cache on one thread, with torch or compiled,
whichever is faster, and divided by the number of threads.
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
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, KEY_VALUE, MLP = 2048, 512, 8192  # Llama-3.2-1B
FIRST, ENGINE, PLAIN = "engine, first time", "engine", "engine without a compiler"
ORIGINAL = "original"
SHAPES = {  # (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def write_adapter(
    directory: Path, layers: int, rank: int, seed: int, shapes: dict[str, tuple[int, int]] = SHAPES
) -> None:
    """Write a LoRA of all seven linear layers, with random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        for module, (rows, cols) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = (
                torch.randn(rank, cols, generator=generator) / cols**0.5
            )
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [m.split(".")[1] for m in shapes],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def run_engine(adapters: list[str], formula: str, density: float) -> None:
    """Merge with this package; each merged module is computed and dropped."""
    from pcb_peft import merge_adapters

    options = {"formula": formula, "density": density}
    merged = merge_adapters(adapters, "pcb", space="dense", scope="global", rank="full", **options)
    for module in merged.modules:
        merged.delta(module)


def run_original(adapters: list[str], formula: str, density: float) -> None:
    """Merge with the published algorithm: float32, whole task vectors in memory, sorted for the quantiles."""
    from pcb_peft import load_adapter

    loaded = [load_adapter(adapter) for adapter in adapters]
    x = torch.stack([torch.cat([a.delta(m).flatten() for m in a.modules]) for a in loaded])
    count, size = x.shape
    tail = 0.0001 if formula == "reference" else 0.01

    def clamped(values: Tensor, low: int, high: int) -> Tensor:
        ordered = values.sort(dim=1).values
        return values.clamp(ordered[:, low : low + 1], ordered[:, high : high + 1])

    def unit(values: Tensor) -> Tensor:
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        return (values - low) / (high - low)

    magnitude = clamped(x.abs(), int(size * tail), int(size * (1 - tail) - 1))
    signed, normed = x.sign() * magnitude, x.sign() * unit(magnitude)
    if formula == "es":
        inter = torch.stack([torch.tanh(row * normed).sum(0) for row in normed])
    else:
        inter = torch.tanh(x * (normed if formula == "vision" else x).sum(0))
    score = torch.exp(count * unit(magnitude) ** 2) * inter
    scale = unit(clamped(score, int(size * (1 - density)), size - 1))
    _ = (signed * scale).sum(0) / scale.sum(0).clamp(min=1e-12)


def least_seconds(function: Callable[[], object], repeats: int = 200) -> float:
    """Return the least seconds that one call took."""
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def limit(count: int, rank: int, formula: str, threads: int) -> float:
    """Return the lower bound in seconds per value and adapter; see the top of this file."""
    torch.set_num_threads(1)
    left, right = torch.randn(64, rank), torch.randn(rank, HIDDEN)
    tile = (left @ right).mul_(0.001)  # small like normed values, for which tanh takes less time
    out = torch.empty_like(tile)
    tanhs = (
        (count + 1) / 2 if formula == "es" else 1.0
    )  # one for each pair of adapters, itself included
    product = least_seconds(lambda: torch.mm(left, right, out=out))
    tanh, exp = (
        min(least_seconds(functools.partial(way, tile)) for way in ways(function))
        for function in (torch.tanh, torch.exp)
    )
    return (3 * product + 2 * (tanhs * tanh + exp)) / tile.numel() / threads


def ways(function: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Tensor]]:
    """Return the function as it is and, where there is a compiler, compiled.

    The compiled one is wrapped in a function of its own: torch.compile leaves torch's own functions as they are.
    """
    from pcb_peft.tasks.compiling import compile_tiles, why_not_compiled

    cpu = torch.device("cpu")
    compiled = compile_tiles(lambda x: function(x), cpu)
    return [function] if why_not_compiled(cpu) else [function, compiled]


def measure(name: str, adapters: list[Path], cache: Path, options: list[str]) -> list[float]:
    """Return seconds, processor seconds and peak resident GiB of one algorithm, run in its own process."""
    if name == FIRST:
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
    compiler = {"TMPDIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    environment = os.environ | ({"TORCHDYNAMO_DISABLE": "1"} if name == PLAIN else compiler)
    command = [sys.executable, __file__, "--run", name, *map(str, adapters), *options]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    return [float(value) for value in output.split()]


def child(arguments: argparse.Namespace) -> None:
    """Run one algorithm, in the measured process."""
    run = run_original if arguments.run == ORIGINAL else run_engine
    started, used = time.perf_counter(), time.process_time()
    run(arguments.adapters, arguments.formula, arguments.density)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(time.perf_counter() - started, time.process_time() - used, peak)


def report(arguments: argparse.Namespace) -> None:
    """Measure all and print them side by side, with the limit."""
    layers = dict.fromkeys((FIRST, ENGINE, PLAIN), arguments.layers)
    layers[ORIGINAL] = arguments.original_layers
    options = ["--formula", arguments.formula, "--density", str(arguments.density)]
    rounds: dict[str, list[list[float]]] = {name: [] for name in layers}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {
            count: [Path(scratch, str(count), str(seed)) for seed in range(arguments.count)]
            for count in set(layers.values())
        }
        for count, adapters in paths.items():
            for seed, directory in enumerate(adapters):
                write_adapter(directory, count, arguments.rank, seed)
        for _ in range(arguments.repeat):
            for name, count in layers.items():
                rounds[name].append(measure(name, paths[count], Path(scratch, "cache"), options))
    threads = torch.get_num_threads()
    print(
        f"{arguments.count} adapters of rank {arguments.rank}, formula {arguments.formula}, {threads} threads\n"
    )
    print("| algorithm | values per adapter | seconds | ns | processor ns | peak GiB |")
    print("|---|---|---|---|---|---|")
    costs: dict[str, list[float]] = {}
    for name, count in layers.items():
        values = count * sum(rows * cols for rows, cols in SHAPES.values())
        seconds, used, peak = map(min, zip(*rounds[name], strict=True))
        wall, busy = (1e9 * cost / values / arguments.count for cost in (seconds, used))
        costs[name] = [wall, busy]
        print(f"| {name} | {values:.3g} | {seconds:.1f} | {wall:.1f} | {busy:.1f} | {peak:.2f} |")
    least = 1e9 * limit(arguments.count, arguments.rank, arguments.formula, threads)
    print(f"| limit | | | {least:.1f} | {least * threads:.1f} | |")
    print("\nns: per value and adapter")
    for name in (FIRST, ENGINE, PLAIN):
        wall, busy = (a / b for a, b in zip(costs[ORIGINAL], costs[name], strict=True))
        print(
            f"the original takes {wall:.1f} times the time of the {name}, and {busy:.1f} times its processor time; "
            f"that takes {costs[name][0] / least:.1f} times the limit"
        )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--original-layers", type=int, default=1)
    parser.add_argument("--count", type=int, default=4, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--formula", default="es")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.run:
        child(arguments)
        return
    report(arguments)


if __name__ == "__main__":
    main()
