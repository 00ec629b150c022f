"""The names of every architecture's modules in every dialect: all that mean one weight meet on it.

Expected values are the factors themselves, and what diffusers' own converters make of the same files.
"""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pcb_peft import UnsupportedError, load_adapter, merge_adapters
from pcb_peft.images.rows import parts_of, shares_of
from pcb_peft.images.tables import ARCHITECTURES

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


BY_NAME = {one.name: one for one in ARCHITECTURES}
RANK = 2
WIDTHS = {"Lumina-Image 2": 2304}  # by which it is told from Z-Image, whose names are the same
WIDTH = 32
CONTEXT = {"Stable Diffusion 1": 768, "Stable Diffusion 2": 1024, "SDXL": 2048}
ROWS = (  # architecture, end of a name, and how many times as many rows as columns it has
    ("Flux.1", "net.0.proj", 4),
    ("Flux.2", "to_qkv_mlp_proj", 9),
    ("Flux.2", "ff.linear_in", 6),
    ("Flux.2", "ff_context.linear_in", 6),
)
ROWS += tuple((one, "norm_out.linear", 2) for one in ("Flux.1", "Flux.2", "HunyuanVideo"))
ROWS += (
    ("Stable Diffusion 3", "norm_out.linear", 2),
    ("Stable Diffusion 3", "norm1_context.linear", 2),
)
COLUMNS = (  # and how many times as many columns as rows
    ("Flux.1", "net.2", 4),
    ("Flux.1", "0.proj_out", 5),
    ("Flux.2", "linear_out", 3),
    ("Flux.2", "attn.to_out", 4),
)


def shape_of(name, architecture):
    width = WIDTHS.get(architecture, WIDTH)
    if re.search(r"attn2\.to_[kv]$", name) and architecture in CONTEXT:
        return width, CONTEXT[architecture]
    if "{" in name:
        shares = shares_of(name)
        return (7 if len(shares) == 4 else sum(shares)) * width // max(shares), width
    times, wide = (
        next((t for one, end, t in table if one == architecture and name.endswith(end)), 1)
        for table in (ROWS, COLUMNS)
    )
    return times * width, wide * width


def factors(architecture, leave_out="(?!)"):
    """Two factors of every module of an architecture, by diffusers' names; `leave_out` matches names to do without."""
    made = {}
    for seed, template in enumerate(BY_NAME[architecture].rows.names):
        name = template.replace("#", "0")
        if re.search(leave_out, name):
            continue
        rows, columns = shape_of(name, architecture)
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(RANK, columns, generator=generator)
        made[name] = down, torch.randn(rows, RANK, generator=generator)
    return made


