import math
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import Workshop

from pcb_peft import MismatchError, OptionError, load_adapter, merge, merge_adapters, read_recipe
from pcb_peft.adapters.response import responses
from pcb_peft.deltas.delta import Core, Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.deltas.inner import inner
from pcb_peft.deltas.linalg import Basis

SHAPE = (7, 5)
LORA = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas() -> dict[str, Delta]:
    low_rank = LowRank(random(2, 5, seed=0), random(7, 2, seed=1), scaling=-1.5)
    left, right = (torch.linalg.qr(random(n, 3, seed=n)).Q for n in SHAPE)
    dora = Rescaled(random(7, seed=4), low_rank, weight=lambda: random(*SHAPE, seed=5))
    return {
        "low rank": low_rank,
        "core": Core(Basis(left), random(3, 3, seed=2), Basis(right)),
        "dense": Dense(random(*SHAPE, seed=3)),
        "dora": dora,
        "dora without gain": Rescaled(torch.zeros(7), low_rank, weight=dora.weight),
    }


@pytest.mark.parametrize("first", deltas())
@pytest.mark.parametrize("second", deltas())
def test_inner_is_that_of_the_matrices(first: str, second: str):
    a, b = deltas()[first], deltas()[second]
    wanted = float((a.matrix().double() * b.matrix().double()).sum())
    assert inner(a, b) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_inner_of_vectors_is_of_what_they_change():
    a, b = Diagonal(torch.tensor([1.0, 2.0, 4.0])), Diagonal(torch.tensor([9.0, 3.0, 0.0]))
    assert inner(a, b) == 0 * 8 + 1 * 2 + 3 * -1


def test_inner_refuses_what_has_no_inner_product():
    with pytest.raises(MismatchError, match=r"\(7, 5\).*\(7, 4\)"):
        inner(Dense(torch.ones(7, 5)), Dense(torch.ones(7, 4)))
    with pytest.raises(MismatchError, match=r"IA.*matrix"):
        inner(Diagonal(torch.ones(7)), Dense(torch.ones(7, 1)))


def test_the_response_of_a_sum(workshop: Workshop):
    """With the dense deltas that PEFT makes: ⟨ΣΔW, ΔW_t⟩ / ‖ΔW_t‖²."""
    paths = workshop.adapters("llama", [LORA, LORA])
    dense = [workshop.deltas("llama", path) for path in paths]
    found = responses(merge_adapters(paths, "linear"), [load_adapter(path) for path in paths])
    for path, own in zip(paths, dense, strict=True):
        products = {m: float(((dense[0][m] + dense[1][m]) * own[m]).sum()) for m in own}
        squares = {m: float(own[m].square().sum()) for m in own}
        response = found[path.name]
        assert response.total == pytest.approx(sum(products.values()) / sum(squares.values()))
        assert response.modules == pytest.approx({m: products[m] / squares[m] for m in own})


def test_the_response_to_a_module_that_the_merge_lacks_is_zero(workshop: Workshop):
    few = workshop.adapter("llama", peft.LoraConfig(target_modules=["q_proj"]), "few")
    many = load_adapter(workshop.adapter("llama", LORA, "many"))
    found = responses(load_adapter(few), [many])["many"]
    assert {m for m, value in found.modules.items() if value == 0} == {
        m for m in many.modules if not m.endswith("q_proj")
    }


@pytest.mark.parametrize("method", ["linear", "pcb"])
def test_scaled_saves_the_multiple(workshop: Workshop, method: str):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]), method)
    merged.save_pretrained(workshop.directory / "one")
    merged.scaled(-1.5).save_pretrained(workshop.directory / "more")
    wanted = workshop.deltas("llama", workshop.directory / "one")
    found = workshop.deltas("llama", workshop.directory / "more")
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        workshop.assert_close(found[module], -1.5 * delta, 1e-6)


def test_scaled_is_in_the_recipe_and_in_the_report(workshop: Workshop):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA])).scaled(2).scaled(0.7)
    merged.save_pretrained(workshop.directory / "out")
    recipe = read_recipe(workshop.directory / "out" / "merge_recipe.yaml")
    assert recipe.scale == pytest.approx(1.4)
    again = merge(recipe)
    for module in merged.modules:
        workshop.assert_close(again.delta(module), merged.delta(module), 1e-6)
        assert merged.report.modules[module].norm == pytest.approx(
            merged.modules[module].norm(), rel=1e-5
        )


def test_a_scaled_dense_merge_is_the_multiple_and_is_reported_when_it_is_folded(workshop: Workshop):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]), rank="full")
    scaled = merged.scaled(3)
    report = scaled.fold(workshop.base("llama"), workshop.directory / "out").report
    for module, delta in merged.modules.items():
        workshop.assert_close(scaled.delta(module), 3 * delta.delta(), 1e-6)
        assert report.modules[module].norm == pytest.approx(3 * delta.norm(), rel=1e-5)


def test_a_scaled_adapter_is_not_taken_for_the_one_in_its_files(workshop: Workshop):
    path = workshop.adapter("llama", LORA)
    half = load_adapter(path).scaled(0.5)
    merged = merge_adapters([half], "linear")
    assert str(path) not in merged.recipe.to_yaml()
    for module, delta in workshop.deltas("llama", path).items():
        workshop.assert_close(merged.delta(module), 0.5 * delta, 1e-6)


def test_a_scaled_dora_is_scaled_beside_its_base(workshop: Workshop):
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    path, base = workshop.adapter("llama", config), workshop.base("llama")
    half = load_adapter(path).scaled(0.5)
    for module, delta in workshop.deltas("llama", path).items():
        workshop.assert_close(half.delta(module, base_model=base), 0.5 * delta, 1e-5)


def test_a_scale_must_be_a_number(workshop: Workshop, tmp_path: Path):
    path = workshop.adapter("llama", LORA)
    with pytest.raises(OptionError, match="finite"):
        load_adapter(path).scaled(math.nan)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"adapters": [str(path)], "scale": "big"}))
    with pytest.raises(OptionError, match="scale is 'big'; it must be a number"):
        read_recipe(recipe)


def test_flat_of_vectors_is_their_sum_at_the_response_of_a_sum(workshop: Workshop):
    """A vector has one direction, which no other is as strong as."""
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    paths = workshop.adapters("llama", [config] * 4)
    found, parents = merge_adapters(paths, "flat"), [load_adapter(path) for path in paths]
    for module in found.modules:
        x = torch.stack([parent.modules[module].l.double() - 1 for parent in parents])
        total, squares = x.sum(0), x.square().sum(1)
        kept = total.square().sum() / squares.sum()
        share = torch.maximum((x @ total / squares).mean(), kept)
        wanted = 1 + total * (kept / 4) ** (1 / 3) * min(1, 2 * kept) / share
        workshop.assert_close(found.modules[module].l, wanted, 1e-6)
