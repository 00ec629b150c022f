"""A fine-tuned checkpoint less its base: exact in full, optimal at a rank, and nothing that changed is dropped."""

import fnmatch
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pcb_peft import (
    AdapterError,
    MismatchError,
    OptionError,
    UnsupportedError,
    extract_adapter,
    load_merged,
    merge_adapters,
)
from pcb_peft.commands import cli

pytestmark = pytest.mark.slow  # whole models

MODELS = ["mlp", "odd", "llama", "gpt2", "bert"]
FILE = "model.safetensors"


def noise(_, values):
    return torch.randn_like(values) / 10


def of_rank_2(_, values):
    """A change of rank 2 where there is a matrix."""
    if values.ndim == 1:
        return torch.randn_like(values)
    product = torch.randn(values.shape[0], 2) @ torch.randn(2, values[0].numel())
    return product.reshape(values.shape)


def but(name, change):
    """The same change, except to one parameter."""
    return lambda other, values: 0 if other == name else change(other, values)


def edit(model, change):
    save_file(change(load_file(model / FILE)), model / FILE, metadata={"format": "pt"})


def finetuned(workshop, kind, change):
    """A checkpoint that differs from the base by `change`, of a parameter's name and values."""
    base, target = workshop.base(kind), workshop.directory / f"tuned-{kind}"
    target.mkdir(exist_ok=True)
    torch.manual_seed(3)
    tensors = {
        name: values + change(name, values) for name, values in load_file(base / FILE).items()
    }
    save_file(tensors, target / FILE, metadata={"format": "pt"})
    (target / "config.json").write_bytes((base / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("kind", MODELS)
def test_in_full_it_folds_back_into_the_fine_tuned_model(workshop, kind):
    tuned = finetuned(workshop, kind, but("transformer.wte.weight", noise))  # it is tied
    base = workshop.base(kind)
    extract_adapter(tuned, base, "full").fold(base, workshop.directory / "again")
    wanted = load_file(tuned / FILE)
    found = load_file(workshop.directory / "again" / FILE)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        workshop.assert_close(found[name], values, 1e-7, name)


def test_only_what_changed_is_there(workshop):
    tuned = finetuned(workshop, "mlp", lambda name, x: torch.ones_like(x) if "0.mix" in name else 0)
    adapter = extract_adapter(tuned, workshop.base("mlp"))
    assert set(adapter.modules) == {"blocks.0.mix", "blocks.0.mix.bias"}


LOW_RANK = {  # model: what a LoRA of PEFT's cannot hold there
    "llama": (),
    "mlp": (),
    "bert": (),
    "gpt2": ("transformer.wte.weight",),  # tied
    "odd": (
        "inner.*",
        "grouped.weight",
        "table.weight",
        "attention*bias",
    ),  # an unknown architecture
}


@pytest.mark.parametrize("kind", LOW_RANK)
def test_changes_of_a_low_rank_are_a_lora_that_peft_loads(workshop, kind):
    tuned, base = finetuned(workshop, kind, of_rank_2), workshop.base(kind)
    left_out = LOW_RANK[kind]
    adapter = extract_adapter(tuned, base, 2, leave_out=left_out)
    assert adapter.report.energy == pytest.approx(1)
    adapter.save_pretrained(workshop.directory / "out")
    found = workshop.changes(kind, workshop.directory / "out")
    before, after = load_file(base / FILE), load_file(tuned / FILE)
    assert set(found) == {
        name for name in before if not any(fnmatch.fnmatchcase(name, glob) for glob in left_out)
    }
    for name, change in found.items():
        workshop.assert_close(change, after[name].double() - before[name], 1e-5, name)


def test_modules_that_are_no_matrix_are_stored_whole(workshop):
    tuned, base = finetuned(workshop, "bert", of_rank_2), workshop.base("bert")
    norm = "bert.embeddings.LayerNorm"
    assert norm in extract_adapter(tuned, base, 2).head.modules
    assert norm in extract_adapter(tuned, base).modules
    assert norm not in extract_adapter(tuned, base, 2, leave_out=["*Norm*"]).head.modules
    assert "LayerNorm" in str(extract_adapter(tuned, base, 2, leave_out=["*Norm*"]).report)


def test_a_fraction_of_the_energy_is_kept_in_each_module(workshop):
    tuned, base = finetuned(workshop, "llama", noise), workshop.base("llama")
    before, after = load_file(base / FILE), load_file(tuned / FILE)
    adapter = extract_adapter(tuned, base, 0.7)
    for module in adapter.report.modules:
        change = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        energies = torch.linalg.svdvals(change).square()
        kept = adapter.delta(module).double().square().sum() / change.square().sum()
        rank = adapter.report.modules[module].rank
        assert kept >= 0.7 > energies[: rank - 1].sum() / energies.sum()


def test_it_is_merged_with_loras_of_the_same_base(workshop):
    base = workshop.base("llama")
    tuned = finetuned(workshop, "llama", lambda name, x: noise(name, x) if "proj" in name else 0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    lora = workshop.adapter("llama", config)
    merged = merge_adapters([extract_adapter(tuned, base), lora], "linear", [1.5, -0.7])
    before, after, wanted = (
        load_file(base / FILE),
        load_file(tuned / FILE),
        workshop.deltas("llama", lora),
    )
    for module in merged.modules:
        change = 1.5 * (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        change = change - 0.7 * wanted.get(module, torch.zeros_like(change))
        workshop.assert_close(merged.delta(module), change, 1e-5, module)


def test_a_head_that_the_base_does_not_have_is_stored_whole(workshop):
    tuned, base = finetuned(workshop, "bert", of_rank_2), workshop.base("bert")
    edit(base, lambda tensors: {k: v for k, v in tensors.items() if "classifier" not in k})
    adapter = extract_adapter(tuned, base, 2)
    assert "classifier" in adapter.head.modules
    values = load_file(tuned / FILE)
    assert torch.equal(adapter.head.read()["classifier.weight"], values["classifier.weight"])


def test_a_classifier_keeps_the_names_of_its_classes(workshop):
    tuned, base = finetuned(workshop, "bert", of_rank_2), workshop.base("bert")
    labels = ["ham", "offer", "spam"]
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    stated = {"architectures": ["BertForSequenceClassification"], **names}
    config = json.loads((tuned / "config.json").read_text("utf-8"))
    (tuned / "config.json").write_text(json.dumps(config | stated), encoding="utf-8")
    edit(base, lambda tensors: {k: v for k, v in tensors.items() if "classifier" not in k})
    edit(base, lambda tensors: tensors | {"bert.embeddings.position_ids": torch.arange(9)[None]})
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    extract_adapter(tuned, base, 2).save_pretrained(workshop.directory / "saved")
    model = load_merged(base, workshop.directory / "saved")
    assert model.config.id2label == names["id2label"]
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, atol=1e-4, rtol=1e-4)


def test_what_only_the_base_has_is_named(workshop):
    tuned, base = finetuned(workshop, "bert", of_rank_2), workshop.base("bert")
    edit(tuned, lambda tensors: {k: v for k, v in tensors.items() if "classifier" not in k})
    with pytest.warns(UserWarning, match=r"has no classifier\.bias, classifier\.weight"):
        extract_adapter(tuned, base)


def test_what_no_lora_holds_is_refused_by_name(workshop):
    tuned = finetuned(workshop, "gpt2", of_rank_2)
    with pytest.raises(UnsupportedError, match=r"transformer\.wte has changed, and is tied"):
        extract_adapter(tuned, workshop.base("gpt2"), 2)
    tuned = finetuned(workshop, "odd", of_rank_2)
    with pytest.raises(UnsupportedError, match=r"inner\.experts has changed.*leave it out"):
        extract_adapter(tuned, workshop.base("odd"), 2, leave_out=["grouped.*", "table.*"])


def test_other_shapes_equal_models_and_wrong_ranks_are_refused(workshop):
    base = workshop.base("mlp")
    tuned = finetuned(workshop, "mlp", noise)
    edit(tuned, lambda tensors: tensors | {"head.weight": torch.ones(4, 10)})
    with pytest.raises(MismatchError, match=r"head\.weight has shape \(4, 10\)"):
        extract_adapter(tuned, base)
    with pytest.raises(AdapterError, match="same values"):
        extract_adapter(base, base)
    with pytest.raises(OptionError, match="budget:9"):
        extract_adapter(tuned, base, "budget:9")


def test_the_command_line_writes_the_same_lora(workshop, capsys):
    tuned, base = finetuned(workshop, "llama", of_rank_2), workshop.base("llama")
    extract_adapter(tuned, base, 2).save_pretrained(workshop.directory / "one")
    words = f"extract {tuned} --base-model {base} -o {workshop.directory / 'two'} --rank 2"
    assert cli.main(words.split()) == 0
    assert "retained energy 1.0000" in (said := capsys.readouterr().out)
    assert "model.norm" in said
    one, two = (
        load_file(workshop.directory / d / "adapter_model.safetensors") for d in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
