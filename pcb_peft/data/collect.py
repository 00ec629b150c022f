"""Collecting task statistics: what some methods need to know of an adapter's task, measured on texts.

The base model is loaded with the adapter by PEFT, and reads the texts. One process or several (``accelerate launch -m
pcb_peft collect …``): each reads its share of the batches, the sums are added up, and the main process writes the file.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapter
from pcb_peft.adapters.source import Source
from pcb_peft.data.adapted_model import adapted_model
from pcb_peft.data.batches import IGNORED, Data, batches_of
from pcb_peft.data.statistics_file import (
    KINDS,
    TaskStatistics,
    holds_statistics,
    open_statistics,
    save_statistics,
)
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.resources import number_of_bytes
from pcb_peft.writing.targets import Overwrite, check_file_target

DEFAULT_MEMORY = 4 << 30
BYTES_PER_SUM = 8  # a sum is float64

Kind: TypeAlias = Literal["gram", "gradient"]
Sums: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = Mapping[str, Tensor]


def collect_statistics(  # noqa: PLR0913  (every choice, by name)
    adapter: str | Path | Source | Adapter,
    base_model: Any,
    data: Data,
    output: str | Path | None = None,
    kind: Kind = "gram",
    *,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    dequantize: bool = False,
    batch_size: int = 8,
    max_length: int = 512,
    limit: int | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    overwrite: Overwrite = False,
    progress: bool | None = None,
) -> TaskStatistics:
    """Measure the statistics of an adapter's task that a method such as `regmean` needs, and write them to a file.

    The data are read once for as many modules as fit into `max_memory`, then again for the next ones.

    Args:
        adapter: A directory, a hub id, or what `load_adapter` returned.
        base_model: A path, a hub id, or a transformers model; the adapter is taken off the model again in the end.
        data: A ``.jsonl`` file or rows, each with `text` and, if there are any, `text_pair`, `label` or `answer`; plain
            texts; or batches, such as a DataLoader: mappings of tensors that the model takes.
        output: The file to write; None: the statistics stay in memory.
        kind: "gram": the mean of x xᵀ over the tokens x that a module sees, without padding. "gradient": the gradient
            of the mean loss by W. This needs a loss: for a sequence classifier, rows with a `label`, a number or one of
            `labels`; a causal language model learns the text or, in rows with an `answer`, only that, after the text.
        labels: Names of the classes, in the order of the head's rows.
        tokenizer: A tokenizer, or where to load it from; default: the base model's.
        dequantize: Compute the weights of a quantised base model from their codes.
        batch_size: Texts per batch.
        max_length: Tokens per text; longer texts are cut.
        limit: How many texts to take, evenly spread over the data; None: all.
        max_memory: Bytes of sums that a process holds at once, beside the model: a number, or "1G".
        overwrite: Replace the file if it exists: True, if it holds statistics; "all", whatever it is.
        progress: Show bars; default: on a terminal.

    Returns:
        The statistics, read from the file if one was written.

    Raises:
        OptionError: A value, or a row of the data, is not allowed.
        UnsupportedError: The adapter has no ΔW, or a layer is not linear.
        BaseModelError: The base model cannot be loaded.
        MismatchError: The adapter does not fit the base model.
        OutputError: The file cannot be written, must not be replaced, or is one of the inputs or in one.

    Example:
        from pcb_peft import collect_statistics, merge_adapters

        files = ["math.safetensors", "code.safetensors"]
        collect_statistics("math-lora", "base", ["the cat sat", "on the mat"], files[0])
        collect_statistics("code-lora", "base", ["a dog ran fast"], files[1])
        merged = merge_adapters(["math-lora", "code-lora"], method="regmean", statistics=files)
    """
    if kind not in KINDS:
        raise OptionError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    memory = number_of_bytes(max_memory)
    if output is not None:
        inputs = (_directory(adapter), base_model, data, tokenizer)
        check_file_target(
            Path(output), overwrite=overwrite, inputs=inputs, is_ours=holds_statistics
        )
    loaded, source = _measurable(load_adapter(adapter))
    accelerator = _accelerator()
    with adapted_model(loaded, source, base_model, dequantize=dequantize) as model:
        model.to(accelerator.device)
        batches = batches_of(
            data,
            tokenizer or base_model,
            model,
            labels,
            batch_size,
            max_length,
            limit,
            with_labels=kind == "gradient",
        )
        if isinstance(batches, torch.utils.data.DataLoader):
            batches = accelerator.prepare_data_loader(batches)
        measurement = _Measurement(model, batches, kind, accelerator, tracker(progress))
        statistics = measurement.statistics(loaded, memory)
    if output is None:
        return statistics
    if accelerator.is_main_process:
        save_statistics(statistics, Path(output), overwrite=overwrite)
    accelerator.wait_for_everyone()
    return open_statistics(Path(output))


def _directory(adapter: object) -> object:
    """Return where an adapter is, if it is in files."""
    source = adapter.source if isinstance(adapter, Adapter) else adapter
    return source.directory if isinstance(source, Source) else source


@dataclasses.dataclass(frozen=True, slots=True)
class _Measurement:
    """The measurement of one kind of statistic with one adapter.

    Attributes:
        model: A PeftModel.
        batches: This process's share of the data.
        kind: A key of `KINDS`.
        accelerator: Accelerate's, to add up over processes.
        track: Shows progress.
    """

    model: Any
    batches: Iterable[Batch]
    kind: str
    accelerator: Any
    track: Track

    def statistics(self, adapter: Adapter, max_memory: int) -> TaskStatistics:
        """Pass over the data, for as many modules at a time as fit into memory, and take the means over it."""
        entries = adapter.modules.entries
        shapes = {module: KINDS[self.kind](entry.shape) for module, entry in entries.items()}
        sizes = {module: BYTES_PER_SUM * rows * cols for module, (rows, cols) in shapes.items()}
        means: Sums = {}
        count = 0
        for modules in groups(sizes, max_memory):
            sums, own_count = self._pass({module: shapes[module] for module in modules})
            count = int(self._total(torch.tensor(float(own_count))))
            if not count:
                raise OptionError(
                    "the data hold no token to measure on: give texts that are not empty"
                )
            means |= {m: (self._total(value) / count).float().cpu() for m, value in sums.items()}
        sha256 = adapter.source.sha256 if adapter.source else None
        return TaskStatistics(self.kind, shapes, means.__getitem__, count, sha256)

    def _total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum")

    def _pass(self, shapes: Mapping[str, tuple[int, int]]) -> tuple[Sums, int]:
        """The sums of some modules over the data, and the number of tokens or labels."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        sums = {m: torch.zeros(shape, dtype=dtype, device=device) for m, shape in shapes.items()}
        if self.kind == "gram":
            make_hook, run = _gram_hook, self._run_forward
        else:
            make_hook, run = _gradient_hook, self._run_backward
        base, context = self.model.get_base_model(), _BatchContext()
        hooks = [
            base.get_submodule(module).register_forward_hook(make_hook(total, context, module))
            for module, total in sums.items()
        ]
        try:
            counts = [
                run({name: values.to(device) for name, values in batch.items()}, context)
                for batch in self.track(self.batches, self.kind)
            ]
        finally:
            for hook in hooks:
                hook.remove()
        return sums, sum(counts)

    def _run_forward(self, batch: Batch, context: "_BatchContext") -> int:
        """Run the model on a batch; return the number of tokens."""
        ids = next(iter(batch.values()))
        mask = batch.get("attention_mask", torch.ones(ids.shape[:2]))
        context.mask = mask.bool().to(ids.device)
        with torch.no_grad():
            self.model(**{name: values for name, values in batch.items() if name != "labels"})
        return int(context.mask.sum())

    def _run_backward(self, batch: Batch, context: "_BatchContext") -> int:
        """Run the model on a batch, and its loss backward; return the number of labels."""
        if "labels" not in batch:
            raise OptionError("kind gradient needs a loss: the batches have no labels")
        output = self.model(**batch)
        context.count = _label_count(batch["labels"], output.logits)
        if context.count:  # a mean over no label is NaN
            self.model.zero_grad(set_to_none=True)
            output.loss.backward()
        self.model.zero_grad(set_to_none=True)
        return context.count


