"""Tuners that are read by way of PEFT's own layers, and therefore beside the base model."""

import functools

from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.lazy_delta import AdapterContents, Config
from pcb_peft.formats.peft_layer import Tuner, entries_by_peft
from pcb_peft.formats.registry import Format, register
from pcb_peft.formats.tuner import contents

TUNERS = {
    "ADAMSS": Tuner("adamss_", changes=("weight", "bias")),
    "BEFT": Tuner("beft_", changes=("bias",)),
    "BOFT": Tuner("boft_"),
    "DEFT": Tuner("deft_"),
    "FOURIERFT": Tuner("fourierft_"),
    "GLORA": Tuner("glora_", changes=("weight", "bias")),
    "GRALORA": Tuner("gralora_"),
    "HIRA": Tuner("hira_"),
    "OFT": Tuner("oft_"),
    "OSF": Tuner("osf_"),
    "PEANUT": Tuner("peanut_"),
    "PSOFT": Tuner("psoft_"),
    "PVERA": Tuner("pvera_lambda_", depends_on_largest=True),
    "RANDLORA": Tuner("randlora_", depends_on_largest=True),
    "ROAD": Tuner("road_", changes=("weight", "bias")),
    "SHIRA": Tuner("shira_"),
    "SUPERTUNING": Tuner("supertuning_"),
    "VBLORA": Tuner("vblora_"),
    "WAVEFT": Tuner("waveft_"),
}


def read(tuner: Tuner, config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the changes of an adapter, as PEFT's own layers compute them.

    Raises:
        BaseModelError: No base model was given.
    """
    entries = functools.partial(entries_by_peft, tuner=tuner)
    return contents(config, tensors, base, tuner.prefix, entries)


for _peft_type, _tuner in TUNERS.items():
    register(Format(_peft_type, functools.partial(read, _tuner)))
