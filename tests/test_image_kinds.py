"""Kinds of change in files of image models: LoHa, LoKr, CP decompositions, DoRA and whole differences.

Expected values are the formulas of LyCORIS (Yeh et al. 2024, arXiv:2309.14859), written here in float64.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcb_peft import (
    AdapterError,
    BaseModelError,
    MismatchError,
    UnsupportedError,
    load_adapter,
    merge_adapters,
)

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
CANONICAL = {
    LINEAR: "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    CONV: "unet.mid_block.resnets.0.conv1",
}
SHAPES = {LINEAR: (12, 8), CONV: (12, 8, 3, 3)}
ALPHA = 6.0


def rand(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loha(seed, shape):
    width = torch.Size(shape[1:]).numel()
    names = {"w1_a": (shape[0], 3), "w1_b": (3, width), "w2_a": (shape[0], 3), "w2_b": (3, width)}
    return {f"hada_{n}": rand(seed + i, *s) for i, (n, s) in enumerate(names.items())}


def loha_core(seed, shape):
    kernel = shape[2:]
    names = {"t1": (3, 3, *kernel), "w1_a": (3, shape[0]), "w1_b": (3, shape[1])}
    names |= {"t2": (3, 3, *kernel), "w2_a": (3, shape[0]), "w2_b": (3, shape[1])}
    return {f"hada_{n}": rand(seed + i, *s) for i, (n, s) in enumerate(names.items())}


def lokr(seed, shape):
    width = torch.Size(shape[1:]).numel() // 2
    names = {"w1": (4, 2), "w2_a": (shape[0] // 4, 3), "w2_b": (3, width)}
    return {f"lokr_{n}": rand(seed + i, *s) for i, (n, s) in enumerate(names.items())}


def lokr_both(seed, shape):
    names = {"w1_a": (4, 2), "w1_b": (2, 2), "w2_a": (shape[0] // 4, 2), "w2_b": (2, shape[1] // 2)}
    return {f"lokr_{n}": rand(seed + i, *s) for i, (n, s) in enumerate(names.items())}


def lokr_whole(seed, shape):
    second = (shape[0] // 4, shape[1] // 2, *shape[2:])
    return {"lokr_w1": rand(seed, 4, 2), "lokr_w2": rand(seed + 1, *second)}


def lokr_core(seed, shape):
    names = {"w1": (4, 2), "t2": (3, 3, *shape[2:]), "w2_a": (3, shape[0] // 4)}
    names |= {"w2_b": (3, shape[1] // 2)}
    return {f"lokr_{n}": rand(seed + i, *s) for i, (n, s) in enumerate(names.items())}


def lora(seed, shape):
    ones = [1] * len(shape[2:])
    return {
        "lora_down.weight": rand(seed, 3, *shape[1:]),
        "lora_up.weight": rand(seed + 1, shape[0], 3, *ones),
    }


def lora_core(seed, shape):
    ones = [1] * len(shape[2:])
    return {
        "lora_down.weight": rand(seed, 3, shape[1], *ones),
        "lora_mid.weight": rand(seed + 1, 3, 3, *shape[2:]),
        "lora_up.weight": rand(seed + 2, shape[0], 3, *ones),
    }


def difference(seed, shape):
    return {"diff": rand(seed, *shape)}


KINDS = {
    "LoHa": (loha, (LINEAR, CONV)),
    "LoHa with cores": (loha_core, (CONV,)),
    "LoKr": (lokr, (LINEAR, CONV)),
    "LoKr of four factors": (lokr_both, (LINEAR,)),
    "LoKr, both whole": (lokr_whole, (LINEAR, CONV)),
    "LoKr with a core": (lokr_core, (CONV,)),
    "LoRA": (lora, (LINEAR, CONV)),
    "LoCon with lora_mid": (lora_core, (CONV,)),
    "difference": (difference, (LINEAR, CONV)),
}
CASES = [(kind, module) for kind, (_, modules) in KINDS.items() for module in modules]


def tucker(core, left, right):
    return torch.einsum("ijkl,io,jn->onkl", core, left, right)


def formula(tensors, shape):
    """ΔW in float64, and the rank that alpha is divided by; a rank of None: alpha counts nothing."""
    t = {name: values.double() for name, values in tensors.items()}
    rank, delta = None, None
    if "diff" in t:
        delta = t["diff"]
    elif "lora_mid.weight" in t:
        up, down = t["lora_up.weight"][..., 0, 0], t["lora_down.weight"][..., 0, 0]
        rank, delta = len(down), torch.einsum("or,rskl,si->oikl", up, t["lora_mid.weight"], down)
    elif "lora_up.weight" in t:
        up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1)
        rank, delta = len(down), up @ down
    elif "hada_t1" in t:
        first, second = (
            tucker(t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in "12"
        )
        rank, delta = len(t["hada_t1"]), first * second
    elif "hada_w1_a" in t:
        first, second = (t[f"hada_w{n}_a"] @ t[f"hada_w{n}_b"] for n in "12")
        rank, delta = len(t["hada_w1_b"]), first * second
    else:
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if "lokr_w2" in t:
            w2 = t["lokr_w2"]
        elif "lokr_t2" in t:
            rank, w2 = len(t["lokr_t2"]), tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        else:
            rank, w2 = len(t["lokr_w2_b"]), t["lokr_w2_a"] @ t["lokr_w2_b"]
        w2 = w2.reshape(shape[0] // 4, shape[1] // 2, -1)
        delta = torch.einsum("ab,cdk->acbdk", w1, w2)
    return delta.reshape(shape), rank


def file_of(path, module, tensors, **beside):
    named = {
        f"{module}.{name}": values.contiguous() for name, values in {**tensors, **beside}.items()
    }
    save_file(named, path)
    return path


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize(("kind", "module"), CASES)
def test_two_of_a_kind_merge_to_the_weighted_sum_of_their_formulas(tmp_path, kind, module, prefix):
    make, paths, wanted = KINDS[kind][0], [], 0
    for seed, weight in ((1, 0.7), (20, -0.4)):
        tensors = make(seed, SHAPES[module])
        delta, rank = formula(tensors, SHAPES[module])
        alpha = {} if kind == "difference" else {"alpha": torch.tensor(ALPHA)}
        wanted = wanted + weight * delta * (1 if rank is None else ALPHA / rank)
        stored = module.replace("lora_unet_", prefix)
        paths.append(file_of(tmp_path / f"{seed}.safetensors", stored, tensors, **alpha))
    merged = merge_adapters(paths, "linear", [0.7, -0.4])
    assert list(merged.modules) == [CANONICAL[module]]
    assert_near(merged.delta(CANONICAL[module]), wanted)
    merged.save_pretrained(tmp_path / "out")  # as a LoRA, in the shape that the layer has
    assert_near(load_adapter(tmp_path / "out").delta(CANONICAL[module]), wanted)


def test_names_of_comfyui_and_files_without_an_alpha(tmp_path):
    tensors = loha(1, SHAPES[LINEAR])
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    adapter = load_adapter(file_of(tmp_path / "a.safetensors", name, tensors))
    assert_near(adapter.delta(CANONICAL[LINEAR]), formula(tensors, SHAPES[LINEAR])[0])


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline of diffusers on disk, and W of both modules."""
    weights = {module: rand(99, *shape) for module, shape in SHAPES.items()}
    folder = tmp_path / "pipeline" / "unet"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    tensors = {
        f"{CANONICAL[module].removeprefix('unet.')}.weight": w for module, w in weights.items()
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder.parent, weights


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "LoCon with lora_mid"])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_a_dora_of_any_kind_rescales_w(tmp_path, pipeline, kind, module, axis):
    if module not in KINDS[kind][1]:
        pytest.skip("of convolutions only")
    directory, weights = pipeline
    shape, weight = SHAPES[module], weights[module].double()
    tensors, ones = KINDS[kind][0](1, shape), [1] * len(shape[2:])
    stored = (shape[0], 1, *ones) if axis == "outputs" else (1, shape[1], *ones)
    magnitude = rand(50, *stored).abs()
    delta, rank = formula(tensors, shape)
    moved = weight + delta * ALPHA / rank
    others = [place for place in range(len(shape)) if place != (axis == "inputs")]
    norms = moved.square().sum(others, keepdim=True).sqrt()
    wanted = moved * magnitude.double() / norms - weight
    path = tmp_path / "a.safetensors"
    file_of(path, module, tensors, alpha=torch.tensor(ALPHA), dora_scale=magnitude)
    for base in (directory, directory / "unet"):
        merged = merge_adapters([path], "linear", base_model=base)
        assert_near(merged.delta(CANONICAL[module]), wanted)
    with pytest.raises(BaseModelError, match=r"DoRA rescales W.*give base_model"):
        merge_adapters([path], "linear")


