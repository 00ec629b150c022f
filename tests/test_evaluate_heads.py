"""Classifiers whose heads have several layers, in whatever order: they answer as PEFT's own model does."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pcb_peft import (
    MismatchError,
    collect_statistics,
    distill_merge,
    evaluate,
    load_merged,
    merge_adapters,
)

LETTERS = ["<pad>", "</s>", *"abcdefgh"]
COMMON = {"vocab_size": len(LETTERS), "pad_token_id": 0}
BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
GEMMA = {
    "vocab_size": len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": None,
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SHAPES = {
    transformers.DistilBertConfig: {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
    transformers.ModernBertConfig: BERT,
    transformers.DebertaV2Config: BERT,
    transformers.XLNetConfig: {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    transformers.BartConfig: BART | {"eos_token_id": 1, "decoder_start_token_id": 1},
    transformers.Gemma3Config: {"text_config": GEMMA, "vision_config": SIGLIP},
}
CASES = [
    (transformers.DistilBertConfig, ["q_lin"], ["pre_classifier", "classifier"]),
    (transformers.ModernBertConfig, ["Wqkv"], ["head", "classifier"]),
    (transformers.DebertaV2Config, ["query_proj"], ["pooler", "classifier"]),
    (transformers.XLNetConfig, ["layer_1"], ["sequence_summary", "logits_proj"]),
    (transformers.BartConfig, ["q_proj"], ["classification_head"]),
    (transformers.Gemma3Config, r".*language_model.*q_proj", ["score"]),
]
LABELS = [["x", "y", "z"], ["u", "v", "w", "x", "y"]]


def letters() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(LETTERS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>"
    )


def save_base(kind, directory: Path) -> None:
    torch.manual_seed(0)
    named = {} if kind is transformers.Gemma3Config else COMMON
    transformers.AutoModel.from_config(kind(**named | SHAPES[kind])).save_pretrained(directory)
    letters().save_pretrained(directory)


def trained(base: Path, count: int, targets, saved, seed: int) -> peft.PeftModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=count)
    options = {"target_modules": targets, "modules_to_save": saved, "init_lora_weights": False}
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, **options)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize(("kind", "targets", "saved"), CASES)
def test_each_task_is_answered_as_by_peft(tmp_path: Path, kind, targets, saved):
    base, words = tmp_path / "base", letters()
    save_base(kind, base)
    adapters, data, expected = [], [], []
    for number, labels in enumerate(LABELS):
        adapted = trained(base, len(labels), targets, saved, number)
        adapted.save_pretrained(tmp_path / f"task{number}")
        (tmp_path / f"task{number}" / "task.json").write_text(json.dumps({"labels": labels}))
        texts = [" ".join("abcdefgh"[(i * j + number) % 8] for j in range(5)) for i in range(12)]
        with torch.no_grad():
            scores = [adapted(**words(text, return_tensors="pt")).logits[0] for text in texts]
        stated = [labels[i % len(labels)] for i in range(len(texts))]
        answers = [labels[int(score.argmax())] for score in scores]
        adapters.append(tmp_path / f"task{number}")
        expected.append([float(one == other) for one, other in zip(answers, stated, strict=True)])
        data.append([{"text": x, "label": y} for x, y in zip(texts, stated, strict=True)])
    merge_adapters(adapters, "linear", [1, 0]).save_pretrained(tmp_path / "merged")
    found = evaluate(tmp_path / "merged", adapters, base, data, cache=False)
    for number, outcomes in enumerate(expected):
        assert sum(outcomes)
        assert list(found[f"task{number}"].adapter.outcomes) == outcomes
    assert found["task0"].merged.outcomes == found["task0"].adapter.outcomes


def test_a_layer_that_nobody_has_saved_is_named(tmp_path: Path):
    """Loaded twice by transformers and PEFT, such a classifier gives two answers."""
    base = tmp_path / "base"
    save_base(transformers.DebertaV2Config, base)
    adapters = [tmp_path / "one", tmp_path / "two"]
    for seed, adapter in enumerate(adapters):
        trained(base, 3, ["query_proj"], ["classifier"], seed).save_pretrained(adapter)
    merge_adapters(adapters, "linear").save_pretrained(tmp_path / "merged")
    rows = [{"text": "a b", "label": 0}]
    message = r"pooler\.dense\.weight .* are neither in the base model nor in the adapter"
    with pytest.raises(MismatchError, match=message):
        evaluate(tmp_path / "merged", adapters, base, [rows, rows], cache=False)
    with pytest.raises(MismatchError, match=message):
        load_merged(base, tmp_path / "merged", head="two")
    with pytest.raises(MismatchError, match=message):
        collect_statistics(adapters[0], base, [{"text": "a b"}])
    with pytest.raises(MismatchError, match=message):
        distill_merge(tmp_path / "merged", adapters, [["a b"], ["c"]], base, steps=1)
