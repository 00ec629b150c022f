"""A check of what was written: it is loaded in the program that reads it, and must compute what the adapter does."""

import copy
import dataclasses
import importlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import AUTO_CLASSES
from pcb_peft.base.model import BaseModel
from pcb_peft.consumers.files import open_output
from pcb_peft.consumers.mlx import hidden_rope_theta
from pcb_peft.data.models import quiet_transformers
from pcb_peft.errors import MismatchError, OptionError
from pcb_peft.exporting.profile import Profile

PROMPTS = (
    "The capital of France is",
    "Q: What is 17 plus 25?\nA:",
    "Once upon a time, in a small village by the sea,",
)
TOP = 10
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
DIFFERENCE = 10  # an effect on the base model of so many tolerances is one
HALF_PRECISION = 0.05  # largest difference that rounding of 16-bit tensors may make


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """Log-probabilities of the next token after real prompts: the written result beside the adapter and the bare base.

    Attributes:
        consumer: The program that computed them.
        error: Largest difference to the adapter, over its ten most likely tokens.
        effect: Largest difference to the bare base model.
        limit: Largest error that rounding explains; None where the rank was cut.
        skipped: Why nothing was computed; empty where it was.
    """

    consumer: str
    error: float = 0.0
    effect: float = 0.0
    limit: float | None = None
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """True if the result computes what the adapter does, and not what the bare base model does."""
        if self.skipped:
            return True
        if self.limit is None:
            return self.error < self.effect
        return self.error <= self.limit and self.effect > DIFFERENCE * self.error

    def __str__(self) -> str:
        if self.skipped:
            return f"not verified in {self.consumer}: {self.skipped}"
        words = "as the adapter" if self.passed else "NOT as the adapter"
        return (
            f"verified in {self.consumer}: computes {words} (log-probabilities differ by {self.error:.2g} from the "
            f"adapter's, by {self.effect:.2g} from the bare base model's)"
        )

    def demand(self) -> None:
        """Raise MismatchError where the result does not compute what the adapter does."""
        if not self.passed:
            raise MismatchError(
                f"{self}; the output is left where it is, for a look: is base_model the model that the adapter was "
                "trained on?"
            )


def verify(
    adapter: Adapter,
    output: Path,
    profile: Profile,
    base: Callable[[], BaseModel] | None,
    *,
    exact: bool = True,
) -> Verification:
    """Load what was written, and compare it with the adapter that it was made from.

    Args:
        adapter: The adapter before the export.
        output: What was written.
        profile: As what.
        base: The base model.
        exact: False where a rank was cut: then the result must be nearer to the adapter than the base model is.

    Raises:
        OptionError: There is no base model to load.
    """
    if base is None:
        raise OptionError("a result is verified on the base model: give base_model (--base-model)")
    run = _RUNNERS.get(profile.name)
    if run is None:
        return Verification(
            profile.name, skipped="run it with the base model in the program itself"
        )
    directory, error, effect, name = base().directory, 0.0, 0.0, ""
    batches = _batches(directory)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of PEFT and transformers, about heads that are loaded below
        for head in _heads(adapter):
            bare = _model(directory, adapter, head)
            plain = [_log_probabilities(bare, ids) for ids in batches]
            changed = _with(adapter, copy.deepcopy(bare), base)
            wanted = [_log_probabilities(changed, ids) for ids in batches]
            name, found = run(_Run(directory, output, bare, batches))
            if isinstance(found, str):
                return Verification(name, skipped=found)
            top = [values.topk(min(TOP, values.shape[-1])).indices for values in wanted]
            error = max(error, _largest(found, wanted, top))
            effect = max(effect, _largest(found, plain, top))
    return Verification(name, error, effect, _limit(output, profile) if exact else None)


Head: TypeAlias = Mapping[str, Tensor]


def _heads(adapter: Adapter) -> list[Head]:
    """Return the heads that are put into the base model, one after the other; an adapter's own is in the adapter."""
    kept: list[Head] = [head.read() for head in adapter.heads.values()]
    return kept or [{}]


def _limit(output: Path, profile: Profile) -> float:
    dtypes = {tensor.dtype for tensor in open_output(output).tensors.values()}
    return max(profile.tolerance, HALF_PRECISION if dtypes & {"BF16", "F16"} else 0.0)


