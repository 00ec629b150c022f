"""(IA)³ and OFT on convolutions with groups, and with kernels that are not square: as PEFT merges them, or refused."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pcb_peft import MismatchError, UnsupportedError, load_adapter, merge_adapters


class Net(nn.Module):
    def __init__(self, groups=1, kernel=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, kernel, groups=groups)

    def forward(self, x):
        return self.conv(x)


def ia3(feedforward):
    names = ["conv"] if feedforward else []
    return peft.IA3Config(target_modules=["conv"], feedforward_modules=names)


def saved(directory, net, config, seed):
    """An adapter, its base model, and PEFT's model with random values."""
    base = directory / "base"
    base.mkdir(exist_ok=True)
    save_file({k: v.clone() for k, v in net.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "of this test"}))
    model = peft.get_peft_model(copy.deepcopy(net), config)
    generator = torch.Generator().manual_seed(seed)
    for values in model.parameters():
        if values.requires_grad:
            values.data = 1 + 0.3 * torch.randn(values.shape, generator=generator)
    model.save_pretrained(directory / str(seed))
    return directory / str(seed), base, model


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("feedforward", [False, True])
def test_an_ia3_of_a_grouped_convolution_is_what_peft_computes(tmp_path, groups, feedforward):
    path, base, model = saved(tmp_path, Net(groups), ia3(feedforward), 1)
    inputs, folded = torch.randn(2, 8, 5, 5), Net(groups)
    merge_adapters([path], "linear").fold(base, tmp_path / "folded")
    delta = load_adapter(path).modules["conv"].delta(folded.conv.weight.detach())
    with torch.no_grad():
        folded.conv.weight += delta
        if not feedforward:
            folded.conv.bias *= model.base_model.model.conv.ia3_l["default"].flatten()
        assert torch.allclose(folded(inputs), model(inputs), atol=1e-5)


def test_ia3_that_scale_two_sides_are_refused_with_a_way_out_that_works(tmp_path):
    paths = [saved(tmp_path, Net(), ia3(side), seed)[0] for seed, side in ((1, True), (2, False))]
    with pytest.raises(MismatchError, match="give the base model and space='dense'"):
        merge_adapters(paths, "linear")
    merged = merge_adapters(paths, "linear", base_model=tmp_path / "base", space="dense")
    weight = Net().conv.weight.detach()
    wanted = sum(load_adapter(path).modules["conv"].delta(weight) for path in paths)
    assert (merged.delta("conv") - wanted).norm() <= 1e-5 * wanted.norm()


def test_an_oft_of_a_kernel_that_is_not_square_is_refused_by_name(tmp_path):
    config = peft.OFTConfig(oft_block_size=4, target_modules=["conv"])
    path, base, _ = saved(tmp_path, Net(kernel=(3, 1)), config, 1)
    with pytest.raises(UnsupportedError, match="conv: PEFT itself cannot merge this OFT"):
        merge_adapters([path], "linear", base_model=base)
