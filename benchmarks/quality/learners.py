"""What is trained: a base model with an adapter on it, its batches and its loss."""

from pathlib import Path
from typing import Any

import peft
import torch
from domains import domains
from pools import Member, Pool
from texts import Row, Task
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

TARGETS = {
    "minilm": ["query", "key", "value", "dense"],
    "mpnet": ["q", "k", "v", "o", "dense"],
    "smollm2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SCALED = (["key", "value", "output.dense"], ["output.dense"])  # (IA)³: all modules, feed-forward
NOT_TARGETS = ".*pooler.*|.*classifier.*"
HEADS = ["classifier"]
IGNORED = -100


def learner(pool: Pool, member: Member, task: Task, base: Path) -> tuple[Any, Any]:
    """Return the model that is trained, in training mode, and its tokenizer."""
    set_seed(0 if member.shared_init else member.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left" if pool.causal else "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _base(pool, member, task, base)
    if member.kind != "full":
        model = peft.get_peft_model(model, _config(pool, member))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model.train(), tokenizer


def _base(pool: Pool, member: Member, task: Task, base: Path) -> Any:
    dtype = torch.float32 if member.kind == "full" else torch.bfloat16
    if pool.causal:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    labels = task.labels or ()
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    return AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype, **names)


def _config(pool: Pool, member: Member) -> Any:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM" if pool.causal else "SEQ_CLS"}
    if not pool.causal:
        common |= {"modules_to_save": HEADS}
    if member.kind == "ia3":
        modules, feedforward = SCALED
        return peft.IA3Config(target_modules=modules, feedforward_modules=feedforward, **common)
    return peft.LoraConfig(
        r=member.rank,
        lora_alpha=member.rank,
        target_modules=TARGETS[pool.base],
        exclude_modules=None if pool.causal else NOT_TARGETS,
        **common,
    )


def training_rows(pool: Pool, member: Member, task: Task, base: Path) -> list[Row]:
    """Return the texts that a member is trained on: all, or those of its domain."""
    rows = task.rows("train", as_prompts=pool.causal)
    if member.part is None:
        return rows
    domain, count = member.part
    found = domains(rows, task.name, base, count)
    return [row for row, one in zip(rows, found, strict=True) if one == domain]


def rows_of_step(rows: list[Row], member: Member, step: int) -> list[Row]:
    """Return the texts of one step: a function of the seed and the step alone."""
    epoch, place = divmod(step, len(rows) // member.batch)
    generator = torch.Generator().manual_seed(1000 * member.seed + epoch)
    order = torch.randperm(len(rows), generator=generator)
    return [rows[i] for i in order[place * member.batch :][: member.batch].tolist()]


def batch_of(rows: list[Row], task: Task, tokenizer: Any, length: int) -> dict[str, Tensor]:
    """Return texts and their classes, or prompts and their answers, as a model takes them."""
    if "prompt" in rows[0]:
        return _answered(rows, tokenizer, length)
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    options = {"padding": True, "truncation": True, "max_length": length}
    tokens = tokenizer([row["text"] for row in rows], pairs, return_tensors="pt", **options)
    labels = [(task.labels or ()).index(row["label"]) for row in rows]
    return {**tokens, "labels": torch.tensor(labels)}


def _answered(rows: list[Row], tokenizer: Any, length: int) -> dict[str, Tensor]:
    """Prompts and answers, padded on the left; only the answer and the end are learnt."""
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    for row in rows:
        before = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + " " + row["answer"])["input_ids"]
        whole = [*whole, tokenizer.eos_token_id]
        target = [IGNORED] * len(before) + whole[len(before) :]
        ids.append(whole[-length:])
        labels.append(target[-length:])
    longest, pad = max(map(len, ids)), tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(x)) + x for x in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids]),
        "labels": torch.tensor([[IGNORED] * (longest - len(x)) + x for x in labels]),
    }


def loss_of(model: Any, batch: dict[str, Tensor], *, causal: bool) -> Tensor:
    """Return the loss; of a language model on the answers alone."""
    if not causal:
        return model(**batch).loss
    labels = batch.pop("labels")[:, 1:]
    states = model.get_base_model().model(**batch).last_hidden_state[:, :-1]
    learnt = labels != IGNORED
    logits = model.get_output_embeddings()(states[learnt]).float()
    return torch.nn.functional.cross_entropy(logits, labels[learnt])
