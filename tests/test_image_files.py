"""Files of image LoRAs: any name, in a directory, in a repository, pickled, in any dtype; and what is refused."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import save_file

from pcb_peft import AdapterError, load_adapter, merge_adapters

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CANONICAL = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
COMMIT = "1" * 40


def lora(rank=2, alpha=None, dtype=torch.float32, name=NAME, seed=0):
    generator = torch.Generator().manual_seed(seed + rank)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, 8, generator=generator).to(dtype),
        f"{name}.lora_up.weight": torch.randn(6, rank, generator=generator).to(dtype),
    }
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(float(alpha))}


def product(tensors, name=NAME):
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    scale = float(tensors.get(f"{name}.alpha", len(down))) / len(down)
    return up.double() @ down.double() * scale


def assert_near(actual, expected):
    assert (actual.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["my_style.pt", "my_style.ckpt", "my_style.sft"])
def test_pickled_files_and_other_endings(tmp_path, name):
    path, tensors = tmp_path / name, lora(alpha=1)
    if name.endswith("sft"):
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    assert_near(load_adapter(path).delta(CANONICAL), product(tensors))


def test_the_pickled_file_of_the_first_diffusers_is_found_in_its_directory(tmp_path):
    key = f"unet.{CANONICAL.removeprefix('unet.').removesuffix('.to_q')}.processor.to_q_lora"
    tensors = lora(name="x")
    torch.save(
        {
            f"{key}.down.weight": tensors["x.lora_down.weight"],
            f"{key}.up.weight": tensors["x.lora_up.weight"],
        },
        tmp_path / "pytorch_lora_weights.bin",
    )
    assert_near(load_adapter(tmp_path).delta(CANONICAL), product(tensors, "x"))


def test_a_textual_inversion_is_refused_by_its_cause(tmp_path):
    save_file({"clip_l": torch.ones(1, 8)}, tmp_path / "word.safetensors")
    with pytest.raises(AdapterError, match="textual inversion"):
        load_adapter(tmp_path / "word.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(1, 8)}}, tmp_path / "word.pt")
    with pytest.raises(AdapterError, match="named tensors and nothing else"):
        load_adapter(tmp_path / "word.pt")


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "style.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterError, match=r"style\.gguf is no file of a LoRA"):
        load_adapter(tmp_path / "style.gguf")


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtypes", [(FP8, torch.float32), (torch.float16, torch.bfloat16)])
def test_mixed_dtypes_ranks_and_alphas_add_up(tmp_path, dtypes):
    other = NAME.replace("to_q", "to_k")
    files = [
        lora(2, None, dtypes[0]) | lora(4, 1, dtypes[1], other),
        lora(3, 6, dtypes[1], seed=5) | lora(1, 0, dtypes[0], other),
    ]
    wanted = dict.fromkeys((NAME, other), 0)
    for number, (tensors, weight) in enumerate(zip(files, (0.7, -0.4), strict=True)):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        for name in wanted:
            floats = {key: values.float() for key, values in tensors.items()}
            wanted[name] = wanted[name] + weight * product(floats, name)
    merged = merge_adapters(
        [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], "linear", [0.7, -0.4]
    )
    for name, delta in wanted.items():
        assert_near(merged.delta(CANONICAL.replace("to_q", name[-4:])), delta)


def put(cache, repository, files):
    """Lay files into the cache as huggingface_hub does: blobs, and links to them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for directory in (snapshot, root / "blobs", root / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, tensors in files.items():
        blob = root / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        save_file(tensors, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))


def test_any_file_name_in_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put(tmp_path, "artist/one", {"my_style.safetensors": lora()})
    put(tmp_path, "artist/two", {"a.safetensors": lora(), "b.safetensors": lora(3)})
    assert_near(load_adapter("artist/one").delta(CANONICAL), product(lora()))
    with pytest.raises(AdapterError, match=r"several LoRAs.* such as artist/two/a\.safetensors"):
        load_adapter("artist/two")
    assert_near(load_adapter("artist/two/b.safetensors").delta(CANONICAL), product(lora(3)))