def _largest(found: Sequence[Tensor], wanted: Sequence[Tensor], top: Sequence[Tensor]) -> float:
    return max(
        float((a.gather(-1, index) - b.gather(-1, index)).abs().max())
        for a, b, index in zip(found, wanted, top, strict=True)
    )


def _batches(directory: Path) -> list[Tensor]:
    """Return the prompts as tokens; numbers of tokens where the base model has no tokenizer."""
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return [torch.arange(1, 9)[None], torch.arange(9, 1, -1)[None]]
    return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]


def _model(directory: Path, adapter: Adapter | None = None, head: Head | None = None) -> Any:
    """Load a model in float32; for an adapter of a classifier with as many labels as its head has."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(directory)
    kind: Any = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    if adapter is not None and adapter.task_type in _CLASSIFIERS:
        own = {name: new() for name, new in adapter.head.parameters.items()}
        labels = next(
            (x.shape[0] for name, x in {**own, **(head or {})}.items() if _is_last(name)), None
        )
        config.num_labels = labels or config.num_labels
        kind = getattr(transformers, AUTO_CLASSES[str(adapter.task_type)])
    model = kind.from_pretrained(directory, config=config, dtype=torch.float32).eval()
    if head:
        model.load_state_dict(head, strict=False)
    return model


def _is_last(name: str) -> bool:
    """Return whether a parameter has a row for every label."""
    return name.endswith(("classifier.weight", "score.weight", "out_proj.weight"))


@torch.no_grad()
def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Return log-probabilities of the next token, or of the labels of a classifier."""
    logits = model(ids).logits
    last = logits[:, -1] if logits.ndim == 3 else logits
    return last.float().log_softmax(-1)


def _with(adapter: Adapter, model: Any, base: Callable[[], BaseModel]) -> Any:
    """Change a base model as an adapter does, and return it.

    PEFT loads the adapter's files. One that is in memory only is added to the weights.
    """
    source = adapter.source
    if source is not None and (Path(source.path) / "adapter_config.json").is_file():
        import peft

        return peft.PeftModel.from_pretrained(model, source.path).eval()
    for module in adapter.modules:
        parameter = dict(model.named_parameters()).get(f"{module}.weight")
        if parameter is None:
            raise OptionError(
                f"{module} is no parameter of the base model in memory, so the merge cannot be verified; save it, and "
                "verify an export of the saved adapter"
            )
        parameter.data += adapter.delta(module, base())
    return model


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """The parts of a computation: the base model's files, the result, and for PEFT the base model itself."""

    directory: Path
    output: Path
    bare: Any
    batches: Sequence[Tensor]


_Found: TypeAlias = tuple[str, "list[Tensor] | str"]


def _in_peft(run: _Run) -> _Found:
    import peft

    model = peft.PeftModel.from_pretrained(run.bare, run.output).eval()
    return f"PEFT {peft.__version__}", [_log_probabilities(model, ids) for ids in run.batches]


def _in_transformers(run: _Run) -> _Found:
    import transformers

    model = _model(run.output)
    name = f"transformers {transformers.__version__}"
    return name, [_log_probabilities(model, ids) for ids in run.batches]


def _in_mlx(run: _Run) -> _Found:
    try:
        mx: Any = importlib.import_module("mlx.core")
        loading: Any = importlib.import_module("mlx_lm.utils")
        tuning: Any = importlib.import_module("mlx_lm.tuner.utils")
    except ImportError:
        return "mlx-lm", "it is not installed (pip install 'mlx[cpu]' mlx-lm)"
    config = json.loads((run.directory / "config.json").read_text(encoding="utf-8"))
    theta = hidden_rope_theta(config)  # what a user has to add to the base model is added here
    changes = {} if theta is None else {"rope_theta": theta}
    model, _ = loading.load_model(run.directory, model_config=changes)
    model = tuning.load_adapters(model, str(run.output))
    model.set_dtype(mx.float32)
    found: list[Tensor] = []
    for ids in run.batches:
        logits: Any = model(mx.array(ids.tolist()))[:, -1]
        found.append(torch.tensor(logits.astype(mx.float32).tolist()).log_softmax(-1))
    return "mlx-lm", found


_RUNNERS: dict[str, Callable[[_Run], _Found]] = {
    "portable": _in_peft,
    "peft": _in_peft,
    "transformers": _in_transformers,
    "mlx": _in_mlx,
}
