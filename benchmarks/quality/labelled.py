"""The control of distillation: one adapter for all tasks, trained from nothing on the same texts, with their labels."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from learners import batch_of, rows_of_step
from pools import Member
from safetensors.torch import load_file
from texts import Row, Task
from train import Run
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from pcb_peft import Adapter, load_adapter

MEMBER = Member(name="labelled", task="all", rate=1e-3, steps=100, batch=8)
"""The training: 100 steps on 8 texts of each task. Its rate and its length were not tuned."""

LENGTH = 128


def trained_on_labels(texts: Mapping[Path, list[Row]], base: Path, target: Path) -> Adapter:
    """Train one adapter on all tasks; each keeps the head of its own adapter, which is not trained.

    Args:
        texts: Each adapter's folder, with labelled texts of its task. The new adapter is of the first one's kind.
        base: The base model, an encoder.
        target: Where the adapter is saved.
    """
    set_seed(MEMBER.seed)
    tasks = [_task(folder) for folder in texts]
    models = [_with_head(folder, base) for folder in texts]
    trunk = models[0].base_model_prefix
    config = peft.PeftConfig.from_pretrained(str(next(iter(texts))))
    config.modules_to_save, config.task_type, config.inference_mode = None, None, False
    learner = peft.get_peft_model(models[0], config)
    for model in models[1:]:
        setattr(model, trunk, getattr(models[0], trunk))
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = Run.of(learner, MEMBER, target)
    for step in range(MEMBER.steps):
        for model, task, rows in zip(models, tasks, texts.values(), strict=True):
            batch = batch_of(rows_of_step(rows, MEMBER, step), task, tokenizer, LENGTH)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model.train()(**batch).loss / len(models)
            loss.backward()
        run.update()
    learner.save_pretrained(str(target))
    return load_adapter(target)


def _task(folder: Path) -> Task:
    content = json.loads((folder / "task.json").read_text("utf-8"))
    return Task(content["task"], tuple(content["labels"]), "")


def _with_head(folder: Path, base: Path) -> Any:
    """Return the base model with the head of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {
        key.removeprefix("base_model.model."): value
        for key, value in tensors.items()
        if ".lora_" not in key
    }
    labels = len(_task(folder).labels or ())
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, dtype=torch.bfloat16
    )
    _, unexpected = model.load_state_dict(head, strict=False)
    assert not unexpected, unexpected  # noqa: S101
    return model.requires_grad_(False)
