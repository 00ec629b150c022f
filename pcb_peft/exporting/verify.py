"""A check of what was written: it is loaded in the program that reads it, and must compute what the adapter does."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import CLASSIFIERS
from pcb_peft.base.model import BaseModel
from pcb_peft.consumers.files import open_output
from pcb_peft.data.live_adapters import with_adapter
from pcb_peft.data.live_heads import Head, give_head, put_head, wrapped_by_peft
from pcb_peft.data.models import load_base, quiet_transformers
from pcb_peft.errors import MismatchError, OptionError
from pcb_peft.exporting.profile import Profile
from pcb_peft.exporting.programs import PROGRAMS, Run, answers
from pcb_peft.exporting.sources import weighted_sources
from pcb_peft.runtime.shown import shown

PROMPTS = (
    "The capital of France is",
    "Q: What is 17 plus 25?\nA:",
    "Once upon a time, in a small village by the sea,",
)
TOP = 10
DIFFERENCE = 10  # an effect on the base model of so many errors is one
NOISY, NOISY_DIFFERENCE = (
    0.02,
    2,
)  # the same where the limit is so large: there rounding is most of an error
ROUNDING = {"F16": 0.05, "BF16": 0.2}  # largest difference that rounding of 16-bit tensors may make


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """Log-probabilities of the next token after real prompts: the written result beside the adapter and the bare base.

    Attributes:
        consumer: The program that computed them.
        error: Largest difference to the adapter, over its ten most likely tokens.
        effect: Largest difference to the bare base model.
        limit: Largest error that rounding explains.
        cut: Largest difference to the adapter before its rank was cut; None where it was not. The other numbers are
            then those of the adapter at the lower rank.
        sources: Largest difference to the weighted sum of the adapters that a merge was made of; None for other
            adapters, and where there is no such sum. Only a merge that is a sum is meant to compute the same.
        no_sources: Why a merge was not compared with that sum; empty where it was, and for other adapters.
        skipped: Why nothing was computed; empty where it was.
    """

    consumer: str
    error: float = 0.0
    effect: float = 0.0
    limit: float = 0.0
    cut: float | None = None
    sources: float | None = None
    no_sources: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """True if the result computes what the adapter does, and not what the bare base model does."""
        times = NOISY_DIFFERENCE if self.limit >= NOISY else DIFFERENCE
        right = self.error <= self.limit and self.effect > times * self.error
        return bool(self.skipped) or right

    def __str__(self) -> str:
        if self.skipped:
            return f"not verified in {self.consumer}: {self.skipped}"
        words = "computes as the adapter" if self.passed else "computes NOT as the adapter"
        if not self.passed and self.error <= self.limit:
            words = "cannot be told from the bare base model"
        if self.cut is not None:
            words += " that was cut to the lower rank"
        parts = [
            f"by {self.error:.2g} from the adapter's",
            f"by {self.effect:.2g} from the bare base model's",
        ]
        if self.cut is not None:
            parts.append(f"by {self.cut:.2g} from those of the adapter before the cut")
        if self.sources is not None:
            parts.append(f"by {self.sources:.2g} from those of the weighted sum of its sources")
        line = f"verified in {self.consumer}: {words} (log-probabilities differ {', '.join(parts)})"
        if self.no_sources:
            line += f"; not compared with the weighted sum of its sources: {self.no_sources}"
        return line

    def demand(self) -> "Verification":
        """Return it, or raise MismatchError where the result does not compute what the adapter does."""
        if not self.passed:
            raise MismatchError(
                f"{self}; the output is left where it is, for a look: is base_model the model that the adapter was "
                "trained on?"
            )
        return self


def verify(
    adapter: Adapter,
    output: Path,
    profile: Profile,
    base: Callable[[], BaseModel] | None,
    *,
    uncut: Adapter | None = None,
) -> Verification:
    """Load what was written, and compare it with the adapter that it was made from.

    Args:
        adapter: The adapter that was written; a merge may be in memory.
        output: What was written.
        profile: As what.
        base: The base model.
        uncut: The adapter before its rank was cut, where it was; the distance to it is measured, and limits nothing.

    Raises:
        OptionError: There is no base model to load.
        MismatchError: The result, or the adapter, does not fit the base model.
    """
    if base is None:
        raise OptionError("a result is verified on the base model: give base_model (--base-model)")
    if reason := _why_not(adapter, profile, uncut):
        return Verification(profile.name, skipped=reason)
    run = PROGRAMS[profile.name]
    model, sources = base(), weighted_sources(uncut or adapter, base)
    directory = model.directory
    batches, name, no_sources, largest = _batches(directory), "", "", dict[str, Any]()
    with quiet_transformers(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT and transformers speak of heads that are loaded here
        for head in [one.read() for one in adapter.heads.values()] or [{}]:
            bare = _bare_model(model, adapter, head)
            wanted = _wanted(adapter, bare, head, batches)
            others = {"error": wanted, "effect": answers(bare, batches)}
            if uncut is not None:
                others["cut"] = _wanted(uncut, bare, head, batches)
            summed = _summed(bare, sources, batches)
            if isinstance(summed, str):
                no_sources = summed
            else:
                others["sources"] = summed
            name, found = run(Run(adapter, head, directory, output, bare, batches))
            if isinstance(found, str):
                return Verification(name, skipped=found)
            top = [values.topk(min(TOP, values.shape[-1])).indices for values in wanted]
            for key, values in others.items():
                largest[key] = max(largest.get(key, 0.0), _largest(found, values, top))
    limit = _limit(output, profile)
    return Verification(name, limit=limit, no_sources=no_sources, **largest)


def _why_not(adapter: Adapter, profile: Profile, uncut: Adapter | None) -> str:
    """Return why a result cannot be verified; empty where it can."""
    if profile.name not in PROGRAMS:
        return "run it with the base model in the program itself"
    stacked = any(entry.stacked for entry in adapter.modules.entries.values())
    if uncut is not None and stacked:
        return "stacked experts that were cut are in no file beside it; export without max_rank is verified"
    return ""


def _limit(output: Path, profile: Profile) -> float:
    dtypes = {tensor.dtype for tensor in open_output(output).tensors.values()}
    return max([profile.tolerance, *(ROUNDING.get(dtype, 0.0) for dtype in dtypes)])


def _largest(found: Sequence[Tensor], wanted: Sequence[Tensor], top: Sequence[Tensor]) -> float:
    return max(
        float((a.gather(-1, index) - b.gather(-1, index)).abs().max())
        for a, b, index in zip(found, wanted, top, strict=True)
    )


def _batches(directory: Path) -> list[Tensor]:
    """Return the prompts as tokens; numbers of tokens where the base model has no tokenizer.

    For some models transformers makes a tokenizer without words, where it finds no files of one.
    """
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False
        )
        prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    except (OSError, ValueError, KeyError, TypeError):
        prompts = []
    if prompts and all(ids.numel() for ids in prompts):
        return [ids.long() for ids in prompts]
    return [torch.arange(1, 9)[None], torch.arange(9, 1, -1)[None]]


def _bare_model(base: BaseModel, adapter: Adapter, head: Head) -> Any:
    """Load the base model in float32, with a head that is kept beside the adapter.

    A classifier gets as many classes as the adapter's own head has, but not its values: these must be in the result.
    """
    dequantize = bool(base.quantised)
    model = load_base(base.directory, adapter.task_type, torch.float32, dequantize=dequantize)
    present = model.state_dict()
    missing = {
        name: torch.zeros_like(values)
        for name, values in adapter.head.read().items()
        if name not in present or present[name].shape != values.shape
    }
    if missing and adapter.task_type in CLASSIFIERS:
        give_head(model, missing, adapter.name)
    if head:
        give_head(model, head, adapter.name)
    return model


def _wanted(adapter: Adapter, bare: Any, head: Head, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return what the base model with an adapter answers.

    PEFT loads the adapter's files. One that is in memory only is put into the weights.

    Raises:
        OptionError: It is in memory only, and has stacked experts.
    """
    source = adapter.source
    if source is not None and (Path(source.directory) / "adapter_config.json").is_file():
        place = {"model_id": source.directory}
        return answers(wrapped_by_peft(copy.deepcopy(bare), place, adapter.name, head), batches)
    model = copy.deepcopy(bare)
    put_head(model, adapter.head.read(), adapter.name)
    for module, rows in adapter.head.within(lambda name: name in model.state_dict()).rows.items():
        weight = model.get_parameter(f"{module}.weight")
        weight.data = rows.put_into(weight.data)
    try:
        with with_adapter(model, adapter):
            return answers(model, batches)
    except MismatchError as error:
        raise OptionError(
            f"{error}; a merge of stacked experts is verified from its files: save it, and export what was saved"
        ) from error


def _summed(
    bare: Any, sources: Sequence[Adapter] | str, batches: Sequence[Tensor]
) -> list[Tensor] | str:
    """Return what the sum of some adapters answers; in words why there is none, or why it cannot be computed."""
    if isinstance(sources, str):
        return sources
    try:
        with with_adapter(bare, *sources):
            return answers(bare, batches)
    except MismatchError as error:
        return shown(error)
