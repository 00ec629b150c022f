"""LN-Tuning: norm layers are trained as they are, and stored whole."""

from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.base_weights import Base, vector_entry
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.heads import saved_parameters
from pcb_peft.formats.keys import module_of
from pcb_peft.formats.lazy_delta import AdapterContents, Config, LazyDelta
from pcb_peft.formats.registry import Format, register

INFIX = ".ln_tuning_layers."
WHY = "the adapter stores the new norms, not the change"


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the changes of an LN-Tuning checkpoint.

    Raises:
        UnsupportedError: It holds a layer that is not a norm.
    """
    del config
    names = tensors.names()
    entries: dict[str, LazyDelta] = {}
    for name in filter(lambda name: INFIX in name, names):
        shape = tensors.shape(name)
        if len(shape) != 1:
            raise UnsupportedError(
                f"{name} has shape {shape}; only vectors, as those of norms, are supported: merge it into the base, "
                "and take the change from there (extract_adapter, `pcb-peft extract`)"
            )
        path, _, parameter = name.partition(INFIX)
        module = module_of(path)
        module = module if parameter == "weight" else f"{module}.{parameter}"
        entries[module] = vector_entry(tensors, name, module, base, WHY)
    rest = [name for name in names if INFIX not in name]
    return AdapterContents(entries, saved_parameters(tensors, rest))


register(Format("LN_TUNING", read))
