"""The answers of each adapter to its own texts, asked for once and kept."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import LANGUAGE_MODELS
from pcb_peft.data.live_adapters import with_adapter
from pcb_peft.data.models import WITH_LOGITS, accepted_arguments
from pcb_peft.distillation.base import Head, call, head_in_place
from pcb_peft.distillation.targets import States, Target, distribution

Batch = dict[str, Tensor]
BATCH_TEXTS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One text, and its adapter's answer.

    Attributes:
        inputs: The model's inputs, each (1, tokens), without padding.
        target: The adapter's own output.
        start: The first token whose output counts.
    """

    inputs: Batch
    target: Target
    start: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Reader:
    """Reads the outputs of one kind of model.

    Attributes:
        task_type: PEFT's, of the adapters. Models of another type than those of `WITH_LOGITS` have hidden states only.
        pad_token: The id that fills up the shorter texts of a batch.
        new_tokens: The most tokens by which a language model continues a text.
    """

    task_type: str | None
    pad_token: int
    new_tokens: int

    def outputs(
        self, model: Any, head: Head, texts: Sequence[Batch], starts: Sequence[int]
    ) -> list[Tensor]:
        """Run the model on several texts as one batch.

        A language model's head, whose vocabulary is large, runs on the tokens that count alone.

        Args:
            model: The model.
            head: Parameters in the place of its own.
            texts: Their inputs, without padding.
            starts: Per text, the first token whose output counts.

        Returns:
            Per text: logits (1, classes), or (tokens, vocabulary), or hidden states (tokens, width); without padding.
        """
        batch = moved(padded(texts, self.pad_token), model)
        lengths = [one.get("decoder_input_ids", one["input_ids"]).shape[1] for one in texts]
        first, options = 0, {}
        if self.task_type == "CAUSAL_LM" and "logits_to_keep" in accepted_arguments(model):
            first = min(starts)
            counted = torch.arange(first, max(lengths), device=batch["input_ids"].device)
            options["logits_to_keep"] = counted
        output = call(model, head, batch, **options)
        values = output.logits if self.task_type in WITH_LOGITS else output.last_hidden_state
        return [
            value[None] if value.ndim == 1 else value[start - first : length - first]
            for value, start, length in zip(values, starts, lengths, strict=True)
        ]

    def examples(
        self, model: Any, adapter: Adapter, head: Head, texts: Sequence[Batch]
    ) -> list[Example]:
        """Ask an adapter for its answers to its texts, in batches."""
        found: list[Example] = []
        with torch.no_grad(), with_adapter(model, adapter):
            for first in range(0, len(texts), BATCH_TEXTS):
                some, starts = texts[first : first + BATCH_TEXTS], [0] * BATCH_TEXTS
                if self.task_type in LANGUAGE_MODELS and self.new_tokens:
                    some, starts = self._continued(model, head, some)
                starts = starts[: len(some)]
                outputs = self.outputs(model, head, some, starts)
                found += map(self._example, some, outputs, starts)
        return found

    def _example(self, inputs: Batch, output: Tensor, start: int) -> Example:
        logits = self.task_type in WITH_LOGITS
        target = distribution(output) if logits else States(output.float().cpu())
        return Example(inputs, target, start)

    def _continued(
        self, model: Any, head: Head, texts: Sequence[Batch]
    ) -> tuple[list[Batch], list[int]]:
        """Return texts with the adapter's own greedy continuations, and the first tokens whose output counts."""
        writes = model.config.is_encoder_decoder
        given = moved(padded(texts, self.pad_token, "right" if writes else "left"), model)
        with head_in_place(model, head):
            tokens = model.generate(
                **given,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=self.pad_token,
            ).cpu()
        new = tokens if writes else tokens[:, given["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        stops = torch.tensor([ends] if isinstance(ends, int) else ends or [], dtype=new.dtype)
        ended = [_up_to(stops, row, int(writes)) for row in new]
        if writes:
            pairs = zip(texts, ended, strict=True)
            answered = [text | {"decoder_input_ids": row[None, :-1]} for text, row in pairs]
            return answered, [0] * len(texts)
        continued: list[Batch] = []
        for text, row in zip(texts, ended, strict=True):
            # the last token is answered by the output before it
            inputs = torch.cat([text["input_ids"][0], row])[None, :-1]
            continued.append({"input_ids": inputs, "attention_mask": torch.ones_like(inputs)})
        return continued, [text["input_ids"].shape[1] - 1 for text in texts]


def _up_to(stops: Tensor, tokens: Tensor, begin: int) -> Tensor:
    """Return tokens up to the first one that ends a text, from a place on: a decoder may begin with such a token."""
    found = torch.isin(tokens[begin:], stops).nonzero()
    return tokens[: begin + int(found[0, 0]) + 1] if len(found) else tokens


def padded(texts: Sequence[Batch], pad_token: int, side: str = "right") -> Batch:
    """Return several texts as one batch, filled up on the right or on the left."""
    fill = {"input_ids": pad_token, "decoder_input_ids": pad_token}
    batch: Batch = {}
    for name in texts[0]:
        rows = [text[name][0] for text in texts]
        value = fill.get(name, 0)
        batch[name] = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side=side
        )
    return batch


def moved(batch: Batch, model: Any) -> Batch:
    """Return a batch on the model's device."""
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}
