"""Texts that are run through a model: their tokens, batches of like length, shared out among processes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.data.batches import IGNORED
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import Track

Encoded = dict[str, list[int]]
"""The tokens of a text: input_ids, attention_mask, and for an answer: labels."""

Batch = Mapping[str, Tensor]
"""Texts of one length."""


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

        def of_places(places: Sequence[int]) -> Sequence[Any]:
            return function(self.padded([texts[place] for place in places], side))

        lengths = [len(text["input_ids"]) for text in texts]
        return self.in_batches(lengths, of_places, what, self.batch_size)

    def in_batches(
        self,
        lengths: Sequence[int],
        function: Callable[[Sequence[int]], Sequence[Any]],
        what: str,
        size: int,
    ) -> list[Any]:
        """Apply a function to the places of texts of like length; its results in the order of the texts.

        Args:
            lengths: Tokens of each text.
            function: Takes some places, returns one result for each.
            what: What the progress bar calls it.
            size: The most places at a time.
        """
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        own = current().partition(chunks, lambda chunk: len(chunk) * lengths[chunk[0]])
        found: dict[int, Any] = {}
        for chunk in self.track(own, what):
            found |= zip(chunk, function(chunk), strict=True)
        everywhere = [pair for part in current().all_gather(list(found.items())) for pair in part]
        return [result for _, result in sorted(everywhere, key=lambda pair: pair[0])]

    def padded(self, texts: Sequence[Encoded], side: str) -> Batch:
        """Texts as one batch, filled up to the longest one on the right or on the left."""
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

    def encode_end(self, text: str, room: int) -> Encoded:
        """The last tokens of a text, so few that others have room after them: a prompt's end says what is asked."""
        tokens = self.tokenizer(text)["input_ids"][-max(1, self.max_length - room) :]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}

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
