"""Rows of texts: read, measured on a tiny model, and paired with labels."""

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz import examples
from fuzz.cases import Attempt, WrongAnswerError
from fuzz.values import ODD, Steps, damaged, mutated
from pcb_peft import collect_statistics, open_statistics
from pcb_peft.data.batches import read_rows
from pcb_peft.evaluation.texts import MEASURES, read_task

ROWS: list[dict[str, Any]] = [
    {"text": "the cat sat on the mat", "label": 0, "answer": "and ran"},
    {"text": "a dog", "text_pair": "a cat", "label": "b"},
    {"prompt": "a dog", "choices": ["ran", "sat"], "answer": "sat"},
    {"text": "", "label": 2},
]


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    file, output = directory / "rows.jsonl", directory / "statistics.safetensors"
    models = [(examples.llama_adapter(), "llama"), (examples.bert_adapter(), "bert")]
    for _, kind in models:
        examples.with_tokenizer(kind)

    def attempt(rng: Random, steps: Steps) -> Any:
        rows = rng.choices(ROWS, k=rng.choice((1, 2, 3)))
        rows[0] = mutated(rows[0], rng, steps) if rng.random() < 0.9 else rows[0]
        text = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.9) for row in rows)
        text = text.encode(errors="surrogatepass")
        file.write_bytes(damaged(text, rng, steps) if rng.random() < 0.3 else text)
        read_rows(file, ("text", "prompt"))
        read_task(
            "task",
            file,
            adapter=None,
            task_type=rng.choice(("SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION")),
            classes=rng.choice((None, 2, 3)),
            measure=rng.choice(("auto", *MEASURES)),
            labels=rng.choice((None, ["a", "b", "c"])),
            rename=rng.choice(({}, {"a": "b"})),
        )
        if rng.random() < 0.05:
            return _collect(file, output, rng, steps)
        return "read"

    def _collect(file: Path, output: Path, rng: Random, steps: Steps) -> str:
        adapter, kind = rng.choice(models)
        options: dict[str, Any] = {}
        if rng.random() < 0.3:
            options[rng.choice(("batch_size", "max_length", "limit", "labels"))] = rng.choice(ODD)
        what = rng.choice(("gram", "gradient"))
        steps.append(f"collect {what} of {kind} with {options}"[:200])
        base = examples.base(kind)
        collect_statistics(
            adapter, base, file, output, what, overwrite="all", progress=False, **options
        )
        statistics = open_statistics(output)
        for module in statistics.shapes:
            if not statistics.load(module).isfinite().all():
                raise WrongAnswerError("statistics that are not finite")
        return "collected"

    return attempt