def test_a_dora_of_a_fused_matrix_is_read_beside_its_parts(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    parts = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    weights = {f"{part}.weight": rand(seed, 8, 8) for seed, part in enumerate(parts)}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    weight = torch.cat([weights[f"{part}.weight"] for part in parts]).double()
    tensors, magnitude = lora(5, (24, 8)), rand(9, 24, 1).abs()
    path = tmp_path / "a.safetensors"
    file_of(path, "lora_unet_double_blocks_0_img_attn_qkv", tensors, dora_scale=magnitude)
    moved = weight + formula(tensors, (24, 8))[0]
    wanted = moved * magnitude.double() / moved.norm(dim=1, keepdim=True) - weight
    (delta,) = load_adapter(path, base_model=folder).modules.values()
    assert_near(delta.matrix(), wanted)


def ia3(weight, *, on_input):
    axis = 1 if on_input else 0
    factors = rand(7, weight.shape[axis])
    sizes = [-1 if place == axis else 1 for place in range(weight.ndim)]
    tensors = {"weight": factors, "on_input": torch.tensor(int(on_input))}
    return tensors, weight * factors.double().view(sizes)


def glora(weight):
    (out, inputs, *kernel), ones = weight.shape, [1] * (weight.ndim - 2)
    shapes = {"a1": (inputs, 2, *ones), "a2": (2, inputs, *ones)}
    shapes |= {"b1": (out, 2, *ones), "b2": (2, inputs, *kernel)}
    tensors = {
        f"{name}.weight": rand(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())
    }
    a1, a2, b1, b2 = (values.double().flatten(1) for values in tensors.values())
    delta = (b1 @ b2).view_as(weight).clone()
    for place in torch.cartesian_prod(*(torch.arange(size) for size in (1, 1, *kernel)))[:, 2:]:
        at = (slice(None), slice(None), *place)
        delta[at] += weight[at] @ a1 @ a2
    return tensors | {"alpha": torch.tensor(3.0)}, delta * 3 / 2


def oft(weight, *, limit=0.0, rescaled=False):
    blocks, out = rand(3, 3, 4, 4) / 4, len(weight)
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(limit)}
    skew = blocks.double() - blocks.double().transpose(1, 2)
    if limit:
        assert skew.norm() > limit * out
        skew = skew * limit * out / skew.norm()
    moved, one = [], torch.eye(4, dtype=torch.float64)
    for q, rows in zip(skew, weight.split(4), strict=True):
        rotation = torch.linalg.solve(one - q, one + q)  # the factors commute
        moved.append((rotation.T @ rows.flatten(1)).view_as(rows))
    if not rescaled:
        return tensors, torch.cat(moved) - weight
    scale = rand(4, out, *[1] * (weight.ndim - 1))
    return tensors | {"rescale": scale}, torch.cat(moved) * scale.double() - weight


