"""What becomes of heads that several adapters replace: expected values are those of PEFT's own merged models."""

import itertools

import peft
import pytest
import torch
from safetensors.torch import load_file

from pcb_peft import MismatchError, OptionError, UnsupportedError, load_adapter, merge_adapters

pytestmark = pytest.mark.slow  # whole models

FILE = "adapter_model.safetensors"
WEIGHTS = (1.5, -0.7)
NAMES = ("classifier.weight", "classifier.bias")


def classifier(**options):
    fields = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    return peft.LoraConfig(**fields | options)


def headless():
    return peft.LoraConfig(r=2, target_modules=["key"])


def state_of(workshop, directory, kind="bert"):
    """The model that PEFT makes of the base and an adapter, which fills every place and no other."""
    model = peft.PeftModel.from_pretrained(workshop.model(kind), directory)
    result = model.load_adapter(directory, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "again" in key]
    model.delete_adapter("again")
    model.set_adapter("default")
    return model.merge_and_unload().state_dict()


def test_the_average_is_weighted_and_normalised(workshop, tmp_path):
    adapters = workshop.adapters("bert", [classifier(), classifier(r=3), headless()])
    merged = merge_adapters(adapters, "linear", [*WEIGHTS, 3], heads="average")
    merged.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "heads").exists()
    assert merged.report.notes == ("classifier: the weighted average, of adapter1, adapter2",)
    found = state_of(workshop, tmp_path / "out")
    first, second = (state_of(workshop, adapter) for adapter in adapters[:2])
    for name in NAMES:
        wanted = (1.5 * first[name].double() - 0.7 * second[name]) / 0.8
        workshop.assert_close(found[name], wanted, 1e-6, name)


def test_a_gradient_of_weights_counts_with_the_mean_of_its_ends(workshop, tmp_path):
    adapters = workshop.adapters("bert", [classifier(), classifier()])
    merge_adapters(adapters, "linear", [[0, 6], 1], heads="average").save_pretrained(
        tmp_path / "out"
    )
    first, second = (state_of(workshop, adapter)["classifier.weight"] for adapter in adapters)
    found = state_of(workshop, tmp_path / "out")["classifier.weight"]
    workshop.assert_close(found, (3 * first + second) / 4, 1e-6)


def test_the_first_is_that_of_the_first_adapter_that_has_one(workshop, tmp_path):
    adapters = workshop.adapters("bert", [headless(), classifier(), classifier()])
    merged = merge_adapters(adapters, "linear", heads="first")
    merged.save_pretrained(tmp_path / "out")
    found, wanted = state_of(workshop, tmp_path / "out"), state_of(workshop, adapters[1])
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
    assert merged.report.notes == ("classifier: that of adapter2, of adapter2, adapter3",)


@pytest.mark.parametrize("policy", ["keep-each", "average", "first"])
def test_what_is_the_same_in_all_holders_is_part_of_the_result(workshop, tmp_path, policy):
    adapters = workshop.adapters("bert", [classifier(), classifier()])
    head = {k: v for k, v in load_file(adapters[0] / FILE).items() if "classifier" in k}
    workshop.edit_tensors(adapters[1], lambda tensors: tensors | head)
    weights = [1, -1]  # of which there is no average; none is needed
    merged = merge_adapters(adapters, "linear", weights, heads=policy)
    merged.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "heads").exists()
    assert not merged.report.notes
    found, wanted = state_of(workshop, tmp_path / "out"), state_of(workshop, adapters[0])
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)


def test_weight_and_bias_of_a_head_stay_together(workshop, tmp_path):
    adapters = workshop.adapters("bert", [classifier(), classifier()])
    bias = "base_model.model.classifier.bias"
    same = load_file(adapters[0] / FILE)[bias]
    workshop.edit_tensors(adapters[1], lambda tensors: tensors | {bias: same})
    merge_adapters(adapters, "linear").save_pretrained(tmp_path / "out")
    state_of(workshop, tmp_path / "out")
    kept = [load_file(path) for path in sorted((tmp_path / "out" / "heads").iterdir())]
    assert [set(head) for head in kept] == [set(NAMES)] * 2