@dataclasses.dataclass(slots=True)
class _BatchContext:
    """Facts about the current batch, for the hooks.

    Attributes:
        mask: (texts, tokens), False for padding.
        count: Number of labels.
    """

    mask: Tensor = dataclasses.field(default_factory=lambda: torch.ones(0))
    count: int = 0


def _label_count(labels: Tensor, logits: Tensor) -> int:
    """Number of labels over which the loss is the mean."""
    if logits.ndim < 3:  # a classifier of texts: one label per text
        return len(labels)
    predicted = labels[:, 1:]  # nothing precedes, and so predicts, the first token
    return int((predicted != IGNORED).sum())


def _gram_hook(total: Tensor, context: _BatchContext, module: str) -> Callable[..., None]:
    """A hook that adds Σ x xᵀ over the layer's inputs x to `total`."""

    def hook(_layer: object, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = _tokens(inputs[0], context.mask, module).float()
        total.add_(x.T @ x)

    return hook


def _gradient_hook(total: Tensor, context: _BatchContext, module: str) -> Callable[..., None]:
    """A hook that adds ∂L/∂W = (∂L/∂y)ᵀ x to `total`, times the number of labels that L is the mean over."""
    del module

    def hook(_layer: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def backward(y: Tensor) -> None:
            total.add_(y.flatten(0, -2).float().T @ x.float(), alpha=context.count)

        output.register_hook(backward)

    return hook


def _tokens(x: Tensor, mask: Tensor, module: str) -> Tensor:
    """A layer's inputs (n, in) without padding; a layer that sees one vector per text sees no padding."""
    if x.shape[:-1] == mask.shape:
        return x[mask]
    if x.shape[:-1] == mask.shape[:1]:
        return x
    if x.shape[:-1] == (mask.numel(),):
        return x[mask.flatten()]
    raise UnsupportedError(
        f"{module}: its inputs have shape {tuple(x.shape)}, which is neither one vector per token nor one per text of "
        f"a batch {tuple(mask.shape)}, so that padding cannot be told from text; its statistics cannot be collected"
    )


def groups(sizes: Mapping[str, int], limit: int) -> Iterable[list[str]]:
    """Split names into groups, in order, whose sizes add up to at most `limit`; a larger one is a group by itself."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def _measurable(adapter: Adapter) -> tuple[Adapter, Source]:
    """The adapter and its source.

    Raises:
        UnsupportedError: It has no ΔW to measure, or no file to know it by.
    """
    if any(entry.kind.multiplies for entry in adapter.modules.entries.values()):
        raise UnsupportedError(
            f"{adapter.name} is an (IA)³ adapter; statistics can be collected for adapters that have a ΔW, such as LoRA"
        )
    if adapter.source is None or adapter.source.sha256 is None:
        raise UnsupportedError(
            f"{adapter.name} was not read from files: save it, and collect from there"
        )
    return adapter, adapter.source


def _accelerator() -> Any:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
    from accelerate.utils import DataLoaderConfiguration  # pyright: ignore[reportMissingTypeStubs]

    # even_batches would count some texts twice
    return Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
