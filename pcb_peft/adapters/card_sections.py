"""Sections of a model card that tell how to load an adapter, and what heads it has."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcb_peft.base.canonical import AUTO_CLASSES
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.writing.model_card import CARD, Facts, code, link, public_name, read_card

USE, LOAD, HEADS_HEADING, EVALUATION = "Use", "Load it", "Heads", "Evaluation"
HERE = "path/or/hub-id/of/this/adapter"
FOLDED_USE = """
from transformers import AutoModel, AutoTokenizer  # or the class of your task

model = AutoModel.from_pretrained("path/or/hub-id/of/this/model")
tokenizer = AutoTokenizer.from_pretrained("path/or/hub-id/of/this/model")
"""
FOLDED_PIPELINE_USE = """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/or/hub-id/of/this/model")
"""
_COMMENT = re.compile(r"<!--.*?-->")  # marks around an evaluation
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


def card_parts(
    name: str,
    facts: Facts,
    loading: Mapping[str, str],
    directory: Path | None,
    source: str | None,
) -> tuple[str, Facts, dict[str, str]]:
    """Return the title, the front matter and the sections of an adapter's card.

    Args:
        name: The adapter's name.
        facts: What is known for the front matter.
        loading: Sections that tell how to load it.
        directory: Directory of the adapter's files; the card of a merge there says again how it was made.
        source: Path or hub id from which it was read.
    """
    if directory is not None and (card := read_card(directory / CARD)).is_ours:
        made = without_loading(card.sections)
        more = card.licence | {k: card.front[k] for k in ("model-index",) if k in card.front}
        facts = dataclasses.replace(facts, models=card.models, more=more)
        return card.title, facts, {"": made.pop("", ""), **loading, **made}
    public = None if source is None else public_name(source)
    first = f"The PEFT adapter {link(public)}." if public else ""
    facts = dataclasses.replace(facts, models=[public] if public else [])
    return name, facts, {"": first, **loading}


def loading_sections(
    base_model: str | None,
    task_type: str | None,
    auto_mapping: Mapping[str, Any] | None,
    head: Replacements,
    heads: Mapping[str, Replacements],
) -> dict[str, str]:
    """Return the sections that tell how to load an adapter, and what heads it has; arguments as of `use_section`."""
    use = use_section(base_model, task_type, auto_mapping, head, heads)
    listed = heads_section(head, heads)
    return {USE: use} | ({HEADS_HEADING: listed} if listed else {})


def without_loading(sections: Mapping[str, str]) -> dict[str, str]:
    """Return a card's sections without those that tell how to load the adapter."""
    return {name: text for name, text in sections.items() if name not in (USE, HEADS_HEADING)}


def use_section(
    base_model: str | None,
    task_type: str | None,
    auto_mapping: Mapping[str, Any] | None,
    head: Replacements,
    heads: Mapping[str, Replacements],
) -> str:
    """Return the code that loads a saved adapter.

    Args:
        base_model: Path or hub id of the base model; a path is not shown.
        task_type: PEFT's task type.
        auto_mapping: The class of the model, where there is no task type.
        head: Parameters that the adapter replaces.
        heads: Heads that are kept beside it.
    """
    base = public_name(base_model) or "BASE_MODEL"
    if heads:
        lines = ["from pcb_peft import load_merged", ""]
        lines += [f'model = load_merged("{base}", "{HERE}", head="{next(iter(heads))}")']
        return code("python", "\n".join(lines))
    mapped = (auto_mapping or {}).get("base_model_class")
    name = AUTO_CLASSES.get(str(task_type or head.task.task_type)) or mapped or "AutoModel"
    options = _head_options(head) if task_type in _CLASSIFIERS else ""
    lines = ["from peft import PeftModel", f"from transformers import {name}", ""]
    lines += [f'model = {name}.from_pretrained("{base}"{options})']
    lines += [f'model = PeftModel.from_pretrained(model, "{HERE}")']
    return code("python", "\n".join(lines))


def heads_section(head: Replacements, heads: Mapping[str, Replacements]) -> str:
    """Return what heads an adapter has, and what must be done before it is used; empty without any."""
    if heads:
        modules = sorted({module for kept in heads.values() for module in kept.modules})
        lines = [
            f"**This merge has no {' and '.join(modules) or 'head'} of its own.** The adapters that were merged have "
            "different ones. Load one first, or PEFT will make one up.",
            "",
        ]
        lines += [f"- `heads/{name}.safetensors`{_classes(kept)}" for name, kept in heads.items()]
        return "\n".join(lines)
    if head.modules:
        return f"{', '.join(head.modules)}: loads with the adapter{_classes(head)}."
    return ""


def folded_sections(
    sections: Mapping[str, str],
    base_model: str | None,
    licence: Mapping[str, Any],
    library: str,
) -> dict[str, str]:
    """Return the sections of a folded model's card.

    Args:
        sections: Those of the adapter's card.
        base_model: Path or hub id of the base model; a path is not shown.
        licence: The fields of the base model's card that state its licence.
        library: Library that loads the model.
    """
    base = "the base model" if public_name(base_model) is None else link(str(base_model))
    lines = [f"The weights of {base}, with the deltas of the adapter added to them."]
    if stated := licence.get("license_name") or licence.get("license"):
        lines.append(f"The base model's licence is {stated}; those of the adapters count, too.")
    if library == "transformers":
        lines.append(
            "Tokenizer and chat template are the base model's, unless the vocabulary has grown."
        )
    first = "\n\n".join([" ".join(lines), sections.get("", "")])
    rest = {
        name: text for name, text in sections.items() if name not in ("", USE, LOAD, EVALUATION)
    }
    plain = {name: _COMMENT.sub("", text) for name, text in rest.items()}
    use = FOLDED_USE if library == "transformers" else FOLDED_PIPELINE_USE
    return {"": first, USE: code("python", use), **plain}


def _head_options(head: Replacements) -> str:
    """Return the arguments that give the base model's head its size and its names."""
    labels = head.task.labels
    if labels:
        return f", num_labels={len(labels)}, id2label={dict(enumerate(labels))!r}"
    sizes = [new.shape[0] for name, new in head.parameters.items() if name.endswith(".weight")]
    return f", num_labels={sizes[-1]}" if sizes else ""


def _classes(head: Replacements) -> str:
    labels = head.task.labels
    return f" ({', '.join(labels)})" if labels else ""
