"""`distill_merge`: a merge, trained a little to answer as its adapters do."""

import dataclasses
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import AdapterLike, load_adapter, load_adapters
from pcb_peft.base.model import lazy_base
from pcb_peft.data.batches import Data, Row, spread
from pcb_peft.data.models import load_base, task_type_of
from pcb_peft.distillation.base import head_of
from pcb_peft.distillation.checkpoint import Checkpoint
from pcb_peft.distillation.student import Student
from pcb_peft.distillation.teacher import Reader
from pcb_peft.distillation.texts import digest_of, encoded, read_texts, tokenizer_for
from pcb_peft.distillation.training import Divergences, Lesson, Schedule, Training
from pcb_peft.errors import MismatchError, OptionError
from pcb_peft.files.yaml_text import dump_yaml
from pcb_peft.runtime.progress import tracker
from pcb_peft.version import __version__
from pcb_peft.writing.model_card import Facts, table
from pcb_peft.writing.targets import existing

FILE_NAME = "distill_recipe.yaml"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DistilledAdapter(Adapter):
    """A merge after its distillation.

    Attributes:
        recipe: Adapters, texts and settings, by hash.
        history: Step to the divergence from each adapter on held-out texts.
        best_step: The step whose state this is.
    """

    recipe: Mapping[str, Any]
    history: Mapping[int, Divergences]
    best_step: int

    def companion_files(self, without: Container[str] | None = None) -> dict[str, bytes]:
        text = dump_yaml(dict(self.recipe))
        return {FILE_NAME: text.encode(), **super().companion_files(without)}

    def card_parts(self) -> tuple[str, Facts, dict[str, str]]:
        adapters = self.recipe["adapters"]
        sources = [(adapter["name"], f"{adapter['texts']} texts") for adapter in adapters]
        settings = [("steps", self.best_step), ("recipe", FILE_NAME)]
        tables = [table(("adapter", "weight"), sources), table(("setting", "value"), settings)]
        title = f"{len(adapters)} adapters merged, and distilled on unlabelled texts"
        facts = Facts(base_model=self.base_model, task_type=self.task_type)
        return title, facts, {"": "\n\n".join(tables), **self.loading_sections()}


