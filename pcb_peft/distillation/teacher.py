"""The answers of each adapter to its own texts, asked for once and kept."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.data.models import WITH_LOGITS
from pcb_peft.distillation.base import GENERATING, Head, call, with_adapter, with_head
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

    def outputs(self, model: Any, head: Head, texts: Sequence[Batch]) -> list[Tensor]:
        """Run the model on several texts as one batch.

        Returns:
            Per text: logits (1, classes), or (tokens, vocabulary), or hidden states (tokens, width); without padding.
        """
        output = call(model, head, moved(padded(texts, self.pad_token), model))
        values = output.logits if self.task_type in WITH_LOGITS else output.last_hidden_state
        lengths = [one.get("decoder_input_ids", one["input_ids"]).shape[1] for one in texts]
        return [
            value[None] if value.ndim == 1 else value[:length]
            for value, length in zip(values, lengths, strict=True)
        ]

    def examples(
        self, model: Any, adapter: Adapter, head: Head, texts: Sequence[Batch]
    ) -> list[Example]:
        """Ask an adapter for its answers to its texts, in batches."""
        found: list[Example] = []
        with torch.no_grad(), with_adapter(model, adapter):
            starts = [0] * len(texts)
            if self.task_type in GENERATING and self.new_tokens:
                texts, starts = zip(
                    *(self._continued(model, head, text) for text in texts), strict=True
                )
            for first in range(0, len(texts), BATCH_TEXTS):
                some = slice(first, first + BATCH_TEXTS)
                outputs = self.outputs(model, head, texts[some])
                found += map(self._example, texts[some], outputs, starts[some])
        return found

    def _example(self, inputs: Batch, output: Tensor, start: int) -> Example:
        counted = output[start:]
        target = (
            distribution(counted)
            if self.task_type in WITH_LOGITS
            else States(counted.float().cpu())
        )
        return Example(inputs, target, start)

    def _continued(self, model: Any, head: Head, text: Batch) -> tuple[Batch, int]:
        """Return a text with the adapter's own greedy continuation, and the first token whose output counts."""
        with with_head(model, head):
            given = moved(text, model)
            tokens = model.generate(**given, max_new_tokens=self.new_tokens, do_sample=False).cpu()
        if model.config.is_encoder_decoder:
            return text | {"decoder_input_ids": tokens[:, :-1]}, 0
        inputs = tokens[:, :-1]  # the last token is answered by the output before it
        start = text["input_ids"].shape[1] - 1
        return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}, start


def padded(texts: Sequence[Batch], pad_token: int) -> Batch:
    """Return several texts as one batch, filled up on the right."""
    fill = {"input_ids": pad_token, "decoder_input_ids": pad_token}
    batch: Batch = {}
    for name in texts[0]:
        rows = [text[name][0] for text in texts]
        value = fill.get(name, 0)
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return batch


def moved(batch: Batch, model: Any) -> Batch:
    """Return a batch on the model's device."""
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}