MULTIPLYING = {
    "(IA)³ of outputs": functools.partial(ia3, on_input=False),
    "(IA)³ of inputs": functools.partial(ia3, on_input=True),
    "GLoRA": glora,
    "OFT": oft,
    "OFT with a limit": functools.partial(oft, limit=0.01),
    "OFT that rescales": functools.partial(oft, rescaled=True),
}


@pytest.mark.parametrize("kind", MULTIPLYING)
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_changes_that_multiply_w_are_read_beside_it(tmp_path, pipeline, kind, module):
    directory, weights = pipeline
    tensors, wanted = MULTIPLYING[kind](weights[module].double())
    path = file_of(tmp_path / "a.safetensors", module, tensors)
    merged = merge_adapters([path], "linear", [0.5], base_model=directory)
    assert_near(merged.delta(CANONICAL[module]), 0.5 * wanted)
    with pytest.raises(BaseModelError, match=r"multiplies W: give base_model"):
        merge_adapters([path], "linear")


REFUSED = {  # tensors beside those of a LoRA, and words of the message
    "two kinds": (loha(1, SHAPES[LINEAR]), "changes of several kinds"),
    "a difference with a LoRA": ({"diff": rand(1, 12, 8)}, "changes of several kinds"),
    "a core that does not fit": ({"lora_mid.weight": rand(1, 2, 3, 1, 1)}, "do not fit"),
    "a scale of another size": ({"dora_scale": rand(1, 5, 1)}, r"has shape \(5, 1\)"),
    "an OFT with a LoRA": ({"oft_blocks": rand(1, 2, 6, 6)}, "OFT with A, B, which is not read"),
    "a new weight": ({"set_weight": rand(1, 12, 8)}, "a new weight, not the change of one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_its_cause(tmp_path, case):
    beside, words = REFUSED[case]
    path = file_of(tmp_path / "a.safetensors", LINEAR, lora(3, SHAPES[LINEAR]), **beside)
    with pytest.raises((AdapterError, UnsupportedError), match=words):
        load_adapter(path)


def with_embedding(path, seed, word="cat"):
    tensors = {f"{LINEAR}.{name}": values for name, values in lora(seed, SHAPES[LINEAR]).items()}
    embedding = {f"bundle_emb.{word}.clip_l": rand(seed + 5, 2, 8)}
    save_file(tensors | embedding, path)
    return embedding


def test_embeddings_of_new_words_are_carried_along(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    wanted = with_embedding(paths[0], 1) | with_embedding(paths[1], 2, "dog")
    merge_adapters(paths, "linear", [0.5, 2]).save_pretrained(tmp_path / "out.safetensors")
    stored = load_file(tmp_path / "out.safetensors")
    for name, values in wanted.items():
        assert torch.equal(stored[name], values)
    assert any(name.endswith("lora_up.weight") for name in stored)
    with pytest.raises(UnsupportedError, match=r"embeddings of cat, dog .*format='kohya'"):
        merge_adapters(paths, "linear", format="diffusers")


def test_embeddings_of_one_word_that_differ_are_refused_or_chosen(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    wanted = with_embedding(paths[0], 1)
    with_embedding(paths[1], 2)
    with pytest.raises(MismatchError, match=r"bundle_emb\.cat\.clip_l.*heads='first'"):
        merge_adapters(paths, "linear")
    merged = merge_adapters(paths, "linear", heads="first")
    merged.save_pretrained(tmp_path / "out.safetensors")
    (name,) = wanted
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], wanted[name])


def test_embeddings_have_no_place_in_a_checkpoint_in_one_file(tmp_path):
    with_embedding(tmp_path / "a.safetensors", 1)
    module = "model.diffusion_model.middle_block.1"
    weight = {f"{module}.transformer_blocks.0.attn1.to_q.weight": rand(0, *SHAPES[LINEAR])}
    save_file(weight, tmp_path / "base.safetensors")
    with pytest.raises(UnsupportedError, match=r"bundle_emb\.cat, for which a model in one file"):
        load_adapter(tmp_path / "a.safetensors").fold(
            tmp_path / "base.safetensors", tmp_path / "out.safetensors"
        )