def in_parts(deltas):
    """Deltas by the names of their parts."""
    split = {}
    for name, delta in deltas.items():
        shares = shares_of(name)
        shares = [1, 1, 1, 4] if len(shares) == 4 else shares  # the last is the MLP's
        sizes = [len(delta) * share // sum(shares) for share in shares]
        split |= dict(zip(parts_of(name), delta.split(sizes), strict=True))
    return split


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def file_of(path, named, ends=("lora_A", "lora_B"), *, alpha=False):
    tensors = {}
    for name, (down, up) in named.items():
        tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file({name: values.clone().contiguous() for name, values in tensors.items()}, path)
    return tensors


KOHYA = ("lora_down", "lora_up")
DIALECTS = {  # from the original code's name, diffusers' and the component to the name in the file; ends; alpha
    "kohya": (lambda original, _, __: f"lora_unet_{flat(original)}", KOHYA, True),
    "kohya, diffusers' names": (lambda _, here, __: f"lora_unet_{flat(here)}", KOHYA, True),
    "lycoris": (lambda _, here, __: f"lycoris_{flat(here)}", KOHYA, True),
    "OneTrainer": (lambda _, here, __: f"lora_transformer_{flat(here)}", KOHYA, True),
    "ai-toolkit": (
        lambda original, _, __: f"diffusion_model.{original}",
        ("lora_A", "lora_B"),
        False,
    ),
    "ComfyUI": (lambda original, _, __: f"diffusion_model.{original}", KOHYA, False),
    "bare": (
        lambda original, _, __: original,
        ("lora_A.default", "lora_B.default"),
        False,
    ),
    "SimpleTuner": (
        lambda _, here, component: f"{component}.base_model.model.{here}",
        ("lora.down", "lora.up"),
        False,
    ),
    "PEFT": (lambda _, here, __: f"base_model.model.{here}", ("lora_A", "lora_B"), False),
}
EXCHANGED = re.compile(r"^norm_out\.linear$|norm1_context\.linear$")
FUSED_IN_DIFFUSERS = ("kohya, diffusers' names", "lycoris", "OneTrainer", "SimpleTuner", "PEFT")


def flat(name):
    return name.replace(".", "_")


def named_in(dialect, architecture, made):
    """Factors by the names of a dialect; where it has diffusers' names, in parts."""
    write = DIALECTS[dialect][0]
    if dialect in FUSED_IN_DIFFUSERS:
        ups = in_parts({name: up for name, (_, up) in made.items()})
        downs = {part: down for name, (down, _) in made.items() for part in parts_of(name)}
        made = {part: (downs[part], up) for part, up in ups.items()}
    else:  # scale before shift in diffusers, shift before scale elsewhere
        swapped = [name for name in made if EXCHANGED.search(name)]
        halves = {
            name: made[name][1].chunk(2) for name in swapped if len(made[name][1]) == 2 * WIDTH
        }
        made = made | {name: (made[name][0], torch.cat([b, a])) for name, (a, b) in halves.items()}
    one = BY_NAME[architecture]
    return {
        write(one.original(name) or name, name, one.component): pair for name, pair in made.items()
    }


CASES = [
    (architecture, dialect)
    for architecture in BY_NAME
    for dialect in DIALECTS
    if not (dialect == "OneTrainer" and BY_NAME[architecture].component == "unet")
    and not (dialect == "kohya" and architecture in ("Stable Diffusion 1", "Stable Diffusion 2"))
]


READ_ALONE = [
    case
    for number, architecture in enumerate(BY_NAME)
    for case in [case for case in CASES if case[0] == architecture][number % 4 :: 4]
]
"""Two or three dialects of each architecture, all nine in turn. (All of all are merged below.)"""

LEFT_OUT = (
    r"single_transformer_blocks.*attn\.\{to_q|(down|up)_blocks\.[023]|^(noise|context)_refiner"
)
"""Matches XLabs' queries, keys and values, which are a part of linear1; and blocks that are named as others are."""


@pytest.mark.parametrize(("architecture", "dialect"), READ_ALONE)
def test_every_name_of_a_dialect_is_read_as_diffusers_name(tmp_path, architecture, dialect):
    made = factors(architecture, LEFT_OUT)
    _, ends, alpha = DIALECTS[dialect]
    path = tmp_path / "a.safetensors"
    file_of(path, named_in(dialect, architecture, made), ends, alpha=alpha)
    adapter = load_adapter(path)
    component = BY_NAME[architecture].component
    wanted = in_parts({f"{component}.{name}": up @ down for name, (down, up) in made.items()})
    found = in_parts({name: adapter.delta(name) for name in adapter.modules})
    assert {*found} == {*wanted}
    for name, delta in wanted.items():
        assert (found[name] - delta).norm() <= 1e-5 * delta.norm(), name


@pytest.mark.parametrize("architecture", BY_NAME)
def test_all_dialects_of_a_model_merge_on_the_same_weights(tmp_path, architecture):
    made = factors(architecture, LEFT_OUT)
    made = {name: made[name] for name in [*made][:: max(1, len(made) // 6)]}
    paths = []
    for dialect in (one for other, one in CASES if other == architecture):
        _, ends, alpha = DIALECTS[dialect]
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        file_of(paths[-1], named_in(dialect, architecture, made), ends, alpha=alpha)
    merged = merge_adapters(paths, "linear")
    component = BY_NAME[architecture].component
    wanted = in_parts({f"{component}.{name}": up @ down for name, (down, up) in made.items()})
    assert {*merged.modules} == {*wanted}
    for name, delta in wanted.items():
        whole = len(paths) * delta
        assert (merged.delta(name) - whole).norm() <= 1e-5 * whole.norm(), name


LEAVE_OUT = r"vace|norm_q|norm_k|norm_added|norm[123]$|scale_shift_table|patch_embedding"
CONVERTERS = {  # converter of diffusers: architecture, dialect, modules that it does not take, or (norm_out) changes
    "kohya_flux": ("Flux.1", "kohya", r"\{to_q,to_k,to_v}$|distilled|embedder|^proj_out|norm_out"),
    "hunyuan_video": ("HunyuanVideo", "ai-toolkit", r"proj_mlp|refiner_blocks.*to_q|^norm_out"),
    "non_diffusers_lumina2": ("Lumina-Image 2", "ai-toolkit", "^x_embed|time_cap|norm_out"),
    "non_diffusers_wan": ("Wan", "ai-toolkit", LEAVE_OUT),
    "musubi_wan": ("Wan", "kohya", f"{LEAVE_OUT}|embed|time|^proj"),
    "non_diffusers_hidream": ("HiDream", "ai-toolkit", "(?!)"),
    "non_diffusers_ltxv": (
        "LTX-Video",
        "ai-toolkit",
        "audio|time_embed|^proj_in|cross_attn|^prompt_adaln|gate_logits",
    ),
    "non_diffusers_ltx2": ("LTX-Video", "ai-toolkit", "(?!)"),
    "non_diffusers_qwen": ("Qwen-Image", "kohya", "(?!)"),
    "non_diffusers_anima": ("Anima", "ai-toolkit", "(?!)"),
    "non_diffusers_flux2": ("Flux.2", "ai-toolkit", "norm_out"),
    "non_diffusers_krea2": ("Krea 2", "ai-toolkit", "(?!)"),
    "kohya_flux2": ("Flux.2", "kohya", "guidance_embedder|_modulation|norm_out"),
    "non_diffusers_z_image": ("Z-Image", "kohya", "all_|embedder"),
}


@pytest.mark.parametrize("converter", CONVERTERS)
def test_names_mean_what_diffusers_converter_makes_of_them(tmp_path, converter):
    utilities = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    convert = getattr(utilities, f"_convert_{converter}_lora_to_diffusers")
    architecture, dialect, leave_out = CONVERTERS[converter]
    if (
        converter == "kohya_flux"
    ):  # the factors of linear1 that it splits are as large as the model's
        leave_out += r"|single_transformer_blocks.*\{attn"
    made = factors(architecture, leave_out)
    _, ends, alpha = DIALECTS[dialect]
    path = tmp_path / "a.safetensors"
    stored = file_of(path, named_in(dialect, architecture, made), ends, alpha=alpha)
    converted = convert({name: values.clone() for name, values in stored.items()})
    theirs = {
        name.removesuffix(".lora_A.weight"): converted[name.replace("lora_A", "lora_B")] @ values
        for name, values in converted.items()
        if name.endswith(".lora_A.weight")
    }
    adapter = load_adapter(path)
    ours = in_parts({name: adapter.delta(name) for name in adapter.modules})
    assert {*ours} == {*theirs}
    assert len(ours) > 5
    for name, delta in theirs.items():
        assert (ours[name] - delta).norm() <= 1e-5 * delta.norm(), name


def test_a_matrix_of_a_single_block_tells_flux_1_from_flux_2(tmp_path):
    for number, (times, module) in enumerate({5: "proj_out", 4: "attn.to_out"}.items()):
        made = {"diffusion_model.single_blocks.0.linear2": (rand(2, 32 * times), rand(32, 2))}
        path = tmp_path / f"{number}.safetensors"
        file_of(path, made)
        assert [*load_adapter(path).modules] == [
            f"transformer.single_transformer_blocks.0.{module}"
        ]


def test_queries_of_the_first_diffusers_are_those_of_a_text_encoder(tmp_path):
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    named = {f"{layer}.{name}": (rand(2, 32), rand(32, 2)) for name in ("to_q", "to_out")}
    tensors = {
        f"{name}_lora.{part}.weight": values
        for name, pair in named.items()
        for part, values in zip(("down", "up"), pair, strict=True)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    for old, new in {"to_q": "q_proj", "to_out": "out_proj"}.items():
        down, up = named[f"{layer}.{old}"]
        assert torch.allclose(adapter.delta(f"{layer}.{new}"), up @ down, atol=1e-5)


def test_xlabs_queries_keys_and_values_meet_those_of_linear1(tmp_path):
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, 32), (224, 2)))
    names = {
        "single_blocks.0.processor.{}_lora": up[:96],
        "double_blocks.0.processor.{}_lora1": up[:96],
    }
    tensors = {}
    for name, rows in names.items():
        tensors[f"{name.format('qkv')}.down.weight"] = down.clone()
        tensors[f"{name.format('qkv')}.up.weight"] = rows.clone()
        tensors[f"{name.format('proj')}.down.weight"] = down.clone()
        tensors[f"{name.format('proj')}.up.weight"] = up[:32].clone()
    save_file(tensors, tmp_path / "xlabs.safetensors")
    file_of(
        tmp_path / "kohya.safetensors", {"lora_unet_single_blocks_0_linear1": (down, up)}, KOHYA
    )
    paths = [tmp_path / "xlabs.safetensors", tmp_path / "kohya.safetensors"]
    merged = merge_adapters(paths, "linear", [1.0, 2.0])
    single, double = (
        "transformer.single_transformer_blocks.0",
        "transformer.transformer_blocks.0.attn",
    )
    wanted = {
        **{f"{single}.attn.to_{q}": 3 * up[32 * i :][:32] @ down for i, q in enumerate("qkv")},
        **{f"{double}.to_{q}": up[32 * i :][:32] @ down for i, q in enumerate("qkv")},
        f"{single}.proj_mlp": 2 * up[96:] @ down,
        f"{single}.proj_out": up[:32] @ down,
        f"{double}.to_out.0": up[:32] @ down,
    }
    found = in_parts({name: merged.delta(name) for name in merged.modules})
    assert {*found} == {*wanted}
    for name, delta in wanted.items():
        assert (found[name] - delta).norm() <= 1e-5 * delta.norm(), name


def test_norms_biases_and_modulations_of_a_distilled_wan(tmp_path):
    """The names of the LoRAs that make Wan fast, and of others that were extracted from whole models."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "self_attn.q.lora_down.weight": (2, 32),
        "self_attn.q.lora_up.weight": (32, 2),
        "self_attn.q.diff_b": (32,),
        "self_attn.norm_q.diff": (32,),
        "cross_attn.norm_k_img.diff": (32,),
        "norm3.diff": (32,),
        "norm3.diff_b": (32,),
        "diff_m": (1, 6, 32),
    }
    tensors = {
        f"diffusion_model.blocks.0.{name}": torch.randn(*shape, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    merged = merge_adapters([tmp_path / "a.safetensors"], "linear", [0.5])
    found = {
        name.removeprefix("transformer.blocks.0."): merged.delta(name) for name in merged.modules
    }
    stored = {name.removeprefix("diffusion_model.blocks.0."): t for name, t in tensors.items()}
    up, down = stored["self_attn.q.lora_up.weight"], stored["self_attn.q.lora_down.weight"]
    wanted = {
        "attn1.to_q": up @ down,
        "attn1.to_q.bias": stored["self_attn.q.diff_b"],
        "attn1.norm_q": stored["self_attn.norm_q.diff"],
        "attn2.norm_added_k": stored["cross_attn.norm_k_img.diff"],
        "norm2": stored["norm3.diff"],
        "norm2.bias": stored["norm3.diff_b"],
        "scale_shift_table": stored["diff_m"],
    }
    assert {*found} == {*wanted}
    for name, delta in wanted.items():
        assert found[name].shape == delta.shape, name
        assert (found[name] - 0.5 * delta).norm() <= 1e-5 * delta.norm(), name
    merged.save_pretrained(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert {*file.keys()} == {
            *(name for name in tensors if not name.endswith("diff_m") and "lora" not in name),
            "diffusion_model.blocks.0.modulation.diff",
            *(f"diffusion_model.blocks.0.self_attn.q.{end}.weight" for end in factors_of(file)),
        }
    again = load_adapter(tmp_path / "out.safetensors")
    assert {*again.modules} == {*merged.modules}
    for name in merged.modules:
        assert torch.allclose(again.delta(name), merged.delta(name), atol=1e-6), name
    with pytest.raises(UnsupportedError, match="diffusers' files hold LoRAs of matrices"):
        merge_adapters([tmp_path / "a.safetensors"], "linear", format="diffusers")


def factors_of(file):
    return sorted({name.split(".")[-2] for name in file.keys() if "lora" in name})  # noqa: SIM118
