"""Many merges in one process: memory, open files, threads and temporary files must not grow.

    python benchmarks/soak.py --merges 1000

Files, live models, (IA)³, LoRAs of image models and folds take turns. Every tenth of the merges a line is printed; the
exit status is 1 if anything has grown from the second line to the last.
"""

import argparse
import gc
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

from pcb_peft import load_adapter, merge_adapters

SLACK = 0.05  # of the memory at the second line
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model() -> transformers.LlamaForCausalLM:
    """Return a tiny language model, always the same."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))


def trained(config: peft.PeftConfig, seed: int) -> peft.PeftModel:
    """Return a model with an adapter of random values."""
    wrapped = peft.get_peft_model(model(), config)
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "ia3_" in name:
            torch.nn.init.normal_(parameter, mean=float("ia3_" in name), std=0.1)
    return wrapped


def image_lora(path: Path, seed: int) -> Path:
    """Write a LoRA of an image model."""
    torch.manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for kind in "qkv":
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{kind}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 320)
        tensors[f"{name}.lora_up.weight"] = torch.randn(320, 4)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)
    return path


def kinds(directory: Path) -> list[Callable[[], object]]:
    """Return functions that each make one merge, or one fold, from the files that are made here."""
    out, base = directory / "out", directory / "base"
    model().save_pretrained(base, max_shard_size="16KB")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ia3 = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    live = [trained(lora, seed) for seed in (1, 2)]
    for name, config in (("lora", lora), ("ia3", ia3)):
        for seed in (1, 2):
            trained(config, seed).save_pretrained(directory / f"{name}{seed}")
    images = [image_lora(directory / f"image{seed}.safetensors", seed) for seed in (1, 2)]

    def files(name: str, **options: object) -> None:
        paths = [directory / f"{name}{seed}" for seed in (1, 2)]
        merge_adapters(paths, **options).save_pretrained(out, overwrite=True)  # type: ignore[arg-type]

    def fold() -> None:
        shutil.rmtree(directory / "folded", ignore_errors=True)
        load_adapter(directory / "lora1").fold(base, directory / "folded")

    return [
        lambda: files("lora"),
        lambda: files("lora", method="pcb", scope="global"),
        lambda: files("ia3"),
        lambda: merge_adapters([(one, "default") for one in live]),
        lambda: merge_adapters(images).save_pretrained(
            directory / "out.safetensors", overwrite=True
        ),
        fold,
        lambda: files("lora", method="ties", base_model=base),
    ]


def state(directory: Path) -> dict[str, float]:
    """Return what may not grow: MiB of memory, open files, threads, files beside the outputs."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "open files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208  (no path is needed)
        "threads": threading.active_count(),
        "files": len(list(directory.iterdir())),
        "temporary files": len([p for p in directory.parent.iterdir() if "pcb_peft" in p.name]),
    }


def main() -> int:
    """Merge, and print what may not grow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merges", type=int, default=1000)
    merges = parser.parse_args().merges
    torch.set_num_threads(1)
    lines: list[dict[str, float]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "place")
        place.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        turns = itertools.cycle(kinds(place))
        for done in range(1, merges + 1):
            next(turns)()
            if done % max(1, merges // 10) == 0:
                lines.append(state(place))
                shown = ", ".join(f"{name} {value:.0f}" for name, value in lines[-1].items())
                print(f"{done} merges, {time.perf_counter() - started:.0f} s: {shown}", flush=True)
    first, last = lines[1], lines[-1]
    grown = [n for n in first if last[n] > first[n] * (1 + SLACK * (n == "MiB"))]
    print(f"grown: {', '.join(grown) or 'nothing'}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
