"""The model card of an adapter, and of a base model with the adapter folded into it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pcb_peft.adapters import card_sections
from pcb_peft.adapters.card_of_fold import card_of_fold
from pcb_peft.adapters.file_format import HasFormat, loading_text
from pcb_peft.adapters.source import OpenedAdapter, Source
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.writing.model_card import CARD, Facts, link, model_card, public_name, read_card


class HasCard(HasFormat):
    """An adapter, as far as its card goes; `Adapter` describes the attributes."""

    name: str
    source: Source | None
    files: OpenedAdapter | None
    base_model: str | None
    task_type: str | None
    auto_mapping: Mapping[str, Any] | None
    head: Replacements
    heads: Mapping[str, Replacements]
    licences: Mapping[str, Mapping[str, Any]]

    def card(self, peft_type: str, notes: Sequence[str] = ()) -> str:
        """Return the text of the model card.

        Args:
            peft_type: PEFT's word for the kind of adapter.
            notes: Sentences on how it loads.
        """
        title, facts, sections = self.card_parts()
        facts = dataclasses.replace(facts, tags=self.tags(peft_type), library=self.library)
        if notes and card_sections.USE in sections:
            use = "\n\n".join([sections[card_sections.USE], *(f"{note}." for note in notes)])
            sections = {**sections, card_sections.USE: use}
        return model_card(title, facts, sections)

    def folded_card(self, base: BaseModel) -> str:
        """Return the text of the model card of the base model with the adapter folded into it."""
        return card_of_fold(*self.card_parts(), self.base_model, base)

    def card_parts(self) -> tuple[str, Facts, dict[str, str]]:
        """Return the title, the front matter and the sections of the adapter's card.

        A merge that was saved says again what the card beside it says of its making.
        """
        directory = None if self.files is None else self.files.directory
        facts = Facts(base_model=self.base_model, task_type=self.task_type)
        if directory is not None and (card := read_card(directory / CARD)).is_ours:
            made = card_sections.without_loading(card.sections)
            more = card.licence | {k: card.front[k] for k in ("model-index",) if k in card.front}
            facts = dataclasses.replace(facts, models=card.models, more=more)
            return card.title, facts, {"": made.pop("", ""), **self.loading_sections(), **made}
        source = None if self.source is None else public_name(self.source.path)
        first = f"The PEFT adapter {link(source)}." if source else ""
        licence = card_sections.common_licence(self.licences)
        facts = dataclasses.replace(facts, models=[source] if source else [], more=licence)
        sections = {"": first, **self.loading_sections()}
        return self.name, facts, sections | card_sections.licences_section(self.licences)

    def loading_sections(self) -> dict[str, str]:
        """Return the sections of a card that tell how to load the adapter, and what heads it has."""
        if self.library == "diffusers":
            text = loading_text(self.image, self.file_format, self.base_model)
            return {card_sections.LOAD: text}
        return card_sections.loading_sections(
            self.base_model, self.task_type, self.auto_mapping, self.head, self.heads
        )
