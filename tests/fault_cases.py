"""Commands that write, for faults.py: merges, folds, exports, and what comes before and after a merge."""

import contextlib
import copy
import dataclasses
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import models
import peft
import tiny_language
import torch
from safetensors.torch import save_file

from pcb_peft.commands import cli

LORA = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}'
SHAPES = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}
LARGER = {"self_attn.q_proj": (128, 128), "mlp.down_proj": (128, 192)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that writes an output.

    Attributes:
        name: Name for the table.
        directory: Directory of its inputs, and of ``place``, in which the output is written.
        words: The command, up to the name of the output.
        old: The same for what is there before; None for nothing.
        output: Name of the output.
        flags: The option that names the output, and those after it.
        stays: Names of what a run leaves beside the output for the next one: a log, a checkpoint, a cache.
        no_exchange: As on a file system that cannot exchange two directories.
    """

    name: str
    directory: Path
    words: Sequence[object]
    old: Sequence[object] | None = None
    output: str = "out"
    flags: Sequence[object] = ("-o", "--overwrite")
    stays: Sequence[str] = ()
    no_exchange: bool = False

    @property
    def place(self) -> Path:
        return self.directory / "place"

    @property
    def target(self) -> Path:
        return self.place / self.output

    def command(self, words: Sequence[object]) -> list[str]:
        return list(map(str, [*words, self.flags[0], self.target, *self.flags[1:]]))


def run_here(words: Sequence[object]) -> None:
    """Run a command in this process, so that forked ones find all that it imports."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert cli.main(list(map(str, words))) == 0, said.getvalue()


def cases(directory: Path) -> Iterator[Case]:
    """Yield commands that write directories and single files, over nothing and over an older output."""
    one, two = (lora(directory / name, seed) for seed, name in enumerate(("one", "two")))
    base = models.save(models.original("llama"), directory / "base", shard="8KB")
    yield from _merges(directory, one, two, base)
    yield from _exports(directory, one, two, base)
    yield from _image_files(directory)
    yield from _before_and_after(directory, one, base)
    yield from _with_a_model(directory)


def _merges(directory: Path, one: Path, two: Path, base: Path) -> Iterator[Case]:
    merge, other = ["merge", one, two], ["merge", two, one, "--weights", 1, 2]
    yield Case("merge", directory, merge)
    yield Case("merge over an old one", directory, merge, other)
    name = "merge over an old one, without exchange"
    yield Case(name, directory, merge, other, no_exchange=True)
    yield Case("fold", directory, ["fold", one, base])
    yield Case("fold over an old one", directory, ["fold", one, base], ["fold", two, base])
    full = ["merge", one, two, "--base-model", base, "--rank", "full", "--fold"]
    yield Case("merge and fold, whole", directory, full)


def _exports(directory: Path, one: Path, two: Path, base: Path) -> Iterator[Case]:
    export = ["export", one, "--to", "portable"]
    yield Case("export", directory, export)
    yield Case("export over an old one", directory, export, ["export", two, "--to", "portable"])
    gguf = ["export", one, "--to", "gguf", "--base-model", base]
    yield Case("export to GGUF", directory, gguf, output="out.gguf")


def _image_files(directory: Path) -> Iterator[Case]:
    kohya = [kohya_lora(directory / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    merge = ["merge", *kohya]
    yield Case("file", directory, merge, output="out.safetensors")
    old = [*merge, "--weights", 1, 2]
    yield Case("file over an old one", directory, merge, old, output="out.safetensors")


def _before_and_after(directory: Path, one: Path, base: Path) -> Iterator[Case]:
    tuned, heads = directory / "tuned", directory / "heads"
    run_here(["fold", one, base, "-o", tuned])
    extract = ["extract", tuned, "--base-model", base, "--rank"]
    yield Case("extract over an old one", directory, [*extract, 2], [*extract, 1])
    classifiers = [classifier(directory / name, seed) for seed, name in enumerate(("good", "bad"))]
    run_here(["merge", *classifiers, "--heads", "keep-each", "-o", heads])
    head = ["head", heads]
    yield Case("head over an old one", directory, [*head, "good"], [*head, "bad"])


def _with_a_model(directory: Path) -> Iterator[Case]:
    """Yield commands that run a language model on texts."""
    base = tiny_language.save_language_model(directory / "language")
    one, two = (lora(directory / name, seed, LARGER) for seed, name in enumerate(("math", "law")))
    data = [directory / "math.jsonl", directory / "law.jsonl"]
    for file, word in zip(data, ("one and one is", "the law is"), strict=True):
        rows = [{"text": f"{word} {number}"} for number in range(4)]
        file.write_text("\n".join(map(json.dumps, rows)))
    merged, place = directory / "merged", directory / "place"
    run_here(["merge", one, two, "--base-model", base, "-o", merged])
    collect = ["collect", one, "--base-model", base, "--data"]
    yield Case(
        "collect over an old one",
        directory,
        [*collect, data[0]],
        [*collect, data[1]],
        output="math.safetensors",
    )
    distill = ["distill", merged, one, two, "--base-model", base, "--texts", *data]
    yield Case(
        "distill",
        directory,
        [*distill, "--steps", 2, "--new-tokens", 2, "--checkpoint", place / "checkpoint"],
        stays=("checkpoint",),
    )
    texts = ["--data", *data, "--limit", 2, "--cache", place / "cache"]
    yield Case(
        "evaluate",
        directory,
        ["evaluate", merged, *texts, "--log", place / "log"],
        output="page.html",
        flags=("--report",),
        stays=("log", "cache"),
    )
    search = ["search", one, two, "--base-model", base, *texts, "--log", place / "log"]
    yield Case(
        "search",
        directory,
        [*search, "--trials", 2, "--vary", "density=0.2,0.3"],
        output="best.yaml",
        flags=("-o",),
        stays=("log", "cache"),
    )


def lora(directory: Path, seed: int, shapes: dict[str, tuple[int, int]] = SHAPES) -> Path:
    """Make an adapter of a tiny llama, as PEFT writes it."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    layers = 2 if shapes is SHAPES else 3
    for layer in range(layers):
        for module, (rows, cols) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, cols, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    directory.mkdir()
    (directory / "adapter_config.json").write_text(LORA)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def classifier(directory: Path, seed: int) -> Path:
    """Make an adapter with a head."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False
    )
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(copy.deepcopy(models.original("bert")), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "classifier" in name:
                    parameter.copy_(torch.randn_like(parameter))
        model.save_pretrained(directory)
    return directory


def kohya_lora(path: Path, seed: int) -> Path:
    """Make a LoRA of an image model."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for kind in "qk":
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{kind}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 320, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(320, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, metadata={"format": "pt"})
    return path
