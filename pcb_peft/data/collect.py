"""What methods that need data want to know of an adapter: measured on texts, through its base model, loaded by PEFT.

One process or several (``accelerate launch -m pcb_peft collect …``): each takes its share of the batches, the sums are
added up at the end, and the main process writes.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapter
from pcb_peft.adapters.source import Source
from pcb_peft.data.batches import Data, batches_of
from pcb_peft.data.statistics_file import (
    KINDS,
    TaskStatistics,
    check_file,
    open_statistics,
    save_statistics,
)
from pcb_peft.deltas.delta import Diagonal
from pcb_peft.errors import BaseModelError, MismatchError, OptionError, UnsupportedError
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.resources import number_of_bytes

DEFAULT_MEMORY = 4 << 30

Sums: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = Mapping[str, Tensor]


def collect_statistics(  # noqa: PLR0913  (every choice, by name)
    adapter: str | Path | Source | Adapter,
    base_model: Any,
    data: Data,
    output: str | Path | None = None,
    kind: str = "gram",
    *,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_length: int = 512,
    limit: int | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    overwrite: bool = False,
    progress: bool | None = None,
) -> TaskStatistics:
    """Measures what a method needs to know of an adapter, and writes it into a file.

    The data are read once for as many modules as `max_memory` holds the sums of, then again for the next ones.

    Args:
        adapter: A directory, a hub id, or what `load_adapter` made of one.
        base_model: Path or hub id, or a model of transformers, which gets the adapter and is rid of it in the end.
        data: A ``.jsonl`` file or rows, each with `text` and, if wanted, `text_pair`, `label` or `answer`; plain texts;
            or batches, such as a DataLoader: mappings of tensors that the model takes.
        output: The file to write; None: the statistics stay in memory.
        kind: "gram" (mean of x xᵀ over the tokens x that a module sees, padding left out) or "gradient" (of the mean
            loss by W), which needs a loss: a sequence classifier's rows need a `label`, a number or one of `labels`; a
            causal language model learns the text, or, where a row has an `answer`, only that, after the text.
        labels: Names of the classes, in the order of the head's rows.
        tokenizer: Default: the base model's.
        batch_size: Of texts.
        max_length: In tokens; longer texts are cut.
        limit: How many texts to take, evenly spread over the data; None: all.
        max_memory: Bytes of sums that are held at once in a process, beside the model: a number, or "1G".
        overwrite: Replace the file.
        progress: Show bars; default: on a terminal.

    Raises:
        OptionError: A value or a row of the data that is not allowed.
        UnsupportedError: The adapter has no ΔW, or a layer is not linear.
        BaseModelError: The base model cannot be loaded.
        MismatchError: The adapter does not fit it.
        OutputError: The file cannot be written.
    """
    if kind not in KINDS:
        raise OptionError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    room = number_of_bytes(max_memory)
    if output is not None:
        check_file(Path(output), overwrite=overwrite)
    loaded, source = _supported(load_adapter(adapter))
    accelerator = _accelerator()
    with _adapted(loaded, source, base_model) as model:
        model.to(accelerator.device)
        texts = batches_of(
            data, tokenizer or base_model, model, labels, batch_size, max_length, limit
        )
        batches = accelerator.prepare_data_loader(texts) if _is_loader(texts) else texts
        measure = _Measure(model, batches, kind, accelerator, tracker(progress))
        statistics = measure.statistics(loaded, room)
    if output is None:
        return statistics
    if accelerator.is_main_process:
        save_statistics(statistics, Path(output), overwrite=overwrite)
    accelerator.wait_for_everyone()
    return open_statistics(Path(output))


@dataclasses.dataclass(frozen=True, slots=True)
class _Measure:
    """One model, one adapter, one statistic.

    Attributes:
        model: A PeftModel.
        batches: This process's share.
        kind: A key of `KINDS`.
        accelerator: Of Accelerate.
        track: Shows progress.
    """

    model: Any
    batches: Iterable[Batch]
    kind: str
    accelerator: Any
    track: Track

    def statistics(self, adapter: Adapter, max_memory: int) -> TaskStatistics:
        """The sums of all processes, divided by their count; as many modules at a time as the memory allows."""
        entries = adapter.modules.entries
        shapes = {module: KINDS[self.kind](entry.shape) for module, entry in entries.items()}
        means: Sums = {}
        count = 0
        for some in groups({m: 8 * a * b for m, (a, b) in shapes.items()}, max_memory):
            sums, own = self._pass({module: shapes[module] for module in some})
            count = int(self._total(torch.tensor(float(own))))
            if not count:
                raise OptionError(
                    "the data hold no token to measure on: give texts that are not empty"
                )
            means |= {m: (self._total(value) / count).float().cpu() for m, value in sums.items()}
        digest = adapter.source.sha256 if adapter.source else None
        return TaskStatistics(self.kind, shapes, means.__getitem__, count, digest)

    def _total(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum")

    def _pass(self, shapes: Mapping[str, tuple[int, int]]) -> tuple[Sums, int]:
        """One pass over the data: the sums of some modules, and over how many tokens or examples."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = {m: torch.zeros(shape, dtype=dtype, device=device) for m, shape in shapes.items()}
        see, run = (_gram, self._look) if self.kind == "gram" else (_gradient, self._learn)
        base, seen = self.model.get_base_model(), _Seen()
        hooks = [
            base.get_submodule(module).register_forward_hook(see(value, seen, module))
            for module, value in sums.items()
        ]
        try:
            counts = [
                run(_moved(batch, device), seen) for batch in self.track(self.batches, self.kind)
            ]
        finally:
            for hook in hooks:
                hook.remove()
        return sums, sum(counts)

    def _look(self, batch: Batch, seen: "_Seen") -> int:
        """A forward pass; how many tokens there were."""
        some = next(iter(batch.values()))
        seen.mask = batch.get("attention_mask", torch.ones(some.shape[:2])).bool().to(some.device)
        with torch.no_grad():
            self.model(**{name: values for name, values in batch.items() if name != "labels"})
        return int(seen.mask.sum())

    def _learn(self, batch: Batch, seen: "_Seen") -> int:
        """A backward pass; how many labels there were."""
        if "labels" not in batch:
            raise OptionError("kind gradient needs a loss: the batches have no labels")
        output = self.model(**batch)
        causal = output.logits.ndim == 3
        seen.count = (
            int((batch["labels"][:, causal:] != -100).sum()) if causal else len(batch["labels"])
        )
        if seen.count:  # a mean over no label is NaN
            self.model.zero_grad(set_to_none=True)
            output.loss.backward()
        self.model.zero_grad(set_to_none=True)
        return seen.count


