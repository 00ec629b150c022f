"""What mergekit has too: of one weight, in dense space, they are mergekit's (golden/make_mergekit_golden.py)."""

from pathlib import Path

import pytest
import torch
from helpers import adapters
from safetensors.torch import load_file

from pcb_peft import merge_adapters
from pcb_peft.deltas.delta import Dense

GOLDEN = load_file(Path(__file__).parent / "golden" / "mergekit.safetensors")
WEIGHTS = (0.5, 1.5, -0.7)
CASES = {  # of a golden tensor: method, weights, options
    "linear": ("linear", WEIGHTS, {}),
    "ties": ("ties", (1, 1, 1), {"density": 0.4}),
    "magnitude_prune": ("magnitude_prune", WEIGHTS, {"density": 0.4}),
    "breadcrumbs": ("breadcrumbs", WEIGHTS, {"density": 0.7, "gamma": 0.1}),
    "slerp of equal lengths": ("slerp", (1, 1), {"t": 0.3}),
    "multislerp": ("multislerp", (1, 1, 1), {}),
    "karcher": ("karcher", (1, 1, 1), {}),
    "model_stock": ("model_stock", (1, 1, 1), {}),
}
SHIFT = 0.8  # so that the vectors of model_stock have positive cosines


def vectors(case):
    stack = GOLDEN["vectors"]
    if case == "model_stock":
        return stack + SHIFT
    if case.startswith("slerp"):
        return (stack / torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True))[:2]
    return stack


def test_every_golden_tensor_is_compared():
    assert CASES.keys() == GOLDEN.keys() - {"vectors"}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_mergekit_makes(case):
    method, weights, options = CASES[case]
    merged = merge_adapters(
        adapters([Dense(values) for values in vectors(case)]),
        *(method, weights, "dense", "module", "full"),
        **options,
    )
    found, wanted = merged.delta("m"), GOLDEN[case]
    assert torch.linalg.vector_norm(found - wanted) < 1e-6 * torch.linalg.vector_norm(wanted)
