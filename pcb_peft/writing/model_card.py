"""The model card of an output: front matter for the Hub, and sections in Markdown, without local paths."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pcb_peft.files.yaml_text import load_yaml

CARD = "README.md"
HUB = "https://huggingface.co"
PROJECT = "https://github.com/pcb-peft/pcb_peft"

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""PEFT's task type to the Hub's name of the pipeline."""

_LONGEST = 1 << 20  # characters of a card that are read
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The front matter of a card.

    Attributes:
        base_model: Path or hub id of the base model; a path is left out.
        models: Hub ids or paths of what was merged or folded; paths are left out.
        relation: What the output is to its base model, in the Hub's words: "adapter", "merge" or "finetune".
        library: The library that loads it.
        task_type: PEFT's task type.
        tags: Tags beside those that every output has.
        more: Further fields, such as the licence or the model index.
    """

    base_model: str | None
    models: Sequence[str] = ()
    relation: str = "adapter"
    library: str = "peft"
    task_type: str | None = None
    tags: Sequence[str] = ()
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def public_name(path: str | None) -> str | None:
    """Return a hub id as it is; None for anything that is or may be a local path."""
    if path is None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        return None
    return None if Path(path).exists() else path


def model_card(title: str, facts: Facts, sections: Mapping[str, str]) -> str:
    """Return the text of README.md.

    Args:
        title: Heading.
        facts: What the front matter says.
        sections: Heading of a section to its text, in order; the one without a heading comes first.
    """
    from huggingface_hub import ModelCardData  # only when something is saved

    base = public_name(facts.base_model)
    sources = [name for name in map(public_name, facts.models) if name]
    models: list[str] = list(dict.fromkeys([*([base] if base else []), *sources]))
    lineage = [f"base_model:{facts.relation}:{base}"] if base else []
    lineage += [f"base_model:merge:{name}" for name in sources if facts.relation == "adapter"]
    front = ModelCardData(
        base_model=(models if len(models) > 1 else models[0]) if models else None,
        base_model_relation=facts.relation if base else None,
        library_name=facts.library,
        pipeline_tag=PIPELINES.get(str(facts.task_type)),
        tags=sorted({*facts.tags, "merge", "pcb_peft", *lineage}),
        **dict(facts.more),
    )
    parts = [f"---\n{front.to_yaml()}\n---\n", f"# {title}\n"]
    for heading, text in sections.items():
        parts.append(f"## {heading}\n\n{text.strip()}\n" if heading else f"{text.strip()}\n")
    return "\n".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    """A card that was read.

    Attributes:
        title: Its heading.
        front: Its front matter.
        sections: Heading to text, in order; the text before all headings has none.
    """

    title: str
    front: Mapping[str, Any]
    sections: Mapping[str, str]

    @property
    def is_ours(self) -> bool:
        """True if this package wrote it."""
        return "pcb_peft" in (self.front.get("tags") or [])

    @property
    def models(self) -> list[str]:
        """Hub ids of the base model and what was merged."""
        stated = self.front.get("base_model") or []
        return [stated] if isinstance(stated, str) else list(map(str, stated))

    @property
    def licence(self) -> dict[str, Any]:
        """The fields that state the licence."""
        return {name: self.front[name] for name in LICENCE_FIELDS if self.front.get(name)}


def read_card(path: Path) -> Card:
    """Read a model card; an empty one where there is none, or its front matter is damaged."""
    text = ""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_LONGEST)
    parts = text.split("---\n", 2) if text.startswith("---\n") else ["", "", text]
    front, body = _parsed(parts[1]), parts[-1]
    title, sections, heading = "", {"": list[str]()}, ""
    fenced = False
    for line in body.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            heading = line.removeprefix("## ").strip()
            sections.setdefault(heading, [])
        elif line.startswith("# ") and not fenced and not title:
            title = line.removeprefix("# ").strip()
        else:
            sections[heading].append(line)
    return Card(title, front, {name: "\n".join(lines).strip() for name, lines in sections.items()})


def _parsed(front: str) -> dict[str, Any]:
    try:
        content = load_yaml(front)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def link(name: str) -> str:
    """Return a hub id as a link; the last part of a path as plain text."""
    public = public_name(name)
    return Path(name).name if public is None else f"[{public}]({HUB}/{public})"


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    return "\n".join([_row(heading), "|" + "---|" * len(heading), *map(_row, rows)])


def code(language: str, text: str) -> str:
    """Return a block of code in Markdown."""
    return f"```{language}\n{text.strip()}\n```"


def _row(cells: Sequence[object]) -> str:
    escaped = [str(cell).replace("|", r"\|").replace("<", "&lt;") for cell in cells]
    return f"| {' | '.join(escaped)} |"
