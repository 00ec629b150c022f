"""An export: an adapter, written as one program reads it right."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import AdapterLike, load_adapter
from pcb_peft.base.model import BaseModel, LazyBase, lazy_base
from pcb_peft.consumers.check import USUAL_RANK, Check, check
from pcb_peft.consumers.files import config_of_model
from pcb_peft.deltas.dtypes import parse_dtype
from pcb_peft.deltas.replacements import Tied
from pcb_peft.errors import OptionError
from pcb_peft.exporting.contents import BECOMES_LORA, contents_of
from pcb_peft.exporting.folded_profile import without_unchanged
from pcb_peft.exporting.low_rank import as_additions, at_most_rank
from pcb_peft.exporting.padding import filled, like, padded_to
from pcb_peft.exporting.profile import Profile, Request
from pcb_peft.exporting.profiles import profile_named
from pcb_peft.exporting.refusal import refused
from pcb_peft.exporting.verify import Verification, verify
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.progress import tracker
from pcb_peft.writing.targets import Overwrite


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export.

    Attributes:
        output: The directory, or the file.
        profile: Name of the profile.
        energy: Retained fraction of the adapter's energy; below 1 where a rank was cut.
        usage: Lines that say how to use it.
        check: Who can load it.
        verification: What the program that is installed computed with it, if that was asked for.
    """

    output: Path
    profile: str
    energy: float
    usage: tuple[str, ...]
    check: Check
    verification: Verification | None = None

    def __str__(self) -> str:
        cut = f", retained energy {self.energy:.4f}" if self.energy < 1 else ""
        lines = [f"written to {self.output} ({self.profile}{cut})", self.check.line]
        lines += [] if self.verification is None else [str(self.verification)]
        return "\n".join([*lines, self.next_steps])

    @property
    def next_steps(self) -> str:
        """The lines that say how to use it, below a heading."""
        return "\n".join(["next:", *(f"  {line}" for line in self.usage)])


def export(  # noqa: PLR0913  (every choice of an export, by name)
    adapter: AdapterLike,
    to: str,
    output: str | Path,
    *,
    base_model: str | Path | BaseModel | None = None,
    max_rank: int | None = None,
    dense: bool = False,
    pad_to_rank: int | None = None,
    like_adapter: str | Path | Adapter | None = None,
    dtype: str | torch.dtype | None = None,
    tied: Tied | None = None,
    dequantize: bool = False,
    overwrite: Overwrite = False,
    verified: bool = False,
    progress: bool | None = None,
) -> Exported:
    """Write an adapter as one program, or a group of programs, reads it right.

    What the program cannot hold is refused by name, with the ways out and their price.

    Args:
        adapter: A merge, a directory, a hub id, (PeftModel, adapter name), or an adapter that is loaded.
        to: "portable" (vLLM, SGLang, TensorRT-LLM, LoRAX, OpenVINO), "peft" (the smallest exact form), "transformers"
            (folded into the base model), "gguf" (llama.cpp, Ollama) or "mlx" (mlx-lm); for a LoRA of an image model
            "diffusers", "kohya" (sd-scripts, web UIs) or "comfyui".
        output: Directory to write; for "gguf" and image models also a file.
        base_model: Path or hub id. Needed for "transformers" and "gguf", and where a change depends on W (DoRA, (IA)³).
            Default: the one that a merge was made with, or that the adapter names, if it is a directory.
        max_rank: Cut every module to this rank at most. A DoRA, an (IA)³ or a dense change becomes a LoRA.
        dense: Give modules of a layer zeros where the same modules of another layer have a LoRA.
        pad_to_rank: Fill up to this rank with zeros, so that a server swaps adapters without recompiling.
        like_adapter: An adapter whose modules this one gets, too, with zeros where it has no LoRA.
        dtype: Dtype of the tensors; default: float32, of a folded model that of the base model.
        tied: Policy of a fold for tied weights.
        dequantize: Take a quantised base model.
        overwrite: Replace what is there: True, if this package wrote it; "all", whatever it is.
        verified: Load the result, and compare what it computes with the adapter and with the bare base model.
        progress: Show bars; default: on a terminal.

    Returns:
        What was written, who can load it, and how it is used.

    Raises:
        UnsupportedError: The program cannot hold what the adapter holds; the message says what helps.
        OptionError: An argument is not allowed, or does not fit the profile.
        OutputError: The output cannot be written.
        MismatchError: `verified`, and the result does not compute what the adapter does.

    Example:
        >>> from pcb_peft import export
        >>> export("math-lora", "portable", "math-portable", progress=False).check.right
        True
    """
    profile, track = profile_named(to), tracker(progress)
    if base_model is None and isinstance(adapter, MergedAdapter):
        base_model = adapter.recipe.base_model
        dequantize = dequantize or adapter.recipe.dequantize
    base = lazy_base(base_model, dequantize=dequantize)
    original = load_adapter(adapter, base_model=base)
    if base is None and (base := _named_base(original, dequantize=dequantize)) is not None:
        original = original.on(base)
    request = Request(
        original,
        Path(output),
        base,
        _config(base_model, original),
        None if dtype is None else parse_dtype(dtype),
        tied,
        dequantize,
        overwrite,
        track,
    )
    if not profile.cut and any((max_rank, pad_to_rank, like_adapter, dense)):
        raise OptionError(f"{to} has no ranks: leave out max_rank, dense, padding and like")
    profile.check_output(request.output, overwrite=overwrite, inputs=original.inputs)
    fitting, energy = _fitting(request, profile, max_rank)
    fitting = _shaped(fitting, request.config, dense=dense, rank=pad_to_rank, other=like_adapter)
    _check_rank(fitting, profile)
    usage = profile.write(dataclasses.replace(request, adapter=fitting))
    verification = None
    if verified:
        written, uncut = (original, None) if energy == 1 else (fitting, original)
        verification = verify(written, Path(output), profile, base, uncut=uncut).demand()
    return Exported(Path(output), to, energy, tuple(usage), check(output), verification)


