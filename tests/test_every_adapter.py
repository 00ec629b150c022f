"""Every adapter that PEFT saves: read, merged, saved and folded, it is what PEFT's own merge_and_unload makes of it."""

import dataclasses
import functools
import importlib.util
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
from helpers import lora

from pcb_peft import BaseModelError, UnsupportedError, load_adapter, merge_adapters

WEIGHTS = (1.5, -0.7)
pytestmark = [
    pytest.mark.filterwarnings(
        *("ignore:.*lora_bias=True", "ignore:.*invalid shape", "ignore:Specified to not"),
        *("ignore:Failed to load the CUDA", "ignore:Setting boft", "ignore:Sparse invariant"),
        "ignore:Unsupported layer type",
    ),
    pytest.mark.slow,
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of adapter.

    Attributes:
        kind: The model that it is made on.
        made: How PEFT makes it: a configuration, or a call that returns one.
        needs_base: Whether its change depends on the model.
        saves: Whether its merge leaves as one adapter.
        dtype: In which PEFT can load it.
        flattened: Whether its tensors do not tell that the layer is a convolution.
    """

    kind: str
    made: peft.PeftConfig | functools.partial[peft.PeftConfig]
    needs_base: bool = False
    saves: bool = True
    dtype: torch.dtype = torch.float64
    flattened: bool = False

    @property
    def tuner(self) -> type[peft.PeftConfig]:
        return self.made.func if isinstance(self.made, functools.partial) else type(self.made)

    @functools.cached_property
    def config(self) -> peft.PeftConfig:
        if isinstance(self.made, peft.PeftConfig):
            return self.made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT would rather have projections saved
            return self.made()


def other(tuner: type[peft.PeftConfig], *targets: str, kind: str = "mlp", **options: Any) -> Case:
    """An adapter of one of the tuners that are not LoRA; most of them are read beside the base model."""
    names = ("needs_base", "saves", "dtype", "flattened")
    case = {name: options.pop(name) for name in names if name in options}
    made = functools.partial(tuner, target_modules=list(targets or ("up", "mix")), **options)
    return Case(kind, made, **{"needs_base": True} | case)


LYCORIS_PATTERNS = {"rank_pattern": {"mix": 2}, "alpha_pattern": {"blocks.0.mix": 3}}


def experts(*parameters: str, **options: Any) -> peft.LoraConfig:
    return lora(**{"target_modules": [], "target_parameters": list(parameters)} | options)


CASES = {
    "LoRA": Case("mlp", lora("up", "mix")),
    "LoRA on an embedding": Case("odd", lora("table")),
    "LoRA on a Conv1d": Case("odd", lora("line")),
    "LoRA on a Conv2d": Case("odd", lora("image", "point")),
    "LoRA on a Conv3d": Case("odd", lora("volume")),
    "LoRA on attention": Case("odd", lora("attention")),
    "LoRA on all of these": Case("odd", lora("table", "image", "attention", "wide", "linear")),
    "lora_bias": Case("mlp", lora("up", "mix", lora_bias=True)),
    "rsLoRA with lora_bias": Case("mlp", lora("up", "mix", lora_bias=True, use_rslora=True)),
    "bias=lora_only": Case("mlp", lora("up", "mix", bias="lora_only"), needs_base=True),
    "bias=all": Case("mlp", lora("up", "mix", bias="all"), needs_base=True),
    "bias=all with norms": Case("odd", lora("linear", bias="all"), needs_base=True),
    "DoRA": Case("mlp", lora("up", "mix", use_dora=True), needs_base=True),
    "DoRA on Conv1D": Case(
        "gpt2", lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True), needs_base=True
    ),
    "DoRA on an embedding": Case("odd", lora("table", use_dora=True), needs_base=True),
    "DoRA on convolutions": Case("odd", lora("line", "image", use_dora=True), needs_base=True),
    "PiSSA": Case(
        "mlp", lora("up", "mix", init_lora_weights="pissa"), needs_base=True, dtype=torch.float32
    ),
    "PiSSA on Conv1D": Case(
        "gpt2",
        lora("c_attn", init_lora_weights="pissa", fan_in_fan_out=True),
        needs_base=True,
        dtype=torch.float32,
    ),
    "OLoRA": Case(
        "mlp", lora("up", "mix", init_lora_weights="olora"), needs_base=True, dtype=torch.float32
    ),
    "OLoRA and rsLoRA": Case(
        "mlp",
        lora("up", "mix", init_lora_weights="olora", use_rslora=True),
        needs_base=True,
        dtype=torch.float32,
    ),
    "PiSSA and DoRA": Case(
        "mlp",
        lora("up", init_lora_weights="pissa", use_dora=True),
        needs_base=True,
        dtype=torch.float32,
    ),
    "KaSA": Case("mlp", lora("up", "mix", kasa_config=peft.KasaConfig()), needs_base=True),
    "BdLoRA": Case(
        "odd",
        lora("linear", "wide", use_bdlora=peft.tuners.lora.BdLoraConfig(["linear"], ["wide"], 3)),
    ),
    "experts": Case("mixtral", experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    "experts and layers": Case(
        "mixtral", experts("mlp.experts.down_proj", target_modules=["q_proj"], use_rslora=True)
    ),
    "square experts": Case("square mixtral", experts("mlp.experts.down_proj")),
    "experts, transposed": Case(
        "gpt_oss", experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    ),
    "a matrix as a parameter": Case("odd", experts("linear.weight", "wide.weight")),
    "a stack that transformers does not know": Case("odd", experts("inner.experts")),
    "(IA)³ on convolutions": Case(
        "odd",
        peft.IA3Config(target_modules=["image", "point", "wide"], feedforward_modules=["point"]),
        needs_base=True,
    ),
    "AdaLoRA": other(peft.AdaLoraConfig, init_r=3, lora_alpha=5, total_step=9, needs_base=False),
    "AdaLoRA on Conv1D": other(
        *(peft.AdaLoraConfig, "c_attn", "c_proj"),
        kind="gpt2",
        needs_base=False,
        init_r=3,
        total_step=9,
        fan_in_fan_out=True,
    ),
    "AdaLoRA on a Conv2d": other(
        peft.AdaLoraConfig, "image", kind="odd", init_r=3, flattened=True, total_step=9
    ),
    "LoHa": other(peft.LoHaConfig, r=3, alpha=5, needs_base=False, **LYCORIS_PATTERNS),
    "LoHa on convolutions": other(
        *(peft.LoHaConfig, "line", "image"), kind="odd", use_effective_conv2d=True, needs_base=False
    ),
    "LoHa on flattened convolutions": other(
        peft.LoHaConfig, "line", "image", "point", kind="odd", r=3, flattened=True
    ),
    "LoKr": other(peft.LoKrConfig, r=8, alpha=5, needs_base=False, **LYCORIS_PATTERNS),
    "LoKr of small factors": other(
        peft.LoKrConfig, r=1, alpha=5, decompose_both=True, needs_base=False
    ),
    "LoKr with a core": other(
        peft.LoKrConfig, "deep", kind="odd", r=2, use_effective_conv2d=True, needs_base=False
    ),
    "LoKr on convolutions": other(
        peft.LoKrConfig, "line", "image", kind="odd", use_effective_conv2d=True, needs_base=False
    ),
    "VeRA": other(peft.VeraConfig, r=3),
    "VeRA on Conv1D": other(
        peft.VeraConfig, "c_attn", "c_proj", kind="gpt2", r=3, fan_in_fan_out=True
    ),
    "VeRA without its projections": other(peft.VeraConfig, r=3, save_projection=False),
    "PVeRA": other(peft.PveraConfig, r=3, save_projection=False),
    "RandLoRA": other(peft.RandLoraConfig, r=3),
    "RandLoRA without its projections": other(peft.RandLoraConfig, r=3, save_projection=False),
    "VB-LoRA": other(peft.VBLoRAConfig, r=2, num_vectors=6, vector_length=2),
    "VB-LoRA, the largest logits": other(
        peft.VBLoRAConfig, r=2, num_vectors=6, vector_length=2, save_only_topk_weights=True
    ),
    "FourierFT": other(peft.FourierFTConfig, n_frequency=9, n_frequency_pattern={"mix": 5}),
    "FourierFT on Conv1D": other(
        peft.FourierFTConfig, "c_attn", kind="gpt2", n_frequency=9, fan_in_fan_out=True
    ),
    "WaveFT": other(peft.WaveFTConfig, n_frequency=9),
    "C3A": other(peft.C3AConfig, block_size=2, needs_base=False),
    "MiSS": other(peft.MissConfig, r=3),
    "MiSS, mini": other(peft.MissConfig, r=3, mini_r=2, init_weights="mini"),
    "MiSS, bat": other(peft.MissConfig, r=2, init_weights="bat"),
    "DeLoRA": other(peft.DeloraConfig, r=3, needs_base=False),
    "GraLoRA": other(peft.GraloraConfig, r=4, gralora_k=2),
    "SHiRA": other(peft.ShiraConfig, r=2),
    "OFT": other(peft.OFTConfig, r=2, oft_block_size=0),
    "OFT, exact": other(peft.OFTConfig, r=2, oft_block_size=0, use_cayley_neumann=False),
    "OFT with biases": other(peft.OFTConfig, r=2, oft_block_size=0, bias="all"),
    "OFT on a Conv2d": other(peft.OFTConfig, "image", kind="odd", r=2, oft_block_size=0),
    "BOFT": other(peft.BOFTConfig, boft_block_size=2),
    "BOFT on a Conv2d": other(peft.BOFTConfig, "image", kind="odd", boft_block_size=2),
    "HRA": other(peft.HRAConfig, r=4),
    "HRA, orthogonalised": other(peft.HRAConfig, r=4, apply_GS=True),
    "HRA on a Conv2d": other(peft.HRAConfig, "image", kind="odd", r=4),
    "HiRA": other(peft.HiraConfig, r=3),
    "HiRA on Conv1D": other(peft.HiraConfig, "c_attn", kind="gpt2", r=3, fan_in_fan_out=True),
    "RoAd": other(peft.RoadConfig, group_size=2),
    "GLoRA": other(peft.GloraConfig, r=2),
    "OSF": other(peft.OSFConfig),
    "PSOFT": other(peft.PsoftConfig, r=3, dtype=torch.float32),
    "PEANuT": other(peft.PeanutConfig),
    "DEFT": other(peft.DeftConfig, r=2),
    "SuperTuning": other(peft.SupertuningConfig, sparsity=0.5),
    "BEFT": other(peft.BeftConfig, saves=False),
    "LN-Tuning": other(peft.LNTuningConfig, "norm", kind="odd", saves=False),
}

if importlib.util.find_spec("sklearn"):  # which PEFT needs for it
    CASES["AdaMSS"] = other(peft.AdamssConfig)

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def pair(shared_workshop, name):
    """Two adapters of a kind."""
    case = CASES[name]
    folder = "".join(c for c in name if c.isalnum())
    for seed in (1, 2):
        if not (shared_workshop.directory / f"{folder}{seed}").is_dir():
            shared_workshop.adapter(case.kind, case.config, f"{folder}{seed}", seed=seed)
    return [shared_workshop.directory / f"{folder}{seed}" for seed in (1, 2)]


def changes_of(shared_workshop, case, adapter):
    return shared_workshop.changes(case.kind, adapter, case.dtype)


def combined(shared_workshop, case, pair):
    """Σ w ΔW according to PEFT, by parameter."""
    changes = [changes_of(shared_workshop, case, adapter) for adapter in pair]
    names = changes[0].keys() | changes[1].keys()
    return {
        name: sum(
            weight * change[name]
            for weight, change in zip(WEIGHTS, changes, strict=True)
            if name in change
        )
        for name in names
    }


ENDS = ("bias", "in_proj_weight")  # of parameters that are not called weight


def parameter_of(module):
    """The parameter of the model that a module of an adapter is, and which part of it."""
    stack, _, last = module.rpartition(".")
    if last.isdecimal() and "experts" in stack:
        return stack, int(last)
    return (module if last in ENDS else f"{module}.weight"), None


def whole(deltas):
    """ΔW by parameter; experts stacked."""
    found: dict[str, Any] = {}
    for module, delta in deltas.items():
        name, index = parameter_of(module)
        if index is None:
            found[name] = delta
        else:
            found.setdefault(name, {})[index] = delta
    return {
        name: torch.stack([some[i] for i in sorted(some)]) if isinstance(some, dict) else some
        for name, some in found.items()
    }


@every_case
def test_it_is_read_as_peft_merges_it_and_goes_through_a_pickle(shared_workshop, name, pair):
    case = CASES[name]
    base = shared_workshop.base(case.kind)
    given = base if case.needs_base else None
    adapter = load_adapter(pair[0], base_model=given)
    wanted = changes_of(shared_workshop, case, pair[0])
    deltas = {m: adapter.delta(m, base_model=base) for m in adapter.modules}
    found = whole(deltas)
    multiplied = {name for name in wanted if name not in found}  # the biases of an (IA)³
    assert multiplied == {n for n in wanted if n.endswith(".bias")} - found.keys()
    assert not found.keys() - wanted.keys()
    for parameter, delta in found.items():
        shared_workshop.assert_close(delta, wanted[parameter], 1e-5, parameter)
    twin = pickle.loads(pickle.dumps(adapter))
    assert twin.modules.entries.keys() == adapter.modules.entries.keys()
    for module, delta in deltas.items():
        assert torch.equal(twin.delta(module, base_model=base), delta)


@every_case
def test_without_the_base_it_says_that_it_needs_it(name, pair):
    case = CASES[name]
    if not case.needs_base or case.flattened or isinstance(case.config, peft.IA3Config):
        merge_adapters(pair, "linear")
        return
    with pytest.raises(BaseModelError, match="give base_model"):
        [delta.norm() for delta in load_adapter(pair[0]).modules.values()]
    with pytest.raises(BaseModelError, match="give base_model"):
        merge_adapters(pair, "linear")


@every_case
def test_a_weighted_sum_is_that_of_peft_s_deltas_in_memory_saved_and_folded(
    shared_workshop, name, pair, tmp_path
):
    case = CASES[name]
    base = shared_workshop.base(case.kind)
    given = base if case.needs_base else None
    wanted = combined(shared_workshop, case, pair)

    merged = merge_adapters(pair, "linear", WEIGHTS, base_model=given)
    found = whole({m: merged.delta(m, base_model=base) for m in merged.modules})
    assert found
    for parameter, delta in found.items():
        shared_workshop.assert_close(delta, wanted[parameter], 1e-5, parameter)

    if case.saves:
        merged.save_pretrained(tmp_path / "saved")
        found = changes_of(shared_workshop, case, tmp_path / "saved")
        assert found.keys() == wanted.keys()
        for parameter, change in wanted.items():
            shared_workshop.assert_close(found[parameter], change, 1e-5, parameter)
    else:
        with pytest.raises(UnsupportedError, match="fold"):
            merged.save_pretrained(tmp_path / "saved")

    merged.fold(base, tmp_path / "folded")
    before, after = shared_workshop.state(base), shared_workshop.state(tmp_path / "folded")
    assert before.keys() == after.keys()
    for parameter, values in before.items():
        change = wanted.get(parameter, torch.zeros_like(values))
        shared_workshop.assert_close(after[parameter], values + change, 1e-6, parameter)
