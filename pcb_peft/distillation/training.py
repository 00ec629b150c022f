"""The training loop: one batch of each task at a time, the best state on held-out texts, a file to go on from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.distillation.base import Head
from pcb_peft.distillation.checkpoint import Checkpoint, State
from pcb_peft.distillation.student import Student
from pcb_peft.distillation.teacher import Example, Reader
from pcb_peft.runtime.progress import Track

WARM_UP = 10  # steps in which the learning rate rises
LAST = 0.1  # of the learning rate, at the end of its linear decay
CHECK_EVERY = 10  # steps between two looks at the held-out texts
PATIENCE = 3  # looks without an improvement after which the training stops
CHECK_BATCH = 32  # texts
ADAM = ("step", "exp_avg", "exp_avg_sq")  # what torch's Adam keeps of each parameter

Divergences = dict[str, float]
"""Task to the mean divergence of the merge from the task's own adapter; 0 is the same."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """One task: its texts with what its adapter says of them, and its head.

    Attributes:
        name: The adapter's name.
        head: The adapter's own parameters.
        texts: What the merge is trained on.
        held_out: What it is checked on.
    """

    name: str
    head: Head
    texts: Sequence[Example]
    held_out: Sequence[Example]


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """Length and speed of a training.

    Attributes:
        steps: Updates.
        learning_rate: The peak of Adam's, as a fraction of the size of what is trained.
        batch_texts: Texts of each task per step.
        seed: Of the order of the texts.
    """

    steps: int
    learning_rate: float
    batch_texts: int
    seed: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        warm = min(1.0, (step + 1) / min(WARM_UP, self.steps))
        return self.learning_rate * warm * (1 - (1 - LAST) * step / self.steps)

    def batch(self, lesson: Lesson, step: int) -> list[Example]:
        """Return a task's texts of a step: each pass over them has another order."""
        count = len(lesson.texts)
        chosen: list[Example] = []
        for place in range(step * self.batch_texts, (step + 1) * self.batch_texts):
            generator = torch.Generator().manual_seed(self.seed + 7919 * (place // count))
            order = torch.randperm(count, generator=generator)
            chosen.append(lesson.texts[int(order[place % count])])
        return chosen


@dataclasses.dataclass(slots=True)
class Training:
    """A training and how far it is.

    Attributes:
        model: The base model, with the student attached.
        student: What is trained.
        reader: How the model's outputs are read.
        lessons: The tasks.
        schedule: Length and speed.
        accelerator: Accelerate's.
        step: Updates so far.
        history: Step to the divergences on the held-out texts.
        best: The trained parameters at the best of these.
    """

    model: Any
    student: Student
    reader: Reader
    lessons: Sequence[Lesson]
    schedule: Schedule
    accelerator: Any
    step: int = 0
    history: dict[int, Divergences] = dataclasses.field(default_factory=dict[int, Divergences])
    best: list[Tensor] = dataclasses.field(default_factory=list[Tensor])

    def run(self, track: Track, checkpoint: Checkpoint) -> None:
        """Train to the end, or until the held-out texts gain no more; then take the best state.

        Args:
            track: Shows progress.
            checkpoint: The file to go on from, and to write after each look at the held-out texts.
        """
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        sizes = self.student.sizes()
        groups = [{"params": [p], "size": size} for p, size in zip(parameters, sizes, strict=True)]
        optimizer = torch.optim.Adam(groups)
        state = checkpoint.read()
        if state is None:
            self._check(parameters)
        else:
            self._resume(state, optimizer, parameters)
        for step in track(range(self.step, self.schedule.steps), "distill"):
            if self._is_over():
                break
            self._update(step, parameters, optimizer)
            self.step = step + 1
            if self.step % CHECK_EVERY == 0 or self.step == self.schedule.steps:
                self._check(parameters)
                if self.accelerator.is_main_process:
                    checkpoint.write(self._state(optimizer))
        with torch.no_grad():
            for parameter, values in zip(parameters, self.best, strict=True):
                parameter.copy_(values)

    @property
    def best_step(self) -> int:
        """The step of the best state."""
        return min(self.history, key=lambda step: (sum(self.history[step].values()), step))

    def _is_over(self) -> bool:
        looks = sorted(self.history)
        return len(looks) - 1 - looks.index(self.best_step) >= PATIENCE

    def _own(self) -> list[Lesson]:
        """The tasks of this process."""
        place, count = self.accelerator.process_index, self.accelerator.num_processes
        return list(self.lessons[place::count])

    def _update(self, step: int, parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate(step) * group["size"]
        optimizer.zero_grad(set_to_none=False)
        for lesson in self._own():
            self._divergence(lesson, self.schedule.batch(lesson, step)).backward()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        optimizer.step()

    def _divergence(self, lesson: Lesson, texts: Sequence[Example]) -> Tensor:
        inputs, starts = [text.inputs for text in texts], [text.start for text in texts]
        outputs = self.reader.outputs(self.model, lesson.head, inputs, starts)
        losses = [
            text.target.to(output.device).divergence(output)
            for text, output in zip(texts, outputs, strict=True)
        ]
        return torch.stack(losses).mean()

    def _check(self, parameters: list[Any]) -> None:
        """Measure the held-out texts, and keep the state if it is the best so far."""
        self.history[self.step] = self._measured()
        if self.best_step == self.step:
            self.best = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def _measured(self) -> Divergences:
        """The mean divergence of each task on its held-out texts, or on all where none are held out."""
        own = {
            lesson.name: self._mean(lesson, lesson.held_out or lesson.texts)
            for lesson in self._own()
        }
        names = [lesson.name for lesson in self.lessons]
        values = torch.tensor([own.get(name, 0.0) for name in names])
        values = self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()
        return dict(zip(names, values.tolist(), strict=True))

    def _mean(self, lesson: Lesson, texts: Sequence[Example]) -> float:
        total = 0.0
        for first in range(0, len(texts), CHECK_BATCH):
            some = texts[first : first + CHECK_BATCH]
            total += float(self._divergence(lesson, some)) * len(some)
        return total / len(texts)

    def _state(self, optimizer: torch.optim.Optimizer) -> State:
        moments = optimizer.state_dict()["state"]
        tensors = {
            "student": self.student.state_dict(),
            "best": dict(enumerate(self.best)),
            **{f"adam.{number}": one for number, one in moments.items()},
        }
        named = {f"{kind}.{name}": x for kind, some in tensors.items() for name, x in some.items()}
        return State(self.step, self.history, named)

    def _resume(self, state: State, optimizer: torch.optim.Adam, parameters: list[Any]) -> None:
        """Go on from a state, whose tensors must be those of this training."""
        state.check({lesson.name for lesson in self.lessons}, self._shapes(parameters))
        self.step, self.history = state.step, {n: dict(row) for n, row in state.history.items()}
        tensors = {name: one.to(self.accelerator.device) for name, one in state.tensors.items()}
        names = self.student.state_dict()
        self.student.load_state_dict({name: tensors[f"student.{name}"] for name in names})
        self.best = [tensors[f"best.{number}"] for number in range(len(parameters))]
        for number, parameter in enumerate(parameters):
            moments = {name: state.tensors[f"adam.{number}.{name}"] for name in ADAM}
            optimizer.state[parameter] = {
                name: one if name == "step" else one.to(parameter) for name, one in moments.items()
            }

    def _shapes(self, parameters: list[Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of a state."""
        student = {f"student.{name}": one for name, one in self.student.state_dict().items()}
        shapes = {name: tuple(one.shape) for name, one in student.items()}
        for number, parameter in enumerate(parameters):
            same = [f"best.{number}", *(f"adam.{number}.{name}" for name in ADAM if name != "step")]
            shapes |= dict.fromkeys(same, tuple(parameter.shape)) | {f"adam.{number}.step": ()}
        return shapes
