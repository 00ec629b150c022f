"""Train the adapters of a pool, from nothing and offline.

    python benchmarks/quality/train.py smollm2 mpnet --pools DIRECTORY

What is finished is not trained again; what was interrupted goes on from its last checkpoint.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bases import base_model
from pools import POOLS, Member, Pool
from texts import Row, Task, task_named
from torch import Tensor

CHECKPOINT, DONE = "checkpoint.pt", "task.json"
EVERY = 25  # steps from one checkpoint to the next
TARGETS = {
    "minilm": ["query", "key", "value", "dense"],
    "mpnet": ["q", "k", "v", "o", "dense"],
    "smollm2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SCALED = (["key", "value", "output.dense"], ["output.dense"])  # (IA)³: all modules, feed-forward
NOT = ".*pooler.*|.*classifier.*"
HEADS = ["classifier"]
IGNORED = -100


def train(pool: Pool, member: Member, folder: Path, base: Path) -> None:
    """Train one adapter into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    task = task_named(member.task)
    causal = pool.base == "smollm2"
    model, tokenizer = _model(pool, member, task, base, causal)
    rows = _part(task.rows("train", as_prompts=causal), member, base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=member.rate, weight_decay=0.0)
    warm = max(1, round(0.06 * member.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm, (member.steps - s) / max(1, member.steps - warm)),
    )
    first = _resumed(folder, trained, optimiser, schedule)
    begun, losses = time.perf_counter(), []
    for step in range(first, member.steps):
        torch.manual_seed(1000 * member.seed + step)  # the dropout of a step that is done again
        batch = _batch(rows, member, step, task, tokenizer, pool.length, causal)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(model, batch, causal)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % EVERY == 0 or step + 1 == member.steps:
            mean = sum(losses[-EVERY:]) / len(losses[-EVERY:])
            taken = time.perf_counter() - begun
            print(
                f"{pool.name}/{member.name} {step + 1}/{member.steps} loss {mean:.3f} {taken:.0f} s"
            )
            _keep(folder, step + 1, trained, optimiser, schedule)
    _finish(model, member, task, folder)


def _model(pool: Pool, member: Member, task: Task, base: Path, causal: bool) -> tuple[Any, Any]:
    import peft
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )

    set_seed(0 if member.shared_init else member.seed)
    dtype = torch.float32 if member.kind == "full" else torch.bfloat16
    if causal:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    else:
        classes = len(task.labels or ())
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=classes, dtype=dtype
        )
        model.config.id2label = dict(enumerate(task.labels or ()))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left" if causal else "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if member.kind == "full":
        return model.train(), tokenizer
    common: dict[str, Any] = {"task_type": "CAUSAL_LM" if causal else "SEQ_CLS"}
    if not causal:
        common |= {"modules_to_save": HEADS}
    if member.kind == "ia3":
        config: Any = peft.IA3Config(
            target_modules=SCALED[0], feedforward_modules=SCALED[1], **common
        )
    else:
        config = peft.LoraConfig(
            r=member.rank,
            lora_alpha=member.rank,
            lora_dropout=0.05,
            target_modules=TARGETS[pool.base],
            exclude_modules=None if causal else NOT,
            **common,
        )
    wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped.train(), tokenizer


def _batch(
    rows: list[Row],
    member: Member,
    step: int,
    task: Task,
    tokenizer: Any,
    length: int,
    causal: bool,
) -> dict[str, Tensor]:
    """The texts of one step: a function of the seed and the step alone."""
    per_epoch = len(rows) // member.batch
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(1000 * member.seed + epoch)
    order = torch.randperm(len(rows), generator=generator)
    chosen = [rows[i] for i in order[place * member.batch :][: member.batch].tolist()]
    if not causal:
        pairs = [row["text_pair"] for row in chosen] if "text_pair" in chosen[0] else None
        encoded = tokenizer(
            [row["text"] for row in chosen],
            pairs,
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        labels = [(task.labels or ()).index(row["label"]) for row in chosen]
        return {**encoded, "labels": torch.tensor(labels)}
    return _answered(chosen, tokenizer, length)


def _answered(rows: list[Row], tokenizer: Any, length: int) -> dict[str, Tensor]:
    """Prompts and answers, padded on the left; only the answer and the end are learnt."""
    ids, labels = [], []
    for row in rows:
        before = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + " " + row["answer"])["input_ids"]
        whole = [*whole, tokenizer.eos_token_id]
        target = [IGNORED] * len(before) + whole[len(before) :]
        ids.append(whole[-length:])
        labels.append(target[-length:])
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(x)) + x for x in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids]),
        "labels": torch.tensor([[IGNORED] * (longest - len(x)) + x for x in labels]),
    }


def _loss(model: Any, batch: dict[str, Tensor], causal: bool) -> Tensor:
    if not causal:
        return model(**batch).loss
    labels = batch.pop("labels")
    learnt = int((labels != IGNORED).sum(-1).max())
    logits = model(**batch, logits_to_keep=learnt + 1).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, -learnt:].flatten(), ignore_index=IGNORED
    )


def _part(rows: list[Row], member: Member, base: Path) -> list[Row]:
    """The texts of one domain: a cluster of the base encoder's embeddings."""
    if member.part is None:
        return rows
    place, parts = member.part
    from domains import domains

    found = domains(rows, base, parts)
    return [row for row, domain in zip(rows, found, strict=True) if domain == place]


def _keep(folder: Path, step: int, trained: list[Any], optimiser: Any, schedule: Any) -> None:
    state = {
        "step": step,
        "trained": [p.detach() for p in trained],
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
    }
    part = folder / f"{CHECKPOINT}.part"
    torch.save(state, part)
    part.replace(folder / CHECKPOINT)


def _resumed(folder: Path, trained: list[Any], optimiser: Any, schedule: Any) -> int:
    """The step to go on from."""
    if not (folder / CHECKPOINT).is_file():
        return 0
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    for parameter, value in zip(trained, state["trained"], strict=True):
        parameter.data.copy_(value)
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


def _finish(model: Any, member: Member, task: Task, folder: Path) -> None:
    model.save_pretrained(folder)
    for name in (CHECKPOINT, "README.md"):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    import dataclasses

    content = {"labels": task.labels and list(task.labels), **dataclasses.asdict(member)}
    (folder / DONE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", nargs="+", choices=POOLS)
    parser.add_argument("--pools", type=Path, default=Path(__file__).parent / "pools")
    parsed = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for name in parsed.pool:
        pool = POOLS[name]
        base = base_model(pool.base, parsed.pools / "bases")
        for member in pool.members:
            folder = parsed.pools / name / member.name
            if not (folder / DONE).is_file():
                train(pool, member, folder, base)


if __name__ == "__main__":
    main()
