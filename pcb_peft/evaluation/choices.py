"""The likelihoods of answers to choose from: a language model reads each prompt once, and then its answers."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.data.batches import IGNORED
from pcb_peft.data.models import accepted_arguments
from pcb_peft.evaluation.runner import Encoded, Runner

Likelihood = tuple[float, int]
"""The log-likelihood of an answer, and how many tokens it has."""

CACHES = ("cache", "past_key_values")
"""What the keys and values that a model has kept are called since transformers 5.24, and before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what follows it in each of its answers.

    Attributes:
        prompt: The tokens that all answers begin with; at least one.
        rests: Per answer, the tokens after them that are read.
        targets: Per answer, the tokens that are predicted: by the last one of the prompt, and by each one of the rest;
            `IGNORED` where the answer has not begun.
    """

    prompt: list[int]
    rests: list[list[int]]
    targets: list[list[int]]

    @classmethod
    def of(cls, answers: Sequence[Encoded]) -> "Question | None":
        """Return the question of some answers, each with its prompt; None if nothing is common to all of them."""
        tokens, labels = [one["input_ids"] for one in answers], [one["labels"] for one in answers]
        starts = [next((n for n in range(1, len(row)) if row[n] != IGNORED), 0) for row in labels]
        columns = zip(*tokens, strict=False)  # to the end of the shortest
        common = itertools.takewhile(lambda column: len({*column}) == 1, columns)
        shared = min(len([*common]), *starts)
        if not shared:
            return None
        rests = [row[shared:-1] for row in tokens]
        return cls(tokens[0][:shared], rests, [row[shared:] for row in labels])

    def beginning(self) -> "Question":
        """Return at most eight tokens of the prompt, and four of two answers."""
        rests, targets = self.rests[:2], self.targets[:2]
        return Question(self.prompt[:8], [rest[:4] for rest in rests], [row[:5] for row in targets])


def shared_likelihoods(
    runner: Runner, model: Any, what: str, texts: Sequence[Sequence[Encoded]]
) -> list[list[Likelihood]] | None:
    """Return the likelihood of each answer to each text; None where the prompts cannot be read once.

    Args:
        runner: The tokenizer and the sizes of batches.
        model: A causal language model.
        what: What the progress bar calls it.
        texts: Per text, its prompt with each of its answers.
    """
    questions = [Question.of(answers) for answers in texts]
    known = [question for question in questions if question is not None]
    if len(known) < len(texts) or not _keeps_what_it_read(model, known[0].prompt[:1], runner):
        return None
    if not _agrees_with_whole_texts(runner, model, known):
        return None
    more = any(rest for question in known for rest in question.rests)
    answers = max(len(question.rests) for question in known) if more else 1
    lengths = [len(question.prompt) for question in known]
    return runner.in_batches(
        lengths,
        lambda places: _likelihoods(runner, model, [known[place] for place in places]),
        what,
        max(1, runner.batch_size // answers),
    )


def _keeps_what_it_read(model: Any, tokens: list[int], runner: Runner) -> bool:
    """True if a model keeps keys and values of each token, and nothing else, such as the state of a Mamba."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    output = model(input_ids=torch.tensor([tokens], device=runner.device), use_cache=True)
    cache = _cache(output)
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def _agrees_with_whole_texts(runner: Runner, model: Any, questions: Sequence[Question]) -> bool:
    """True if a short and a long prompt, read once and together, give what their whole texts give.

    Some models count positions in a way of their own, or take one token at a time after what they have kept.
    """
    by_length = sorted(questions, key=lambda question: len(question.prompt))
    tried = [question.beginning() for question in (by_length[0], by_length[-1])]
    try:
        together = _likelihoods(runner, model, tried)
    except Exception:  # noqa: BLE001  (each model refuses in a way of its own; whole texts are read instead)
        return False
    device = runner.device
    for question, likelihoods in zip(tried, together, strict=True):
        for rest, target, (total, _) in zip(
            question.rests, question.targets, likelihoods, strict=True
        ):
            tokens = torch.tensor([question.prompt + rest], device=device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, len(question.prompt) - 1 :]
            alone = picked(logits, torch.tensor([target], device=device)).sum().item()
            if not same_likelihood(total, alone, logits.dtype):
                return False
    return True


def _likelihoods(
    runner: Runner, model: Any, questions: Sequence[Question]
) -> list[list[Likelihood]]:
    prompts = [{"input_ids": q.prompt, "attention_mask": [1] * len(q.prompt)} for q in questions]
    batch = runner.padded(prompts, "left")
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last = torch.tensor([mask.shape[1] - 1], device=runner.device)
    output = _run(model, positions, **batch, use_cache=True, logits_to_keep=last)
    owners = [place for place, question in enumerate(questions) for _ in question.rests]
    rests = [rest for question in questions for rest in question.rests]
    targets = [target for question in questions for target in question.targets]
    index = torch.tensor(owners, device=runner.device)
    begin = torch.tensor([target[0] for target in targets], device=runner.device)
    totals = picked(output.logits[:, -1][index], begin)
    if any(rests):
        pairs = zip(rests, targets, strict=True)
        rows = [
            {"input_ids": rest, "attention_mask": [1] * len(rest), "labels": target[1:]}
            for rest, target in pairs
        ]
        read = runner.padded(rows, "right")
        cache = _cache(output)
        cache.batch_select_indices(index)
        after = mask.sum(-1, keepdim=True)[index] + torch.arange(
            read["input_ids"].shape[1], device=runner.device
        )
        logits = _run(
            model,
            after,
            input_ids=read["input_ids"],
            attention_mask=torch.cat([mask[index], read["attention_mask"]], -1),
            cache=cache,
        ).logits
        totals = totals + picked(logits, read["labels"]).sum(-1)
    scored = iter(zip(totals.tolist(), map(_count, targets), strict=True))
    return [[next(scored) for _ in question.rests] for question in questions]


def _cache(output: Any) -> Any:
    """Return the keys and values that a model has kept; None if it keeps none."""
    found = (getattr(output, name, None) for name in CACHES)
    return next((cache for cache in found if cache is not None), None)


def _run(model: Any, positions: Tensor, cache: Any = None, **given: Any) -> Any:
    """Run a model, with what its class takes of positions and of the number of logits that are needed."""
    takes = accepted_arguments(model)
    given |= {"position_ids": positions}
    if cache is not None:
        given |= {next((name for name in CACHES if name in takes), CACHES[-1]): cache}
    optional = ("position_ids", "logits_to_keep")
    return model(**{k: v for k, v in given.items() if k not in optional or k in takes})


def same_likelihood(one: float, other: float, dtype: torch.dtype) -> bool:
    """True if two log-likelihoods differ by no more than a model of this dtype rounds."""
    rounding = 1e-3 if dtype == torch.float32 else 0.1
    return math.isclose(one, other, rel_tol=rounding, abs_tol=rounding)


def picked(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities of tokens; 0 where they are ignored."""
    learnt = targets != IGNORED
    found = torch.zeros(targets.shape, device=logits.device)
    some = torch.log_softmax(logits[learnt].float(), -1)
    found[learnt] = some.gather(-1, targets[learnt][:, None])[:, 0]
    return found


def _count(targets: Sequence[int]) -> int:
    return max(1, sum(target != IGNORED for target in targets))
