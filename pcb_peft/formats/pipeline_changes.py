"""The change of one module in a file of an image model: a LoRA, LoHa, LoKr or whole difference, perhaps as a DoRA.

Kinds and scalings are those of LyCORIS, whose files web UIs, ComfyUI and diffusers read alike.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import torch

from pcb_peft.deltas.delta import Delta, Dense, LowRank
from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.base_weights import Base, BaseWeight
from pcb_peft.formats.checkpoint import read_finite
from pcb_peft.formats.lazy_delta import LazyDelta, vector_delta
from pcb_peft.formats.lora_parts import pattern_value
from pcb_peft.formats.lora_variants import init_residual
from pcb_peft.formats.lycoris import kron, loha_change, lokr_change
from pcb_peft.formats.tuner import ModuleTensors

EPSILON = torch.finfo(torch.float32).eps  # LyCORIS adds it to every norm


def weight_change(module: ModuleTensors) -> LazyDelta | None:
    """Return the change of a module's weight, without the rescaling of a DoRA; None where only its bias changes.

    Raises:
        AdapterError: Tensors are missing, or do not fit each other.
        UnsupportedError: The module has changes of two kinds.
    """
    kinds = {part: reader for part, reader in KINDS.items() if part in module.names}
    readers = set(kinds.values())
    if len(readers) > 1:
        raise UnsupportedError(
            f"{module.path} has {', '.join(kinds)}: changes of several kinds for one weight, and whether they add up "
            "is not known; leave all but one out of the file"
        )
    if readers:
        return readers.pop()(module)
    if "bias" not in module.names or "alpha" in module.names or "dora_scale" in module.names:
        raise AdapterError(
            f"{module.path} has {', '.join(module.names.values())}; it must have both factors of a LoRA (lora_down and "
            "lora_up, or lora_A and lora_B), or all tensors of a LoHa or a LoKr"
        )
    return None


def bias_change(module: ModuleTensors) -> LazyDelta | None:
    """Return the change of a module's bias; None where it has none.

    Raises:
        AdapterError: The bias is no vector, or the file has two changes of it.
    """
    parts = [part for part in ("bias", "lora_bias") if part in module.names]
    if not parts:
        return None
    if len(parts) > 1:
        raise AdapterError(f"{module.path} has two changes of its bias; leave one out of the file")
    (size,) = module.shape(parts[0], 1)
    scaling = _scaling(module, module.shape("A")[0]) if parts == ["lora_bias"] else 1.0
    load = functools.partial(_load_vector, module, parts[0], scaling)
    return LazyDelta(LowRank, (size, 1), load, 1)


def with_kernel(entry: LazyDelta, kernel: tuple[int, ...], module: str) -> LazyDelta:
    """Return a change with the kernel of its convolution, where the tensors do not show it.

    Args:
        entry: The change.
        kernel: Kernel of the layer.
        module: Name of the module, for messages.

    Raises:
        AdapterError: The matrix is no convolution with such a kernel.
    """
    out, width = entry.shape
    if width % math.prod(kernel):
        raise AdapterError(
            f"{module} is a convolution with a kernel of {kernel}, but the file has a matrix of shape {entry.shape}"
        )
    layout = Layout(shape=(out, width // math.prod(kernel), *kernel))
    return dataclasses.replace(entry, load=functools.partial(_load_with_kernel, entry, layout))


def as_dora(entry: LazyDelta, module: ModuleTensors, canonical: str, base: Base) -> LazyDelta:
    """Return a change with the rescaling of W that its `dora_scale` says, as the matrix that is added to W.

    Args:
        entry: The change that is added to W before it is rescaled.
        module: Tensors of the module.
        canonical: Name of the module in the base model.
        base: The base model.

    Raises:
        AdapterError: The scale is neither one number per output nor one per input.
    """
    shape = module.shape("dora_scale")
    count, (out, width) = math.prod(shape), entry.shape
    per_input = len(shape) > 1 and shape[0] == 1 and shape[1] == count and width % count == 0
    per_input = per_input and not (module.names["dora_scale"].count("magnitude") and count == out)
    if not per_input and count != out:
        raise AdapterError(
            f"{module.names['dora_scale']} has shape {shape}; it must have one value for each of {out} outputs, or "
            f"(1, inputs) for the inputs, of which there are {width} times the kernel"
        )
    why = "DoRA rescales W + BA by its norm"
    weight = BaseWeight(base, canonical, entry.shape, why)
    load = functools.partial(_load_dora, entry, module, weight, count if per_input else None)
    missing = f"{canonical}: {why}" if base is None else ""
    return LazyDelta(Dense, entry.shape, load, missing=missing)


def _lora(module: ModuleTensors) -> LazyDelta:
    """Return ΔW = scaling · up · down; with a core `mid` between them, of a convolution (LoCon, CP decomposition).

    Source: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859, section 3.1; Hyeon-Woo et al. 2022, proposition 3.
    """
    if not {"A", "B"} <= module.names.keys():
        names = ", ".join(module.names.values())
        raise AdapterError(f"{module.path} has {names}; it must have both factors")
    shape_A, shape_B = module.shape("A"), module.shape("B")
    core = module.shape("mid", 3, 4, 5) if "mid" in module.names else ()
    if not _factors_fit(shape_A, core, shape_B):
        shown = " and ".join(
            f"{module.names[part]} {module.shape(part)}"
            for part in ("A", "mid", "B")
            if part in module.names
        )
        raise AdapterError(f"{module.path}: {shown} do not fit")
    kernel = core[2:] or shape_A[2:] or shape_B[2:]
    layout = Layout(shape=(shape_B[0], shape_A[1], *kernel)) if kernel else LINEAR
    load = functools.partial(_load_lora, module, _scaling(module, shape_A[0]), layout)
    return LazyDelta(LowRank, (shape_B[0], shape_A[1] * math.prod(kernel)), load, shape_B[1])


def _factors_fit(down: tuple[int, ...], core: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Return whether factors (r, in, *kernel) and (out, r, 1 …) fit, or (r, in, 1 …) with a core (r, r, *kernel)."""
    if len(down) < 2 or len(up) < 2 or 0 in (*down, *core, *up) or math.prod(up[2:]) != 1:
        return False
    if core:
        return core[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1
    return down[0] == up[1]


def _loha(module: ModuleTensors) -> LazyDelta:
    return loha_change(module, _scaling(module, module.shape("hada_w1_b", 2)[0]))


def _lokr(module: ModuleTensors) -> LazyDelta:
    """Return the change of a LoKr, whose rank is that of a matrix in factors; with both whole, alpha counts nothing."""
    factored = next((p for p in ("lokr_w2_b", "lokr_w1_b") if p in module.names), None)
    scaling = 1.0 if factored is None else _scaling(module, module.shape(factored, 2)[0])
    return lokr_change(module, scaling, kron)


def _whole(module: ModuleTensors) -> LazyDelta:
    """Return a difference that the file holds as it is: of a matrix, a convolution, or the vector of a norm."""
    if unused := {"alpha", "lora_bias"} & module.names.keys():
        raise UnsupportedError(
            f"{module.path} has {module.names['diff']}, a whole difference, and {module.names[unused.pop()]}: whether "
            "that scales it, programs do not agree; leave it out of the file"
        )
    shape = module.shape("diff")
    if len(shape) < 2:
        return LazyDelta(
            LowRank, (math.prod(shape), 1), functools.partial(_load_vector, module, "diff", 1.0), 1
        )
    layout = Layout(shape=shape) if len(shape) > 2 else LINEAR
    load = functools.partial(_load_whole, module, layout)
    return LazyDelta(Dense, (shape[0], math.prod(shape[1:])), load)


KINDS: Mapping[str, Callable[[ModuleTensors], LazyDelta]] = {
    **dict.fromkeys(("A", "B", "mid"), _lora),
    **dict.fromkeys((f"hada_{p}" for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")), _loha),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b"), _lokr),
    **dict.fromkeys(("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), _lokr),
    "diff": _whole,
}
"""Part of a module's tensors to the reader of the kind that has it."""


def _scaling(module: ModuleTensors, rank: int) -> float:
    """Return the scaling: alpha/rank of the file's alpha, or what diffusers' metadata in it say; 1 where neither does.

    Raises:
        AdapterError: The alpha is not one number.
        UnsupportedError: The LoRA depends on W in another way than a DoRA.
    """
    if "alpha" in module.names:
        if math.prod(module.shape("alpha")) != 1:
            raise AdapterError(
                f"{module.names['alpha']} has shape {module.shape('alpha')}; it must be one number"
            )
        return float(read_finite(module.tensors, module.names["alpha"])) / rank
    stated = module.config
    component, _, path = module.path.partition(".")
    if stated.get("lora_alpha") is None:
        return 1.0
    if init_residual(stated):
        raise UnsupportedError(
            f"{component}: a LoRA whose change depends on W is not supported in this form; convert it with PEFT"
        )
    alpha = pattern_value(stated, "alpha_pattern", path, stated["lora_alpha"])
    return alpha / (rank**0.5 if stated.get("use_rslora") else rank)


def _load_lora(module: ModuleTensors, scaling: float, layout: Layout) -> LowRank:
    lora_A, lora_B = (read_finite(module.tensors, module.names[part]) for part in "AB")
    if "mid" in module.names:
        core = read_finite(module.tensors, module.names["mid"])
        lora_A = torch.einsum("rs...,si->ri...", core, lora_A.flatten(1))
    return LowRank(lora_A.flatten(1), lora_B.flatten(1), scaling, layout=layout)


def _load_whole(module: ModuleTensors, layout: Layout) -> Dense:
    return Dense(read_finite(module.tensors, module.names["diff"]).flatten(1), layout=layout)


def _load_vector(module: ModuleTensors, part: str, scaling: float) -> LowRank:
    return vector_delta(read_finite(module.tensors, module.names[part]).flatten() * scaling)


def _load_with_kernel(entry: LazyDelta, layout: Layout) -> Delta:
    delta = entry.load()
    return delta if delta.layout.shape else dataclasses.replace(delta, layout=layout)


def _load_dora(
    entry: LazyDelta, module: ModuleTensors, weight: BaseWeight, inputs: int | None
) -> Dense:
    """Return ΔW = V · m/‖V‖ − W for V = W + the change, with a norm for each output, or for each of the inputs."""
    magnitude = read_finite(module.tensors, module.names["dora_scale"]).double().flatten()
    before, layout = weight.read()
    direction = before.double() + entry.load().matrix().double()
    grouped = direction.view(len(direction), inputs or 1, -1)  # (out, in, kernel)
    norms = torch.linalg.vector_norm(grouped, dim=(0, 2) if inputs else (1, 2))
    factors = magnitude / (norms + EPSILON)
    scaled = grouped * (factors[:, None] if inputs else factors[:, None, None])
    return Dense((scaled.view_as(direction) - before).float(), layout=layout)
