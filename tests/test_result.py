"""The result of a merge: a report that does not change, short texts about it, and an object that can be copied."""

import copy
import dataclasses
import html.parser
import json
import math
import pickle
import re

import peft
import pytest
import torch
from helpers import adapter, low_rank

from pcb_peft import MergedAdapter, Report, load_adapter, merge_adapters, responses
from pcb_peft.deltas.delta import Diagonal
from pcb_peft.merging.report import ModuleReport, least_share

LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
DORA = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
IA3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
HEAD = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
ROWS = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])

CASES = {  # configurations, and arguments of the merge
    "LoRA": ([LORA, LORA], {}),
    "dense": ([LORA, LORA], {"rank": "full", "space": "dense", "method": "ties"}),
    "dense, over all modules": ([LORA, LORA], {"rank": "full", "scope": "global", "method": "pcb"}),
    "dense, calibrated": ([LORA, LORA], {"rank": "full", "before": "pico", "after": "amplitude"}),
    "dense, random": ([LORA, LORA], {"rank": "full", "method": "dare_ties", "seed": 3}),
    "dense, scaled": ([LORA], {"rank": "full"}),
    "a budget": ([LORA, LORA], {"rank": "budget:9"}),
    "a budget of utility": ([LORA, LORA], {"rank": "utility:9"}),
    "DoRA": ([DORA, LORA], {"method": "linear"}),
    "(IA)³": ([IA3, IA3], {"method": "linear"}),
    "heads": ([HEAD, HEAD], {}),
    "an average of heads": ([HEAD, HEAD], {"heads": "average"}),
    "rows": ([ROWS, ROWS], {"heads": "first"}),
}


@pytest.fixture(params=CASES)
def merged(request, workshop):
    configs, options = CASES[request.param]
    base = str(workshop.base("llama"))
    result = merge_adapters(workshop.adapters("llama", configs), base_model=base, **options)
    return result.scaled(0.5) if request.param == "dense, scaled" else result


def same_delta(one, other):
    assert type(one) is type(other)
    if isinstance(one, Diagonal):
        assert torch.equal(one.l, other.l)
    else:
        assert torch.equal(one.matrix(), other.matrix())


def same(one, other):
    assert list(one.modules) == list(other.modules)
    for module, delta in one.modules.items():
        same_delta(delta, other.modules[module])
    assert one.heads.keys() == other.heads.keys()
    for mine, theirs in (
        (one.head, other.head),
        *((h, other.heads[n]) for n, h in one.heads.items()),
    ):
        assert mine.read().keys() == theirs.read().keys()
        assert all(torch.equal(x, theirs.read()[name]) for name, x in mine.read().items())
        assert all(torch.equal(x.load(), theirs.rows[name].load()) for name, x in mine.rows.items())
    assert (one.recipe, one.report, one.name) == (other.recipe, other.report, other.name)


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize(
    "copied",
    [lambda merged: pickle.loads(pickle.dumps(merged)), copy.deepcopy],
    ids=["pickle", "deepcopy"],
)
def test_a_merged_adapter_can_be_copied(merged, copied, workshop):
    other = copied(merged)
    assert isinstance(other, MergedAdapter)
    same(merged, other)
    if copied is copy.deepcopy:
        return
    folded = other.fold(workshop.base("llama"), workshop.directory / "out")
    assert folded.report.pending == 0
    assert set(folded.report.modules) == set(merged.modules)


def test_an_adapter_can_be_copied_and_is_read_again(workshop):
    adapter = load_adapter(workshop.adapter("llama", DORA), base_model=workshop.base("llama"))
    for other in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter)):
        for module, delta in adapter.modules.items():
            same_delta(delta, other.modules[module])
        other.save_pretrained(workshop.directory / "out", overwrite=True)


# ----------------------------------------------------------------------------------------- the report


def test_the_report_does_not_change(workshop):
    report = merge_adapters(workshop.adapters("llama", [LORA, LORA])).report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seconds = 0.0  # type: ignore[misc]
    assert isinstance(report.notes, tuple)


