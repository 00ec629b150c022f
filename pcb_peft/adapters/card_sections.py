"""Sections of a model card that tell how to load an adapter, and what heads it has."""

import re
from collections.abc import Mapping
from typing import Any

from pcb_peft.base.canonical import AUTO_CLASSES, CLASSIFIERS
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.writing.model_card import code, link, public_name

USE, LOAD, HEADS_HEADING, LICENCES, EVALUATION = (
    "Use",
    "Load it",
    "Heads",
    "Licences",
    "Evaluation",
)
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
    options = _head_options(head) if task_type in CLASSIFIERS else ""
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


def common_licence(licences: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the licence that all adapters state; empty if one states another, or none."""
    first, *others = licences.values() or [{}]
    return dict(first) if all(other == first for other in others) else {}


def licences_section(licences: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the section that lists the adapters' licences; none where no adapter states one."""
    if not any(licences.values()):
        return {}
    return {LICENCES: "\n".join(f"- {name}: {_licence(one)}" for name, one in licences.items())}


def _licence(fields: Mapping[str, Any]) -> str:
    return str(fields.get("license_name") or fields.get("license") or "none stated")


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
    if licence:
        lines.append(
            f"The base model's licence is {_licence(licence)}; those of the adapters count, too."
        )
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
    return f", num_labels={head.classes}" if head.classes else ""


def _classes(head: Replacements) -> str:
    labels = head.task.labels
    return f" ({', '.join(labels)})" if labels else ""
