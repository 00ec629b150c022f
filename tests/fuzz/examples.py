"""Examples to start from: adapters of every kind that PEFT saves, and the base models that they are for."""

import functools
import shutil
import warnings
from pathlib import Path

import models
import tokenizers
import transformers
from conftest import Workshop
from helpers import lora
from test_every_adapter import CASES

from fuzz.folders import Files, files_in, scratch


@functools.cache
def workshop() -> Workshop:
    """The workshop of the tests, in a directory of its own."""
    place = scratch()
    Workshop.store = place / "store"
    return Workshop(place / "work")


@functools.cache
def base(kind: str) -> Path:
    """A base model's directory; not to be changed."""
    return workshop().base(kind)


@functools.cache
def base_in_shards() -> Path:
    """The directory of a base model in several files; not to be changed."""
    return models.save(models.original("llama"), workshop().directory / "shards", shard="6KB")


@functools.cache
def adapter_files(name: str, seed: int = 1) -> Files:
    """The files of the adapter of a case of `CASES`."""
    return files_in(adapter(name, seed))


@functools.cache
def adapter(name: str, seed: int = 1) -> Path:
    """The directory of the adapter of a case of `CASES`; not to be changed."""
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return workshop().adapter(
            case.kind, case.config, f"{sorted(CASES).index(name)}-{seed}", seed=seed
        )


@functools.cache
def llama_adapter(seed: int = 1) -> Path:
    """The directory of a LoRA of a tiny Llama."""
    config = lora("q_proj", "v_proj", r=2, task_type="CAUSAL_LM")
    return workshop().adapter("llama", config, f"llama{seed}", seed=seed)


@functools.cache
def bert_adapter(seed: int = 1) -> Path:
    """The directory of a LoRA of a tiny classifier, with its head."""
    config = lora("query", r=2, task_type="SEQ_CLS", modules_to_save=["classifier"])
    return workshop().adapter("bert", config, f"h{seed}", seed=seed)


@functools.cache
def with_tokenizer(kind: str) -> Path:
    """The directory of a base model with a tokenizer of some words."""
    words = ["[PAD]", "[UNK]", "a", "cat", "dog", "sat", "ran", "the"]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]"
    )
    made.save_pretrained(base(kind))
    return base(kind)


def close() -> None:
    """Delete all examples."""
    if workshop.cache_info().currsize:
        shutil.rmtree(workshop().directory.parent, ignore_errors=True)
        for made in (workshop, base, base_in_shards, adapter_files, adapter):
            made.cache_clear()
        for made in (llama_adapter, bert_adapter, with_tokenizer):
            made.cache_clear()
