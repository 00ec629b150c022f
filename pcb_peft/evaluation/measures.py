"""Five ways to measure a model on texts. Each gives one number per text."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.data.batches import IGNORED, name_padding
from pcb_peft.data.models import accepted_arguments
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.choices import (
    Likelihood,
    picked,
    same_likelihood,
    shared_likelihoods,
)
from pcb_peft.evaluation.runner import Batch, Encoded, Runner
from pcb_peft.evaluation.texts import TextTask


def outcomes_of(runner: Runner, model: Any, task: TextTask) -> list[float]:
    """Run a task's texts; one number per text: 1 or 0 for right or wrong, or the loss."""
    name_padding(model, runner.tokenizer)
    with torch.inference_mode():
        return OUTCOMES[task.measure](runner, model, task)


def by_head(runner: Runner, model: Any, task: TextTask) -> list[float]:
    """1 where the class with the largest logit is the right one."""
    texts = [runner.encode(str(row["text"]), row.get("text_pair")) for row in task.rows]

    def predict(batch: Batch) -> list[int]:
        logits = model(**batch).logits
        _refuse_nan(task, logits)
        return logits.argmax(-1).tolist()

    predicted = runner.run(texts, predict, task.name)
    answers = [task.class_of(row) for row in task.rows]
    return [float(a == b) for a, b in zip(predicted, answers, strict=True)]


