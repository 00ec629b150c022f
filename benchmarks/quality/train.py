"""Train the adapters of a pool, from nothing and offline.

    python benchmarks/quality/train.py smollm2 mpnet --pools DIRECTORY
    python benchmarks/quality/train.py smollm2 --pools /tmp/try --steps 2

What is finished is not trained again; what was interrupted goes on from its last checkpoint. The second line only shows
that everything runs.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bases import base_model
from learners import batch_of, learner, loss_of, rows_of_step, training_rows
from pools import POOLS, Member, Pool
from texts import Task, task_named

CHECKPOINT, DONE = "checkpoint.pt", "task.json"
EVERY = 25  # steps from one checkpoint to the next
WARM = 0.06  # of the steps


def train(pool: Pool, member: Member, folder: Path, base: Path) -> None:
    """Train one adapter into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    task = task_named(member.task)
    model, tokenizer = learner(pool, member, task, base)
    rows = training_rows(pool, member, task, base)
    run = Run.of(model, member, folder)
    begun, losses = time.perf_counter(), list[float]()
    for step in range(run.resume(), member.steps):
        torch.manual_seed(1000 * member.seed + step)  # the dropout of a step that is done again
        batch = batch_of(rows_of_step(rows, member, step), task, tokenizer, pool.length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch, causal=pool.causal)
        loss.backward()
        run.update()
        losses.append(float(loss.detach()))
        done = step + 1
        if done % EVERY == 0 or done == member.steps:
            taken = time.perf_counter() - begun
            title = f"{pool.name}/{member.name} {done}/{member.steps}"
            print(f"{title} loss {fmean(losses[-EVERY:]):.3f} {taken:.0f} s")
            run.keep(done)
    _finish(model, tokenizer, member, task, folder)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The parameters of a training run and what updates them.

    Attributes:
        trained: The parameters.
        optimiser: AdamW.
        schedule: A linear rise, then a linear decay.
        file: The checkpoint.
    """

    trained: list[Any]
    optimiser: torch.optim.Optimizer
    schedule: Any
    file: Path

    @classmethod
    def of(cls, model: Any, member: Member, folder: Path) -> "Run":
        """Return a run that has not begun."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=member.rate, weight_decay=0.0)
        warm = max(1, round(WARM * member.steps))
        rest = max(1, member.steps - warm)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / warm, (member.steps - step) / rest)
        )
        return cls(trained, optimiser, schedule, folder / CHECKPOINT)

    def update(self) -> None:
        """Take one step along the gradient."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()

    def keep(self, step: int) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "step": step,
            "trained": [p.detach() for p in self.trained],
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)

    def resume(self) -> int:
        """Read the checkpoint if there is one; the step to go on from."""
        if not self.file.is_file():
            return 0
        state = torch.load(self.file, weights_only=True)
        for parameter, value in zip(self.trained, state["trained"], strict=True):
            parameter.data.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        return int(state["step"])


def _finish(model: Any, tokenizer: Any, member: Member, task: Task, folder: Path) -> None:
    model.save_pretrained(folder)
    if member.kind == "full":
        tokenizer.save_pretrained(folder)
    for name in (CHECKPOINT, "README.md"):
        (folder / name).unlink(missing_ok=True)
    content = {"labels": task.labels and list(task.labels), **dataclasses.asdict(member)}
    (folder / DONE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pool", nargs="+", choices=POOLS)
    add("--pools", type=Path, default=Path("pools"), help="where pools are kept (default: pools)")
    add("--member", action="append", help="train this one alone; may be repeated")
    add("--steps", type=int, help="train for so many steps, to try it")
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for pool in (POOLS[name] for name in parsed.pool):
        base = base_model(pool.base, parsed.pools / "bases")
        for member in pool.members:
            folder = parsed.pools / pool.name / member.name
            wanted = parsed.member is None or member.name in parsed.member
            if (folder / DONE).is_file() or not wanted:
                continue
            steps = parsed.steps or member.steps
            train(pool, dataclasses.replace(member, steps=steps), folder, base)


if __name__ == "__main__":
    main()