def distill_merge(  # noqa: PLR0913  (every choice, by name)
    merged: AdapterLike,
    adapters: Sequence[AdapterLike],
    texts: Sequence[Data],
    base_model: str | Path | Any,
    *,
    limit: int = 64,
    steps: int = 80,
    learning_rate: float = 0.05,
    batch_texts: int = 8,
    held_out: float = 0.125,
    new_tokens: int = 16,
    max_length: int = 256,
    tokenizer: Any = None,
    dequantize: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> DistilledAdapter:
    """Train a merge a little, on unlabelled texts of its tasks, to answer as each adapter answers its own.

    This is a little training, not a closed form. The base model and lora_A stay as they are; lora_B moves towards what
    the adapters say of their texts: class probabilities, the next-token probabilities of their own continuations, or
    hidden states where there is no head. What each adapter says is asked once and kept. The result has the rank of the
    merge and is saved, loaded and folded like any adapter.

    Args:
        merged: The merge to begin with; its rank is the rank of the result.
        adapters: Those that were merged.
        texts: Per adapter, a ``.jsonl`` file or rows with `text` and, if wanted, `text_pair`; or plain texts. For a
            language model a text is a prompt, which the adapter continues; its key may be `prompt`, as in the files of
            `evaluate`. Labels and answers are not read.
        base_model: Path or hub id, or a model of transformers.
        limit: The most texts per adapter, evenly spread over its data.
        steps: Updates.
        learning_rate: The peak of Adam's steps, as a fraction of the root mean square of each lora_B.
        batch_texts: Texts of each task per update.
        held_out: The fraction of each task's texts that decides when to stop; 0: the texts that are trained on do.
        new_tokens: The most tokens by which a language model continues a text; 0: it answers the text's own tokens.
        max_length: In tokens; longer texts are cut.
        tokenizer: Default: the base model's.
        dequantize: Compute the weights of a quantised base model from their codes.
        seed: Of the order of the texts.
        checkpoint: A file from which an interrupted run goes on, and which it writes.
        progress: Show a bar; default: on a terminal.

    Returns:
        The merge as it is after its best step.

    Raises:
        OptionError: A value that is not allowed, or not one set of texts per adapter.
        UnsupportedError: A delta or a head that cannot be trained or switched.
        BaseModelError: The base model cannot be loaded.
        MismatchError: An adapter does not fit the base model.

    Example:
        >>> merged = merge_adapters(["math-lora", "law-lora"], "flat", rank=16)
        >>> better = distill_merge(merged, ["math-lora", "law-lora"], ["math.jsonl", "law.jsonl"], "base")
        >>> better.save_pretrained("merged")
    """
    _check(adapters, texts, held_out)
    given = base_model if isinstance(base_model, str | Path) else None
    base = lazy_base(given, dequantize=dequantize)
    loaded = load_adapters(adapters, base_model=base)
    start = load_adapter(merged, base_model=base)
    rows = [read_texts(data, limit) for data in texts]
    schedule = Schedule(steps, learning_rate, batch_texts, seed)
    settings = {"held_out": held_out, "new_tokens": new_tokens, "max_length": max_length}
    recipe = _recipe(start, loaded, rows, dataclasses.asdict(schedule) | settings)
    inputs = existing(*_paths(start, *loaded), *texts, base_model)
    resumable = Checkpoint(Path(checkpoint) if checkpoint else None, _fingerprint(recipe))
    resumable.check(inputs)
    task_type = _common_task_type(loaded) or task_type_of(base_model)
    accelerator, track = _accelerator(), tracker(progress)
    model = load_base(base_model, task_type, dequantize=dequantize)
    model = model.to(accelerator.device).requires_grad_(False)
    words = tokenizer_for(tokenizer, base_model)
    reader = Reader(task_type, words.pad_token_id, new_tokens)
    student = Student(start, model).to(accelerator.device)
    lessons = [
        _lesson(reader, model, adapter, encoded(some, words, max_length), held_out)
        for adapter, some in zip(track(loaded, "ask the adapters"), rows, strict=True)
    ]
    training = Training(model, student, reader, lessons, schedule, accelerator)
    with student.attached(model):
        training.run(track, resumable)
    return _result(start, training, recipe, inputs)


def _check(adapters: Sequence[Any], texts: Sequence[Any], held_out: float) -> None:
    """Raises OptionError for what cannot be distilled."""
    if len(texts) != len(adapters) or not adapters:
        raise OptionError(
            f"{len(adapters)} adapters and texts for {len(texts)}: give one file (or list) per adapter, in order"
        )
    if not 0 <= held_out < 1:
        raise OptionError(f"held_out is {held_out!r}; it must be a fraction from 0, less than 1")


def _recipe(
    start: Adapter,
    adapters: Sequence[Adapter],
    rows: Sequence[Sequence[Row]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Adapters, texts and settings, by hash: everything that is needed to make the result again."""
    return {
        "merge": _identity(start),
        "adapters": [
            {**_identity(adapter), "texts_sha256": digest_of(some), "texts": len(some)}
            for adapter, some in zip(adapters, rows, strict=True)
        ],
        **settings,
        "version": __version__,
    }


def _paths(*adapters: Adapter) -> list[str]:
    """Return what adapters were made from."""
    return [path for adapter in adapters for path in adapter.inputs]


def _result(
    start: Adapter, training: Training, recipe: Mapping[str, Any], inputs: tuple[str, ...]
) -> DistilledAdapter:
    """The merge with the trained deltas; all else that it holds stays as it is."""
    kept = {field.name: getattr(start, field.name) for field in dataclasses.fields(Adapter)}
    kept |= {
        "name": f"{start.name}-distilled",
        "modules": training.student.deltas(start.modules.entries),
        "source": None,
        "files": None,
        "inputs": inputs,
    }
    history, best = training.history, training.best_step
    return DistilledAdapter(**kept, recipe=recipe, history=history, best_step=best)


def _lesson(
    reader: Reader, model: Any, adapter: Adapter, texts: Sequence[Any], held_out: float
) -> Lesson:
    """Ask an adapter, and set the held-out texts apart, evenly spread."""
    head = head_of(adapter, model)
    examples = reader.examples(model, adapter, head, texts)
    apart = int(held_out * len(examples))
    places = set(spread(range(len(examples)), apart))
    return Lesson(
        adapter.name,
        head,
        [example for place, example in enumerate(examples) if place not in places],
        [examples[place] for place in sorted(places)],
    )


def _common_task_type(adapters: Sequence[Adapter]) -> str | None:
    types = {adapter.task_type for adapter in adapters}
    if len(types) > 1:
        raise MismatchError(
            f"the adapters are of task types {', '.join(sorted(map(str, types)))}: one model must answer for all"
        )
    return types.pop()


def _identity(adapter: Adapter) -> dict[str, str]:
    """Name and hash of an adapter."""
    digest = adapter.source.sha256 if adapter.source else None
    return {"name": adapter.name} | ({"sha256": digest} if digest else {})


def _fingerprint(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _accelerator() -> Any:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

    return Accelerator()
