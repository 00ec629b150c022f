"""A check of an output from its files alone: who can load it, with which flags, what is refused, what is ignored."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Effect, Version
from pcb_peft.consumers.files import FORM_NAMES, OutputFiles, open_output
from pcb_peft.consumers.known import CONSUMERS, named
from pcb_peft.runtime.shown import enumerated, typed

USUAL_RANK = 64
LOUD: Effect = "refuses"
PLURAL: dict[Effect, str] = {"refuses": "refuse", "ignores": "ignore", "misreads": "misread"}
EFFECTS: tuple[Effect, ...] = tuple(PLURAL)


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a consumer does not read as PEFT does.

    Attributes:
        found: What the files hold.
        effect: "refuses", "ignores" or "misreads".
        words: What the consumer does with it.
        source: Where this was read or run.
    """

    found: str
    effect: Effect
    words: str
    source: str

    def __str__(self) -> str:
        return f"{self.found}: {self.words}"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one consumer: the things that it does with an output.

    Attributes:
        consumer: Its name on the command line.
        title: Its name in sentences.
        version: The version that the verdict is of.
        flags: What its command line, or its loader, needs.
        findings: What it does not read as PEFT does.
        way: What to write for it, where it does not load files of this form.
    """

    consumer: str
    title: str
    version: str
    flags: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    way: str = ""

    @property
    def loads(self) -> bool:
        """True if it loads the output without an error."""
        return not self.way and all(finding.effect != LOUD for finding in self.findings)

    @property
    def right(self) -> bool:
        """True if it loads the output, and computes what PEFT computes."""
        return not self.way and not self.findings

    def __str__(self) -> str:
        name = f"{self.title} {self.version}"
        if self.way:
            return f"{name}: loads another form: {self.way}"
        if self.right:
            return f"{name}: loads it" + (f" with {' '.join(self.flags)}" if self.flags else "")
        lines = [f"{name}: {'computes something else' if self.loads else 'refuses it'}"]
        lines += [f"  {finding.effect} {finding}" for finding in self.findings]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """The verdicts on all consumers of an output.

    Attributes:
        path: The output.
        form: What it is.
        verdicts: One per consumer.
        notes: What holds for every consumer.
    """

    path: str
    form: str
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """True if every consumer that was asked for loads it and computes what PEFT computes."""
        return all(verdict.right for verdict in self.verdicts)

    def right_for(self, consumer: str) -> bool:
        """Return whether a consumer that was asked for computes what PEFT computes."""
        return any(verdict.right for verdict in self.verdicts if verdict.consumer == consumer)

    @property
    def line(self) -> str:
        """The one line that matters: vLLM's flags, and who does not read it as PEFT does."""
        return self.line_without("")

    def line_without(self, said: str) -> str:
        """Return the line without one of the findings, which the reader knows; it may then be empty."""
        parts = [
            f"{verdict.title}: {' '.join(verdict.flags)}"
            for verdict in self.verdicts
            if verdict.consumer == "vllm" and verdict.right and verdict.flags
        ]
        faulty = [verdict for verdict in self.verdicts if verdict.findings]
        for effect in EFFECTS:
            by_feature: dict[str, list[str]] = {}
            for verdict in faulty:
                findings = (f.found for f in verdict.findings if f.effect == effect)
                found = next((words for words in findings if words != said), None)
                if found and (verdict.loads or effect == LOUD):
                    by_feature.setdefault(found, []).append(verdict.title)
            parts += [
                f"not for {enumerated(names)}, which {effect if len(names) == 1 else PLURAL[effect]} {found}"
                for found, names in by_feature.items()
            ]
        if not faulty:
            parts.append(f"read alike by {enumerated([v.title for v in self.verdicts if v.right])}")
        return " · ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The check as plain data, for JSON."""
        verdicts = [
            {**dataclasses.asdict(one), "loads": one.loads, "right": one.right}
            for one in self.verdicts
        ]
        return {
            "path": self.path,
            "form": self.form,
            "verdicts": verdicts,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join([f"{self.path} is {self.form}", *map(str, self.verdicts), *self.notes])


def check(output: str | Path, consumers: Sequence[str] | str = ()) -> Check:
    """Say who can load an output, with which flags, what would be refused, and what would be ignored.

    Only configuration and headers are read, so it takes milliseconds and no GPU.

    Args:
        output: A directory that `save_pretrained`, `export` or `fold` wrote, or any other adapter; a GGUF file.
        consumers: Programs to ask for, such as "vllm", "vllm==0.31" or "peft==0.11"; default: the newest of all that
            load the output, or another form of it.

    Returns:
        A verdict per program. `line` has the gist, `str()` everything.

    Raises:
        AdapterNotFoundError: There is no adapter and no model.
        AdapterError: A file is damaged.
        OptionError: A program is not known.

    Example:
        >>> from pcb_peft import check
        >>> check("math-lora", "vllm").right
        True
    """
    words = [consumers] if isinstance(consumers, str) else consumers
    files = open_output(output)
    asked = [named(word) for word in words or _concerned(files)]
    verdicts = tuple(_verdict(files, consumer, version) for consumer, version in asked)
    return Check(str(output), FORM_NAMES[files.form], verdicts, tuple(_notes(files)))


def _concerned(files: OutputFiles) -> list[str]:
    """Return the names of the consumers that load the output, or another form of it."""
    return [
        name
        for name, consumer in CONSUMERS.items()
        if files.form in consumer.forms or (files.form == "peft" and consumer.way)
    ]


def _verdict(files: OutputFiles, consumer: Consumer, version: Version) -> Verdict:
    text = ".".join(map(str, version))
    if files.form not in consumer.forms:
        return Verdict(consumer.name, consumer.title, text, way=_way(files, consumer))
    findings = [
        Finding(found, rule.effect, rule.words, rule.source)
        for rule in consumer.rules
        if rule.form == files.form and rule.applies_to(version) and (found := rule.feature(files))
    ]
    if consumer.max_rank is not None and files.rank > consumer.max_rank:
        words = f"takes rank {consumer.max_rank} at most"
        findings.append(Finding(f"rank {files.rank}", "refuses", words, "its configuration"))
    takes_flags = files.form in ("peft", "mlx", "gguf")
    flags = tuple(consumer.flags(files, version)) if takes_flags else ()
    return Verdict(consumer.name, consumer.title, text, flags, tuple(findings))


def _way(files: OutputFiles, consumer: Consumer) -> str:
    """Return what to write for a consumer that does not load files of this form."""
    if files.form != "peft" or not consumer.way:
        return f"it does not load {FORM_NAMES[files.form]}"
    if found := [words for feature in consumer.way_lacks if (words := feature(files))]:
        fold = f"pcb-peft export {typed(files.path)} --to transformers -o model"
        return f"a model with {enumerated(found)} in its weights: {fold}"
    return consumer.way.format(path=typed(files.path))


def _notes(files: OutputFiles) -> list[str]:
    """Return what holds for every consumer."""
    head_words = (
        "the model itself has none; load one: model.load_state_dict(load_file(…), strict=False)"
        if files.form == "model"
        else "the adapter itself has none; choose one: pcb-peft head"
    )
    notes = [
        f"{found}: {words}"
        for found, words in (
            (features.unreadable(files), "a server under another user cannot load it; chmod a+r"),
            (
                features.embedding_lora(files),
                "vLLM's build for the CPU may serve the bare base wrongly while it holds the adapter; fold it instead",
            ),
            (
                features.other_task(files) if files.form == "peft" else "",
                "servers are made for language models; whether one serves LoRAs of this base model is not known here",
            ),
            (
                features.no_base_name(files) if files.form == "peft" else "",
                "programs that load an adapter by its path alone cannot find the base model",
            ),
            (
                features.heads_apart(files),
                head_words,
            ),
        )
        if found
    ]
    if files.rank > USUAL_RANK:
        notes.append(
            f"rank {files.rank}: servers reserve memory for it; export --max-rank 64 keeps the most of it"
        )
    return notes
