"""What the files hold decides what is tied, not the architecture or its configuration."""

import peft
import pytest
import torch
import transformers as hf
from helpers import lora
from safetensors.torch import load_file, save_file

from pcb_peft import extract_adapter, load_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def qwen(**options):
    config = hf.Qwen2Config(**SIZES, tie_word_embeddings=True, **options)
    return hf.Qwen2ForCausalLM(config), {"input_ids": torch.tensor([[1, 5, 9]])}


def t5():
    config = hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    inputs = {"input_ids": torch.tensor([[1, 5, 9]]), "decoder_input_ids": torch.tensor([[0, 4]])}
    return hf.T5ForConditionalGeneration(config), inputs


def with_tensor(directory, name, values):
    path = directory / "model.safetensors"
    save_file({**load_file(path), name: values.clone()}, path, metadata={"format": "pt"})


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture
def two_matrices(request, tmp_path):
    """A model whose configuration ties both ends, and whose files hold another matrix for each."""
    model, inputs = request.param()
    base = tmp_path / "base"
    model.save_pretrained(base)
    with_tensor(base, "lm_head.weight", torch.randn(32, 16, generator=torch.Generator()) / 3)
    return base, type(model), inputs


@pytest.mark.slow
@pytest.mark.parametrize("two_matrices", [qwen, t5], indirect=True)
@pytest.mark.parametrize("policy", ["refuse", "untie", "both"])
def test_two_matrices_are_two_weights_whatever_the_flag_says(
    two_matrices, policy, workshop, tmp_path
):
    base, model_class, inputs = two_matrices
    model = model_class.from_pretrained(base)
    config = lora("lm_head", "q_proj" if model_class is hf.Qwen2ForCausalLM else "q")
    adapter = workshop.adapter(model, config, base=str(base))
    wanted = logits(
        peft.PeftModel.from_pretrained(model_class.from_pretrained(base), adapter), inputs
    )
    load_adapter(adapter).fold(base, tmp_path / "out", tied=policy)
    found = logits(model_class.from_pretrained(tmp_path / "out"), inputs)
    workshop.assert_close(found, wanted, 1e-5)
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "out"))
    embeddings = (
        "model.embed_tokens.weight" if "model.embed_tokens.weight" in before else "shared.weight"
    )
    assert torch.equal(after[embeddings], before[embeddings])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_untying_equal_copies_changes_the_end_that_was_trained(workshop, tmp_path):
    model, inputs = qwen()
    base = tmp_path / "base"
    model.save_pretrained(base)
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    with_tensor(base, "lm_head.weight", embeddings)
    adapter = workshop.adapter(model, lora("lm_head", "q_proj"), base=str(base))
    wanted = logits(
        peft.PeftModel.from_pretrained(type(model).from_pretrained(base), adapter), inputs
    )
    load_adapter(adapter).fold(base, tmp_path / "out", tied="untie")
    found = type(model).from_pretrained(tmp_path / "out")
    workshop.assert_close(logits(found, inputs), wanted, 1e-5)
    assert torch.equal(found.model.embed_tokens.weight, embeddings)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_copy_of_the_head_is_nothing_to_extract(workshop, tmp_path, rank):
    model, inputs = qwen()
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model.save_pretrained(base)
    adapted = workshop.peft_model(model, lora("q_proj", r=2)).merge_and_unload()
    adapted.save_pretrained(tuned)
    with_tensor(
        tuned, "lm_head.weight", load_file(tuned / "model.safetensors")["model.embed_tokens.weight"]
    )
    extracted = extract_adapter(tuned, base, rank)
    assert list(extracted.modules) == ["model.layers.0.self_attn.q_proj"]
    assert not extracted.head
    extracted.fold(base, tmp_path / "out")
    found = logits(type(model).from_pretrained(tmp_path / "out"), inputs)
    workshop.assert_close(found, logits(adapted, inputs), 1e-5)


@pytest.mark.slow
def test_embeddings_that_only_one_of_two_tied_models_has_a_copy_of(workshop, tmp_path):
    model, _ = qwen()
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model.save_pretrained(base)
    with_tensor(
        base, "lm_head.weight", load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    )
    workshop.peft_model(model, lora("q_proj")).merge_and_unload().save_pretrained(tuned)
    assert "lm_head.weight" not in load_file(tuned / "model.safetensors")
    assert list(extract_adapter(tuned, base).modules) == ["model.layers.0.self_attn.q_proj"]