def by_nearest(runner: Runner, model: Any, task: TextTask) -> list[float]:
    """1 where the name of the right label is nearest to the text, by the cosine of their embeddings.

    An embedding is the mean of the encoder's outputs over the tokens.
    """
    encoder = getattr(model, "get_base_model", lambda: model)().base_model
    names = [runner.encode(label) for label in task.labels]
    texts = [runner.encode(str(row["text"]), row.get("text_pair")) for row in task.rows]

    def embed(batch: Batch) -> list[list[float]]:
        mask = batch["attention_mask"].unsqueeze(-1)
        means = (encoder(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(means).tolist()

    embedded = torch.tensor(runner.run([*names, *texts], embed, task.name))
    _refuse_nan(task, embedded)
    nearest = (embedded[len(names) :] @ embedded[: len(names)].T).argmax(-1).tolist()
    answers = [task.class_of(row) for row in task.rows]
    return [float(a == b) for a, b in zip(nearest, answers, strict=True)]


def by_choice(runner: Runner, model: Any, task: TextTask) -> list[float]:
    """1 where the right answer is the most likely one."""
    texts = [
        [_answered(runner, model, task, row, choice) for choice in task.choices(row)]
        for row in task.rows
    ]
    found = None
    if not _is_encoder_decoder(model):
        found = shared_likelihoods(runner, model, task.name, texts)
    if found is None:
        every = [text for answers in texts for text in answers]
        scored = iter(_log_likelihoods(runner, model, task.name, every))
        found = [[next(scored) for _ in answers] for answers in texts]
    _refuse_nan(task, torch.tensor([total for answers in found for total, _ in answers]))
    outcomes: list[float] = []
    for row, likelihoods in zip(task.rows, found, strict=True):
        scores = [total / (n if task.length_normalised else 1) for total, n in likelihoods]
        best = task.choices(row)[scores.index(max(scores))]
        outcomes.append(float(best == task.answer(row)))
    return outcomes


def by_loss(runner: Runner, model: Any, task: TextTask) -> list[float]:
    """The mean loss per token of each text's answer, or of the text where it has none."""
    texts = []
    for row in task.rows:
        answer = task.answer(row)
        if answer is None:
            texts.append(runner.encode_answer("", task.prompt(row)))
        else:
            texts.append(_answered(runner, model, task, row, answer))
    scored = _log_likelihoods(runner, model, task.name, texts)
    _refuse_nan(task, torch.tensor([total for total, _ in scored]))
    return [-total / tokens for total, tokens in scored]


def by_exact_match(runner: Runner, model: Any, task: TextTask) -> list[float]:
    """1 where the model first generates the lines of the right answer, but for spaces."""
    encoder_decoder = _is_encoder_decoder(model)
    words, answers = runner.tokenizer, [str(task.answer(row)) for row in task.rows]
    longest = max(len(words(answer)["input_ids"]) for answer in answers) + 4
    encode = (
        runner.encode if encoder_decoder else functools.partial(runner.encode_end, room=longest)
    )
    texts = [encode(task.prompt(row)) for row in task.rows]

    def generate(batch: Batch) -> list[str]:
        tokens = model.generate(
            **batch, max_new_tokens=longest, do_sample=False, pad_token_id=words.pad_token_id or 0
        )
        new = tokens if encoder_decoder else tokens[:, batch["input_ids"].shape[1] :]
        return words.batch_decode(new, skip_special_tokens=True)

    generated = runner.run(texts, generate, task.name, side="right" if encoder_decoder else "left")
    return [float(_begins(text, answer)) for text, answer in zip(generated, answers, strict=True)]


OUTCOMES = {
    "head": by_head,
    "choose": by_choice,
    "nearest": by_nearest,
    "exact": by_exact_match,
    "loss": by_loss,
}
"""The functions of `MEASURES`."""


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _answered(
    runner: Runner, model: Any, task: TextTask, row: Mapping[str, Any], answer: str
) -> Encoded:
    prompt = task.prompt(row)
    if _is_encoder_decoder(model):
        return runner.encode_target(prompt, answer)
    separator = "" if prompt[-1:].isspace() or answer[:1].isspace() else task.separator
    return runner.encode_answer(prompt, separator + answer)


def _log_likelihoods(
    runner: Runner, model: Any, what: str, texts: Sequence[Encoded]
) -> list[Likelihood]:
    """The log-likelihood of each text's labels, and how many tokens they are."""
    encoder_decoder = _is_encoder_decoder(model)
    some_logits = not encoder_decoder and "logits_to_keep" in accepted_arguments(model)

    def measure(batch: Batch) -> list[Likelihood]:
        labels = batch["labels"]
        given = batch if encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
        if not encoder_decoder:  # each token is predicted by the one before it
            labels = labels[:, 1:]
        if some_logits:
            places = (labels != IGNORED).any(0).nonzero()[:, 0]
            given, labels = {**given, "logits_to_keep": places}, labels[:, places]
        logits = model(**given).logits[:, : labels.shape[1]]
        totals = picked(logits, labels).sum(-1)
        counts = (labels != IGNORED).sum(-1).clamp(min=1)
        return list(zip(totals.tolist(), counts.tolist(), strict=True))

    if not _padding_changes_nothing(runner, model.dtype, measure, texts):
        runner = dataclasses.replace(runner, batch_size=1)
    return runner.run(texts, measure, what)


def _padding_changes_nothing(
    runner: Runner,
    dtype: torch.dtype,
    measure: Callable[[Batch], list[Likelihood]],
    texts: Sequence[Encoded],
) -> bool:
    """True if a short text is as likely beside a longer one as alone.

    It is not in every model: some share a limited number of places for tokens among all texts of a batch.
    """
    by_length = sorted(texts, key=lambda text: len(text["input_ids"]))
    long = by_length[-1]
    short = next((text for text in by_length if len(text["input_ids"]) > 2), long)
    longer = {key: values[: len(short["input_ids"]) + 8] for key, values in long.items()}
    (alone, _), (beside, _) = (
        measure(runner.padded(batch, "right"))[0] for batch in ([short], [short, longer])
    )
    return same_likelihood(alone, beside, dtype)


def _refuse_nan(task: TextTask, values: Tensor) -> None:
    """Refuse answers that are no numbers: the first class, or the first answer, would be taken for the most likely one.

    Raises:
        OptionError: There are some.
    """
    if values.isnan().any():
        raise OptionError(
            f"{task.name}: the model computes nan, which is no number: weights are too large, or float16 overflows; "
            "take bfloat16 or float32 (dtype, --dtype), and look at the adapter with pcb-peft inspect"
        )


def _begins(text: str, answer: str) -> bool:
    """True if a text begins with all lines of an answer; with an empty one, if it is empty."""
    wanted = _lines(answer)
    return _lines(text)[: max(1, len(wanted))] == wanted


def _lines(text: str) -> list[str]:
    """The lines with single spaces, without empty ones before and after."""
    return [" ".join(line.split()) for line in text.strip().splitlines()]
