"""The model card of a base model with an adapter folded into it."""

import dataclasses
from collections.abc import Mapping

from pcb_peft.adapters.card_sections import LICENCES, folded_sections
from pcb_peft.base.model import BaseModel
from pcb_peft.writing.model_card import (
    CARD,
    LICENCE_FIELDS,
    Facts,
    model_card,
    public_name,
    read_card,
)


def card_of_fold(
    title: str,
    facts: Facts,
    sections: Mapping[str, str],
    named_base: str | None,
    base: BaseModel,
) -> str:
    """Return the text of the card.

    Args:
        title: Title of the adapter's card.
        facts: Its front matter.
        sections: Its sections.
        named_base: The base model, as the adapter names it.
        base: The base model that it was folded into, whose licence is carried over, unless an adapter
            states another.
    """
    model = named_base if public_name(base.source) is None else base.source
    licence = read_card(base.directory / CARD).licence
    library = "transformers" if base.config else "diffusers"
    of_adapters = {field: facts.more[field] for field in LICENCE_FIELDS if field in facts.more}
    agreed = licence if LICENCES not in sections or of_adapters == licence else {}
    front = dataclasses.replace(
        facts, base_model=model, relation="merge", library=library, more=agreed
    )
    title = f"{title}, folded into the base model"
    return model_card(title, front, folded_sections(sections, model, licence, library))