def test_a_layer_that_an_adapter_leaves_alone_has_no_share_of_it(workshop):
    paths = workshop.adapters("llama", [LORA, LORA])
    workshop.edit_tensors(
        paths[0],
        lambda tensors: {
            name: x * (0 if "layers.1" in name and "lora_B" in name else 1)
            for name, x in tensors.items()
        },
    )
    report = merge_adapters(paths, "linear").report
    first, second = report.adapters.values()
    assert (set(first.by_layer), set(second.by_layer)) == ({"0"}, {"0", "1"})
    assert "layer" not in least_share(first)


def test_a_dense_merge_says_what_is_pending_until_it_is_folded(workshop):
    paths, base = workshop.adapters("llama", [LORA, LORA]), workshop.base("llama")
    merged = merge_adapters(paths, "ties", rank="full")
    assert (len(merged.report.modules), merged.report.pending) == (0, 4)
    words = str(merged.report)
    assert "4 modules" in words
    assert "computed when it is read or folded" in words
    assert "retained energy" not in words
    list(merged.modules.values())
    assert not merged.report.modules
    folded = merged.fold(base, workshop.directory / "out")
    assert not merged.report.modules
    assert set(folded.report.modules) == set(merged.modules)
    for module, line in folded.report.modules.items():
        assert line.norm == pytest.approx(float(merged.delta(module).norm()), rel=1e-5)
    assert f"signs differ at {folded.report.conflicts:.1%} of the entries" in str(folded.report)
    counted = merged.counted()
    assert counted.report == folded.report
    assert counted.counted() is counted


def test_a_fold_of_what_is_counted_returns_the_adapter(workshop):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]))
    assert merged.fold(workshop.base("llama"), workshop.directory / "out") is merged


def test_texts_about_a_merge_are_short(workshop):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]), base_model="org/<base>")
    assert repr(merged) == (
        "<MergedAdapter: 2 adapters merged with flat in core space, 4 modules of rank 4, base model org/<base>>"
    )
    assert (
        repr(merged.report)
        == f"<Report: flat in core space, {merged.report.scope} scope: 4 modules, rank 4>"
    )


class Balanced(html.parser.HTMLParser):
    """Text of HTML in which every element that begins ends."""

    def __init__(self, content):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, _):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_notebooks_see_what_is_in_a_merge_and_no_name_becomes_markup(workshop):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]), base_model="org/<b>&")
    page = Balanced(merged._repr_html_())
    for words in ("org/<b>&", "adapter1", "adapter2", *merged.modules):
        assert words in page.text
    line = ModuleReport((1, 2), 1, 1.0, 1.0, {"<i>": 0.5}, 0.0, {"<i>": 1.0})
    report = Report("m<", "s>", "module", {"a<u>": line}, ("<script>",))
    found = Balanced(report._repr_html_()).text
    assert all(words in found for words in ("m<", "s>", "a<u>", "<script>", "<i>", "kept 50.0%"))


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("rank", [None, 2, "budget:6"])
def test_the_report_has_the_share_of_each_adapter(workshop, rank):
    """As `responses` has them, and numpy: ⟨M, ΔW⟩ / ‖ΔW‖² over all modules, over a layer, over a target."""
    paths = workshop.adapters("llama", [LORA, LORA])
    merged = merge_adapters(paths, "ties", rank=rank)
    adapters = [load_adapter(path) for path in paths]
    wanted = responses(merged, adapters)
    assert list(merged.report.adapters) == list(wanted)
    for source in adapters:
        line = merged.report.adapters[source.name]
        assert line.share == pytest.approx(wanted[source.name].total, rel=1e-5, abs=1e-6)
        deltas = {module: source.delta(module) for module in source.modules}
        assert line.norm == pytest.approx(
            math.sqrt(sum(float(delta.double().square().sum()) for delta in deltas.values())),
            rel=1e-6,
        )
        for layer, share in line.by_layer.items():
            own = [m for m in deltas if f".{layer}." in m]
            product = sum(float((merged.delta(m).double() * deltas[m]).sum()) for m in own)
            assert share == pytest.approx(
                product / sum(float(deltas[m].double().square().sum()) for m in own), rel=1e-4
            )


