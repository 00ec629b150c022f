"""Five ways to measure a model on texts. Each gives one number per text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.data.batches import IGNORED
from pcb_peft.evaluation.texts import TextTask
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import Track

Encoded = dict[str, list[int]]  # input_ids, attention_mask, and for an answer: labels

Batch = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Runner:
    """The model and settings with which texts are run.

    Attributes:
        tokenizer: The base model's.
        device: Where the model is.
        batch_size: Texts at a time.
        max_length: Tokens; longer texts are cut.
        track: Shows progress.
    """

    tokenizer: Any
    device: torch.device
    batch_size: int
    max_length: int
    track: Track

    def outcomes(self, model: Any, task: TextTask) -> list[float]:
        """Run a task's texts; one number per text: 1 or 0 for right or wrong, or the loss."""
        encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        if model.config.pad_token_id is None:  # a classifier on a decoder looks for it
            model.config.pad_token_id = self.tokenizer.pad_token_id
        with torch.inference_mode():
            return OUTCOMES[task.measure](self, model, task, encoder_decoder)

    def run(
        self,
        texts: Sequence[Encoded],
        function: Callable[[Batch], Sequence[Any]],
        what: str,
        *,
        side: str = "right",
    ) -> list[Any]:
        """Apply a function to padded batches of like length; its results in the order of the texts.

        The batches are shared out among processes. All of them get all results.

        Args:
            texts: Tokens of each text.
            function: Takes a batch, returns one result per text.
            what: What the progress bar calls it.
            side: Where padding goes: right, or left for generation.
        """
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]["input_ids"]))
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        own = current().partition(chunks, lambda c: len(c) * len(texts[c[0]]["input_ids"]))
        found: dict[int, Any] = {}
        for chunk in self.track(own, what):
            batch = self._padded([texts[place] for place in chunk], side)
            found |= zip(chunk, function(batch), strict=True)
        everywhere = [pair for part in current().all_gather(list(found.items())) for pair in part]
        return [result for _, result in sorted(everywhere, key=lambda pair: pair[0])]

    def _padded(self, texts: Sequence[Encoded], side: str) -> Batch:
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": IGNORED}
        batch: dict[str, Tensor] = {}
        for key in texts[0]:
            longest = max(len(text[key]) for text in texts)
            values = torch.full((len(texts), longest), fill.get(key, 0))
            for row, text in zip(values, texts, strict=True):
                count = len(text[key])
                row[longest - count if side == "left" else 0 :][:count] = torch.tensor(text[key])
            batch[key] = values.to(self.device)
        return batch

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """The tokens of a text, cut to the length."""
        options = {} if pair is None else {"text_pair": pair}
        return dict(self.tokenizer(text, truncation=True, max_length=self.max_length, **options))

    def encode_answer(self, prompt: str, answer: str) -> Encoded:
        """The tokens of a prompt and its answer; the labels are those of the answer.

        A prompt that is too long loses its beginning.
        """
        before = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(prompt + answer)["input_ids"]
        start = len(before) if prompt else int(bool(before))
        start = min(start, len(whole) - 1)
        labels = [IGNORED] * start + whole[start:]
        tokens, labels = whole[-self.max_length :], labels[-self.max_length :]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    def encode_target(self, prompt: str, answer: str) -> Encoded:
        """The tokens of an encoder-decoder's prompt, with those of its answer as labels."""
        return {**self.encode(prompt), "labels": self.tokenizer(text_target=answer)["input_ids"]}


def by_head(runner: Runner, model: Any, task: TextTask, encoder_decoder: bool) -> list[float]:
    """1 where the class with the largest logit is the right one."""
    del encoder_decoder
    texts = [runner.encode(str(row["text"]), row.get("text_pair")) for row in task.rows]
    predicted = runner.run(
        texts, lambda batch: model(**batch).logits.argmax(-1).tolist(), task.name
    )
    answers = [task.class_of(row) for row in task.rows]
    return [float(a == b) for a, b in zip(predicted, answers, strict=True)]