def test_each_head_has_its_own_fate(workshop, tmp_path):
    """Both replace the classifier, one the pooler too."""
    adapters = workshop.adapters(
        "bert", [classifier(modules_to_save=["classifier", "pooler"]), classifier()]
    )
    merged = merge_adapters(adapters, "linear")
    merged.save_pretrained(tmp_path / "out")
    found, wanted = state_of(workshop, tmp_path / "out"), state_of(workshop, adapters[0])
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(found[pooler], wanted[pooler])
    assert not torch.equal(found[pooler], workshop.model("bert").state_dict()[pooler])
    assert torch.equal(found[NAMES[0]], workshop.model("bert").state_dict()[NAMES[0]])
    for path, adapter in zip(sorted((tmp_path / "out/heads").iterdir()), adapters, strict=True):
        model = workshop.model("bert")
        assert not model.load_state_dict(load_file(path), strict=False).unexpected_keys
        state = state_of(workshop, adapter)
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in NAMES)


def narrow(workshop, adapter):
    """A head with fewer classes."""
    return workshop.edit_tensors(
        adapter, lambda tensors: {k: v[:2] if "classifier" in k else v for k, v in tensors.items()}
    )


def test_heads_of_different_shapes_have_no_average(workshop):
    adapters = workshop.adapters("bert", [classifier(), classifier()])
    narrow(workshop, adapters[1])
    with pytest.raises(MismatchError, match=r"adapter1 .*\(3, 16\).*adapter2 .*\(2, 16\).*'first'"):
        merge_adapters(adapters, "linear", heads="average")
    assert merge_adapters(adapters, "linear", heads="first").head
    assert set(merge_adapters(adapters, "linear").heads) == {"adapter1", "adapter2"}


def test_weights_that_sum_to_zero_have_no_average(workshop):
    adapters = workshop.adapters("bert", [classifier()] * 3)
    with pytest.raises(OptionError, match=r"adapter1, adapter2, adapter3.*sum to 0.*keep-each"):
        merge_adapters(adapters, "linear", [0.1, 0.2, -0.3], heads="average")


# -------------------------------------------------------------------------------- a merge, merged again


@pytest.fixture
def merged_twice(workshop, tmp_path):
    """Three adapters with a classifier; the merge of two of them; that merge and the third."""
    adapters = workshop.adapters("bert", [classifier()] * 3)
    merge_adapters(adapters[:2], "linear").save_pretrained(tmp_path / "two")
    return adapters, tmp_path / "two"


def test_the_heads_beside_a_merge_are_kept_when_it_is_merged_again(
    workshop, merged_twice, tmp_path
):
    adapters, two = merged_twice
    merge_adapters([two, adapters[2]], "linear").save_pretrained(tmp_path / "three")
    assert sorted(path.stem for path in (tmp_path / "three/heads").iterdir()) == [
        "adapter1",
        "adapter2",
        "adapter3",
    ]
    for adapter in adapters:
        kept = load_file(tmp_path / "three/heads" / f"{adapter.name}.safetensors")
        wanted = state_of(workshop, adapter)
        assert all(torch.equal(kept[name], wanted[name]) for name in NAMES)


def test_heads_of_one_name_are_told_apart(merged_twice, tmp_path):
    adapters, two = merged_twice
    merge_adapters(adapters[1:], "linear").save_pretrained(tmp_path / "other")
    merged = merge_adapters([two, tmp_path / "other", adapters[0]], "linear")
    assert set(merged.heads) == {
        *("adapter1", "two-adapter1", "adapter2", "other-adapter2", "adapter3")
    }


def test_they_are_the_first_or_have_no_weight(workshop, merged_twice, tmp_path):
    adapters, two = merged_twice
    merge_adapters([two, adapters[2]], "linear", heads="first").save_pretrained(tmp_path / "out")
    found, wanted = state_of(workshop, tmp_path / "out"), state_of(workshop, adapters[0])
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
    with pytest.raises(UnsupportedError, match=r"adapter1.*merge the original adapters"):
        merge_adapters([two, adapters[2]], "linear", heads="average")
    with pytest.raises(UnsupportedError, match=r"adapter1, adapter2, adapter3 replace"):
        merge_adapters([two, adapters[2]], "linear", heads="refuse")


def test_a_merge_that_is_loaded_has_its_heads_beside_it_when_it_is_saved(merged_twice, tmp_path):
    _, two = merged_twice
    load_adapter(two).save_pretrained(tmp_path / "out")
    for name, folder in itertools.product(["adapter1", "adapter2"], [tmp_path / "out", two]):
        assert (folder / "heads" / f"{name}.safetensors").is_file()