def _config(given: str | Path | BaseModel | None, adapter: Adapter) -> Mapping[str, Any]:
    """Return the base model's configuration, as far as it is on this machine."""
    if isinstance(given, BaseModel):
        return given.config
    return config_of_model(str(given) if given else adapter.base_model)


def _named_base(adapter: Adapter, *, dequantize: bool) -> LazyBase | None:
    """Return the base model that an adapter names, if it is a directory on this machine."""
    name = adapter.base_model
    found = name is not None and (expanded(name) / "config.json").is_file()
    return lazy_base(name, dequantize=dequantize) if found else None


def _fitting(request: Request, profile: Profile, max_rank: int | None) -> tuple[Adapter, float]:
    """Return the adapter as the profile can hold it, and the energy that it retains.

    Raises:
        UnsupportedError: It cannot.
    """
    adapter, base = request.adapter, request.base
    if base is not None and adapter.head.parameters:
        adapter = without_unchanged(adapter, base())
    contents = [one for one in contents_of(adapter) if one.kind not in profile.holds]
    lasting = [one for one in contents if max_rank is None or one.kind not in BECOMES_LORA]
    if lasting:
        raise refused(adapter, profile, lasting, base)
    if max_rank is None:
        return adapter, 1.0
    if max_rank < 1:
        raise OptionError(f"max_rank is {max_rank}; it must be 1 or more")
    additions = as_additions(adapter, base)
    after = [one for one in contents_of(additions) if one.kind not in profile.holds | BECOMES_LORA]
    if after:  # an (IA)³ also scales biases
        raise refused(adapter, profile, after, base)
    cut, energy = at_most_rank(additions, max_rank, request.track)
    if energy == 1:
        return cut, energy
    return cut.noted([f"cut to rank {max_rank} after the merge: energy {energy:.4f}"]), energy


def _shaped(
    adapter: Adapter,
    config: Mapping[str, Any],
    *,
    dense: bool,
    rank: int | None,
    other: str | Path | Adapter | None,
) -> Adapter:
    """Return the adapter with the zeros that were asked for."""
    if other is not None:
        there = load_adapter(other)
        adapter = like(adapter, there)
        ranks = [entry.rank or 0 for entry in there.modules.entries.values()]
        rank = rank or max(
            [*ranks, *(entry.rank or 0 for entry in adapter.modules.entries.values())]
        )
    if dense:
        count = config.get("num_hidden_layers")
        adapter = filled(adapter, count if isinstance(count, int) else None)
    return adapter if rank is None else padded_to(adapter, rank)


def _check_rank(adapter: Adapter, profile: Profile) -> None:
    rank = max((entry.rank or 0 for entry in adapter.modules.entries.values()), default=0)
    if profile.max_rank is not None and rank > profile.max_rank:
        raise OptionError(
            f"{adapter.name} has rank {rank}, and servers take {profile.max_rank} at most; give max_rank={USUAL_RANK} "
            f"(--max-rank {USUAL_RANK}), or fold it: --to transformers"
        )
    if profile.max_rank is not None and rank > USUAL_RANK:
        warnings.warn(
            f"rank {rank} is more than servers usually reserve memory for ({USUAL_RANK}); --max-rank {USUAL_RANK} "
            "keeps the most of it",
            stacklevel=3,
        )