def by_nearest(runner: Runner, model: Any, task: TextTask, encoder_decoder: bool) -> list[float]:
    """1 where the name of the right label is nearest to the text, by the cosine of their embeddings.

    An embedding is the mean of the encoder's outputs over the tokens.
    """
    del encoder_decoder
    encoder = getattr(model, "get_base_model", lambda: model)().base_model
    names = [runner.encode(label) for label in task.labels]
    texts = [runner.encode(str(row["text"]), row.get("text_pair")) for row in task.rows]

    def embed(batch: Batch) -> list[list[float]]:
        mask = batch["attention_mask"].unsqueeze(-1)
        means = (encoder(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(means).tolist()

    embedded = torch.tensor(runner.run([*names, *texts], embed, task.name))
    nearest = (embedded[len(names) :] @ embedded[: len(names)].T).argmax(-1).tolist()
    answers = [task.class_of(row) for row in task.rows]
    return [float(a == b) for a, b in zip(nearest, answers, strict=True)]


def by_choice(runner: Runner, model: Any, task: TextTask, encoder_decoder: bool) -> list[float]:
    """1 where the right answer is the most likely one."""
    pairs = [(row, choice) for row in task.rows for choice in task.choices(row)]
    texts = [_answered(runner, task, row, choice, encoder_decoder) for row, choice in pairs]
    likelihoods = iter(_log_likelihoods(runner, model, task.name, texts, encoder_decoder))
    outcomes: list[float] = []
    for row in task.rows:
        scored = {}
        for choice in task.choices(row):
            total, tokens = next(likelihoods)
            scored[choice] = total / tokens if task.length_normalised else total
        outcomes.append(float(max(scored, key=scored.__getitem__) == task.answer(row)))
    return outcomes


def by_loss(runner: Runner, model: Any, task: TextTask, encoder_decoder: bool) -> list[float]:
    """The mean loss per token of each text's answer, or of the text where it has none."""
    texts = []
    for row in task.rows:
        answer = task.answer(row)
        if answer is None:
            texts.append(runner.encode_answer("", task.prompt(row)))
        else:
            texts.append(_answered(runner, task, row, answer, encoder_decoder))
    scored = _log_likelihoods(runner, model, task.name, texts, encoder_decoder)
    return [-total / tokens for total, tokens in scored]


def by_exact_match(
    runner: Runner, model: Any, task: TextTask, encoder_decoder: bool
) -> list[float]:
    """1 where the first line that the model generates is the right answer, but for spaces."""
    words, answers = runner.tokenizer, [str(task.answer(row)) for row in task.rows]
    longest = max(len(words(answer)["input_ids"]) for answer in answers) + 4
    texts = [runner.encode(task.prompt(row)) for row in task.rows]

    def generate(batch: Batch) -> list[str]:
        tokens = model.generate(
            **batch, max_new_tokens=longest, do_sample=False, pad_token_id=words.pad_token_id or 0
        )
        new = tokens if encoder_decoder else tokens[:, batch["input_ids"].shape[1] :]
        return words.batch_decode(new, skip_special_tokens=True)

    generated = runner.run(texts, generate, task.name, side="right" if encoder_decoder else "left")
    return [float(_line(a) == _line(b)) for a, b in zip(generated, answers, strict=True)]


OUTCOMES = {
    "head": by_head,
    "choose": by_choice,
    "nearest": by_nearest,
    "exact": by_exact_match,
    "loss": by_loss,
}
"""The functions of `MEASURES`."""


def _answered(
    runner: Runner, task: TextTask, row: Mapping[str, Any], answer: str, encoder_decoder: bool
) -> Encoded:
    prompt = task.prompt(row)
    if encoder_decoder:
        return runner.encode_target(prompt, answer)
    separator = "" if prompt[-1:].isspace() or answer[:1].isspace() else task.separator
    return runner.encode_answer(prompt, separator + answer)


def _log_likelihoods(
    runner: Runner, model: Any, what: str, texts: Sequence[Encoded], encoder_decoder: bool
) -> list[tuple[float, int]]:
    """The log-likelihood of each text's labels, and how many tokens they are."""

    def measure(batch: Batch) -> list[tuple[float, int]]:
        labels = batch["labels"]
        given = batch if encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**given).logits
        if not encoder_decoder:  # each token is predicted by the one before it
            logits, labels = logits[:, :-1], labels[:, 1:]
        learnt = labels != IGNORED
        scores = torch.zeros(labels.shape, device=logits.device)
        some = torch.log_softmax(logits[learnt].float(), -1)
        scores[learnt] = some.gather(-1, labels[learnt][:, None])[:, 0]
        counts = learnt.sum(-1).clamp(min=1)
        return list(zip(scores.sum(-1).tolist(), counts.tolist(), strict=True))

    return runner.run(texts, measure, what)


def _line(text: str) -> str:
    """The first line with single spaces."""
    lines = text.strip().splitlines()
    return " ".join(lines[0].split()) if lines else ""