@dataclasses.dataclass(slots=True)
class _Seen:
    """What the hooks know of the batch.

    Attributes:
        mask: (texts, tokens), False for padding.
        count: How many labels there are.
    """

    mask: Tensor = dataclasses.field(default_factory=lambda: torch.ones(0))
    count: int = 0


def _gram(total: Tensor, seen: _Seen, module: str) -> Callable[..., None]:
    def hook(_layer: object, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = _tokens(inputs[0], seen.mask, module).float()
        total.add_(x.T @ x)

    return hook


def _gradient(total: Tensor, seen: _Seen, module: str) -> Callable[..., None]:
    """∂L/∂W = (∂L/∂y)ᵀ x, times the number of labels, of which L is the mean."""
    del module

    def hook(_layer: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def backward(y: Tensor) -> None:
            total.add_(y.flatten(0, -2).float().T @ x.float(), alpha=seen.count)

        output.register_hook(backward)

    return hook


def _tokens(x: Tensor, mask: Tensor, module: str) -> Tensor:
    """The inputs (n, in) of a layer that are no padding; one that sees one vector per text sees no padding."""
    if x.shape[:-1] == mask.shape:
        return x[mask]
    if x.shape[:-1] == mask.shape[:1]:
        return x
    if x.shape[:-1] == (mask.numel(),):
        return x[mask.flatten()]
    raise UnsupportedError(
        f"{module}: its inputs have shape {tuple(x.shape)}, which is neither one vector per token nor one per text of "
        f"a batch {tuple(mask.shape)}: which of them are padding is not known"
    )


def groups(sizes: Mapping[str, int], limit: int) -> Iterable[list[str]]:
    """The names in order, as many at a time as fit in the limit together; at least one."""
    some: list[str] = []
    for name, size in sizes.items():
        if some and sum(sizes[other] for other in some) + size > limit:
            yield some
            some = []
        some.append(name)
    yield some


def _supported(adapter: Adapter) -> tuple[Adapter, Source]:
    """The adapter and where it is.

    Raises:
        UnsupportedError: There is no ΔW to measure, or no file to know the adapter by.
    """
    if any(entry.kind is Diagonal for entry in adapter.modules.entries.values()):
        raise UnsupportedError(
            f"{adapter.name} is an (IA)³ adapter: statistics are taken of those that have a ΔW"
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


def _is_loader(batches: object) -> bool:
    return isinstance(batches, torch.utils.data.DataLoader)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}


@contextlib.contextmanager
def _adapted(adapter: Adapter, source: Source, base_model: Any) -> Generator[Any]:
    """The base model with the adapter, in evaluation mode.

    Raises:
        BaseModelError: It cannot be loaded.
        MismatchError: PEFT found no place for a module of the adapter.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = _loaded(adapter, base_model) if isinstance(base_model, str | Path) else base_model
    with warnings.catch_warnings():  # of peft, about a name that transformers is going to drop
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        directory, options = _arguments(source)
        try:
            model = PeftModel.from_pretrained(base, directory, is_trainable=True, **options).eval()
        except (RuntimeError, ValueError) as error:
            raise MismatchError(f"{adapter.name} does not fit the base model: {error}") from error
    layers: dict[str, Any] = dict(model.get_base_model().named_modules())
    for module, entry in adapter.modules.entries.items():
        layer = layers.get(module)
        tuned = isinstance(layer, BaseTunerLayer)
        weight: Any = layers[module].get_base_layer().weight if tuned else None
        if weight is None or weight.numel() != entry.shape[0] * entry.shape[1]:
            raise MismatchError(
                f"{adapter.name}: PEFT put no adapter of shape {entry.shape} on {module} of {type(base).__name__}; "
                "give the model that the adapter was trained on"
            )
    try:
        yield model
    finally:
        if base is base_model:
            model.unload()


def _arguments(source: Source) -> tuple[str, dict[str, Any]]:
    """What PEFT is told to find an adapter."""
    directory = Path(source.path).expanduser()
    if directory.is_dir():
        return str(directory / source.subfolder if source.subfolder else directory), {}
    found = {"revision": source.revision, "subfolder": source.subfolder}
    return source.path, {name: value for name, value in found.items() if value is not None}


def _loaded(adapter: Adapter, base_model: str | Path) -> Any:
    """The base model in the class that the adapter's task calls for."""
    import transformers

    classes: dict[str, Any] = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    }
    head = [load for name, load in adapter.head.parameters.items() if name.endswith(".weight")]
    try:
        config = transformers.AutoConfig.from_pretrained(base_model)
        if adapter.task_type in ("SEQ_CLS", "TOKEN_CLS") and head:
            config.num_labels = len(head[-1]())
        stated: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return classes.get(str(adapter.task_type), stated).from_pretrained(
            base_model, config=config
        )
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(f"{base_model} cannot be loaded with transformers: {error}") from error
