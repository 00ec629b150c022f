"""The one model in memory: a base model with one adapter after another, loaded by PEFT as users load it."""

from typing import Any

import torch
from torch import Tensor, nn

from pcb_peft.adapters.source import Source
from pcb_peft.base.canonical import AUTO_CLASSES
from pcb_peft.data.live_heads import Head, give_head, put_head, refuse_made_up, wrapped_by_peft
from pcb_peft.data.models import input_embeddings, load_config, load_model, task_type_of


class ModelHost:
    """A base model in memory.

    It is loaded once per class of transformers. An adapter stays loaded until another one is asked for, so that tasks
    of one merge change the head alone. On a CPU, PEFT adds a LoRA or an (IA)³ to the weights: then a text takes the
    time that the base model takes. When an adapter is unloaded, the weights are compared with what they were before.
    """

    def __init__(
        self,
        base_model: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        dequantize: bool = False,
    ) -> None:
        self.base_model = base_model
        self.dequantize = dequantize
        self.dtype = dtype or torch.float32
        self.device = device or torch.device("cpu")
        self._model: Any = None
        self._class: tuple[str, str] | None = None  # source and class
        self._loaded: tuple[str, str] | None = None  # the same, if nothing has changed the model
        self._adapted: tuple[str, str, Source | None] | None = None  # class, model and adapter
        self._sums: dict[str, float] = {}
        self._unmerged: list[tuple[nn.Parameter, Tensor]] = []  # weights without the adapter
        self._heads: set[str] = set()  # modules that heads were put into

    def release(self) -> None:
        """Forget the model, so that its memory is free."""
        self._model = self._loaded = self._adapted = None
        self._unmerged = []

    def config(self) -> Any:
        """The base model's configuration.

        Raises:
            BaseModelError: There is none.
        """
        return load_config(self.base_model)

    def task_type(self) -> str:
        """PEFT's word for what the base model was built for, such as CAUSAL_LM."""
        return task_type_of(self.config())

    def adapted(
        self,
        task_type: str,
        adapter: Source | None = None,
        head: Head | None = None,
        *,
        name: str = "the adapter",
        checkpoint: str | None = None,
    ) -> Any:
        """The model with one adapter, in evaluation mode, until the next call.

        Args:
            task_type: A key of `AUTO_CLASSES`.
            adapter: Where the adapter is; None for the base model alone.
            head: The classification head; None where the base model's, or the adapter's in its file, is right.
            name: What messages call the adapter.
            checkpoint: A whole model to load in the place of the base model, such as a folded merge.

        Raises:
            BaseModelError: The base model cannot be loaded.
            MismatchError: The adapter or the head does not fit it, or the head lacks a layer.
        """
        wanted = task_type, checkpoint or self.base_model, adapter
        if self._adapted == wanted:
            if head:
                give_head(self._model.get_base_model(), head, name)
        else:
            self._load(wanted, head or {}, name)
        return self._model

    def _load(self, wanted: tuple[str, str, Source | None], head: Head, name: str) -> None:
        """Unload the adapter, and load another one."""
        self._unload()
        task_type, base_model, adapter = wanted
        model = self._plain(task_type, base_model)
        if head:
            give_head(model, head, name)
            self._heads |= {key.rpartition(".")[0] for key in head}
            refuse_made_up(model, head, name)
        if adapter is None:
            return
        self._loaded = None  # until it is known that the adapter has left nothing behind
        adapted = wrapped_by_peft(model, adapter.for_peft(), name, head)
        put_head(adapted.get_base_model(), head, name)
        self._model, self._adapted = adapted.to(self.device).eval(), wanted
        if self.device.type == "cpu":
            self._unmerged = _added_to_weights(self._model)

    def _unload(self) -> None:
        """Unload the adapter; the model is kept if its weights are what they were.

        PiSSA changes them, and trained embeddings stay behind: then the model is loaded again.
        """
        if self._adapted is None:
            return
        self._model = self._model.unload()
        for parameter, values in self._unmerged:
            parameter.data = values
        self._unmerged = []
        sums = _sums(self._model)
        same = all(
            sums.get(name) == value
            for name, value in self._sums.items()
            if name.rpartition(".")[0] not in self._heads
        )
        self._loaded = self._class if same else None
        self._adapted = None

    def _plain(self, task_type: str, source: str) -> Any:
        wanted = source, AUTO_CLASSES.get(task_type, AUTO_CLASSES["FEATURE_EXTRACTION"])
        if self._loaded != wanted:
            self._model = None  # before the next one is loaded
            model = load_model(source, wanted[1], self.dtype, dequantize=self.dequantize)
            self._model = model.to(self.device)
            self._loaded = self._class = wanted
            self._sums, self._heads = _sums(self._model), set[str]()
        return self._model


def _added_to_weights(model: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """Let PEFT add an adapter to the weights of plain linear layers, if it changes nothing else.

    Returns:
        The changed parameters, and their values without the adapter.
    """
    from peft.tuners import ia3, lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    embeddings = input_embeddings(model)
    shared = embeddings.weight if isinstance(embeddings, nn.Embedding) else None
    for layer in tuned:
        plain = type(layer) in (lora.Linear, ia3.Linear) and not getattr(layer, "lora_variant", {})
        if not plain or layer.get_base_layer().weight is shared:
            return []
    parameters = [p for layer in tuned for p in layer.get_base_layer().parameters()]
    unmerged = [(parameter, parameter.data) for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    if tuned:
        model.merge_adapter()
    return unmerged


def _sums(model: nn.Module) -> dict[str, float]:
    """A number per parameter by which a change is noticed."""
    return {
        name: float(_addable(values.detach()).sum(dtype=torch.float64))
        for name, values in model.named_parameters()
    }


def _addable(values: Tensor) -> Tensor:
    """Return codes of eight bits as bytes: torch adds up no float8."""
    return values.view(torch.uint8) if values.element_size() == 1 else values