def test_a_scaled_merge_has_scaled_shares(workshop):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]))
    before, after = merged.report.adapters, merged.scaled(-2.0).report.adapters
    assert [one.share for one in after.values()] == pytest.approx(
        [-2 * one.share for one in before.values()]
    )


def test_a_weak_merge_and_a_strong_one_are_pointed_out(workshop):
    paths = workshop.adapters("llama", [LORA, LORA])
    assert "the merge is weak" in str(merge_adapters(paths, "linear", [0.1, 0.1]).report)
    assert "the merge is strong" in str(merge_adapters(paths, "linear", [3.0, 3.0]).report)
    scaled = merge_adapters(paths, "linear").scaled(5)
    factor = re.search(r"try (\S+) times its scale", str(scaled.report))
    assert factor
    assert "the merge is" not in str(scaled.scaled(float(factor[1])).report)
    hint = str(merge_adapters(paths, "linear", [0.1, 0.1]).report)
    scale = float(re.search(r"--set scale=([\d.]+)", hint).group(1))
    better = merge_adapters(paths, "linear", [0.1, 0.1], scale=scale)
    assert better.recipe.scale == scale
    assert "the merge is" not in str(better.report)
    assert better.report.share == pytest.approx(2 ** (-1 / 3), rel=0.05)


def test_sign_conflicts_stand_beside_chance(workshop):
    report = merge_adapters(workshop.adapters("llama", [LORA] * 3)).report
    assert report.conflicts_chance == pytest.approx(1 - 2**-2)
    assert f"of random signs it would be {report.conflicts_chance:.1%}" in str(report)


def test_adapters_stand_in_the_order_of_the_merge_whatever_they_change(workshop):
    """The first one changes modules that come late, and the page must not mix up names and weights."""
    early, late = (
        peft.LoraConfig(target_modules=["down_proj"]),
        peft.LoraConfig(target_modules=["v_proj"]),
    )
    paths = workshop.adapters("llama", [late, early])
    report = merge_adapters(paths, "linear", [0.25, 4.0]).report
    assert list(report.adapters) == ["adapter1", "adapter2"]
    assert report.adapters["adapter1"].share == pytest.approx(0.25)


def test_a_report_is_plain_data_for_json(workshop):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]))
    found = json.loads(json.dumps(merged.report.as_dict()))
    assert set(found["modules"]) == set(merged.modules)
    assert (found["pending"], found["method"]) == (0, "flat")


def test_an_adapter_that_changes_nothing_is_no_competitor():
    ((lora_B, lora_A),) = low_rank(2)
    trained = adapter("trained", {"layers.0.q": (lora_B, lora_A)})
    zero = adapter("zero", {"layers.0.q": (0 * lora_B, lora_A)})
    report = merge_adapters([trained, zero], "flat").report
    assert report.conflicts_chance == 0
    assert report.share == report.adapters["trained"].share
    assert "zero changes nothing: was it trained?" in str(report)
    assert not {"signs", "weak"} & set(str(report).split())


def test_layers_of_two_lists_are_told_apart():
    modules = [f"{part}.block.{i}.q" for part in ("encoder", "decoder") for i in (0, 1)]
    pairs = [adapter(str(seed), {m: low_rank(2, seed=seed)[0] for m in modules}) for seed in (1, 2)]
    line = merge_adapters(pairs, "ties").report.adapters["1"]
    assert list(line.by_layer) == ["decoder 0", "decoder 1", "encoder 0", "encoder 1"]
    part, number, _ = least_share(line).split()
    assert f"{part} {number}" in line.by_layer
