"""A whole model with the adapter in its weights, for transformers and for everything that converts its checkpoints."""

import dataclasses
from collections.abc import Sequence

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import AUTO_CLASSES, CLASSIFIERS
from pcb_peft.base.casting import cast_model
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import OptionError
from pcb_peft.exporting.profile import Profile, Request


def _write(request: Request) -> Sequence[str]:
    if request.base is None:
        raise OptionError("a folded model needs the base model: give base_model (--base-model)")
    base = request.base()
    adapter = without_unchanged(request.adapter, base)
    target = base if request.dtype is None else cast_model(base, request.dtype)
    adapter.fold(target, request.output, tied=request.tied, overwrite=request.overwrite)
    return _loading(request)


def _loading(request: Request) -> list[str]:
    """Return the lines that load a folded model; of several heads beside it, the first one."""
    output, adapter = request.output, request.adapter
    heads = sorted((output / "heads").glob("*.safetensors"))
    kept = {adapter.name: adapter.head, **adapter.heads}[heads[0].stem] if heads else adapter.head
    task = adapter.task_type or kept.task.task_type
    auto = AUTO_CLASSES.get(task or "", "AutoModelForCausalLM")
    if not heads:
        return [f'{auto}.from_pretrained("{output}")' + (", or your class" if task is None else "")]
    classes = f", num_labels={kept.classes}" if task in CLASSIFIERS else ""
    return [
        f'model = {auto}.from_pretrained("{output}"{classes})',
        f'model.load_state_dict(safetensors.torch.load_file("{heads[0]}"), strict=False)  # the head',
    ]


def without_unchanged(adapter: Adapter, base: BaseModel) -> Adapter:
    """Return an adapter without the parameters that it stores whole as the base model has them, maybe tied."""
    same: set[str] = set()
    for name, new in adapter.head.parameters.items():
        ends = (base.names.in_files(end) for end in (name, *base.names.tied(name)))
        stored = next((end for end in ends if end is not None), None)
        if stored is not None and new.shape == base.tensors[stored].shape:
            same |= {name} if torch.equal(new(), base.tensor(stored).float()) else set()
    if not same:
        return adapter
    kept = adapter.head.without(same)
    return dataclasses.replace(
        adapter,
        head=dataclasses.replace(adapter.head, modules=kept.modules, parameters=kept.parameters),
    )


TRANSFORMERS = Profile(
    "transformers",
    "transformers, CTranslate2, converters to GGUF and MLX: the whole model",
    frozenset(
        {
            "dora",
            "ia3",
            "full",
            "head",
            "rows",
            "bias",
            "embedding",
            "output",
            "experts",
        }
    ),
    _write,
    tolerance=1e-4,
)
