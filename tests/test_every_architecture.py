"""What PEFT's forward pass computes with an adapter, the saved merge and the folded merge of it compute too."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, table
from torch import nn

from pcb_peft import merge_adapters

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # PEFT 0.18, of experts
]


def built(architecture: Architecture) -> nn.Module:
    """The model, with no value that is zero."""
    model_class = getattr(transformers, architecture.name)
    config = architecture.config()
    config.architectures = [architecture.name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for values in model.parameters():
                if values.ndim > 1:
                    values.copy_(torch.randn_like(values) / 8)
    return model.eval()


def output(model, architecture):
    with torch.no_grad():
        return model.eval()(**architecture.inputs).logits


def test_the_documentation_names_what_is_tried():
    assert table() in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_saved_and_folded_merges_compute_what_peft_computes(architecture, workshop, tmp_path):
    if not architecture.is_installed:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.name}")
    model = built(architecture)
    base, model_class = tmp_path / "base", type(model)
    model.save_pretrained(base)
    adapters = []
    for seed in (1, 2):
        config = peft.LoraConfig(
            r=3, lora_alpha=5, **copy.deepcopy(dict(architecture.installed_targets))
        )
        loaded = model_class.from_pretrained(base)
        adapters.append(tmp_path / f"adapter{seed}")
        workshop.peft_model(loaded, config, seed=seed, base=str(base)).save_pretrained(adapters[-1])
    alone = output(
        peft.PeftModel.from_pretrained(model_class.from_pretrained(base), adapters[0]), architecture
    )
    plain = output(model_class.from_pretrained(base), architecture)
    merged = merge_adapters(adapters, "linear", [1.0, 0.0], base_model=str(base), heads="first")
    merged.save_pretrained(tmp_path / "merged")
    saved = output(
        peft.PeftModel.from_pretrained(model_class.from_pretrained(base), tmp_path / "merged"),
        architecture,
    )
    merged.fold(base, tmp_path / "folded")
    folded = output(model_class.from_pretrained(tmp_path / "folded"), architecture)
    assert torch.dist(alone, plain) > 0.01 * plain.norm()
    workshop.assert_close(saved, alone, 1e-5)
    workshop.assert_close(folded, alone, 1e-5)
