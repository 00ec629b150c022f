"""Answers that are read after their prompt are as likely as in whole texts."""

import functools
from collections.abc import Callable

import pytest
import torch
import transformers
from models import gpt2, llama
from torch import nn

from pcb_peft.data.batches import IGNORED
from pcb_peft.evaluation.choices import shared_likelihoods
from pcb_peft.evaluation.measures import outcomes_of
from pcb_peft.evaluation.runner import Encoded, Runner
from pcb_peft.evaluation.texts import TextTask
from pcb_peft.runtime.progress import tracker

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA = {**SIZES, "head_dim": 4, "sliding_window": 4}
GEMMA_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


def mistral() -> nn.Module:
    config = transformers.MistralConfig(**SIZES, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def gemma() -> nn.Module:
    config = transformers.Gemma3TextConfig(**GEMMA, **GEMMA_LAYERS)
    return transformers.Gemma3ForCausalLM(config)


def bloom() -> nn.Module:
    """It has no position ids: ALiBi counts what is not masked."""
    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2)
    return transformers.BloomForCausalLM(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24
    )
    return transformers.OPTForCausalLM(config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


def runner(batch_size: int) -> Runner:
    """A runner of tokens, which needs no words."""
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    return Runner(tokenizer, torch.device("cpu"), batch_size, 64, tracker(False))


def answered(prompt: list[int], answer: list[int], start: int | None = None) -> Encoded:
    tokens = prompt + answer
    start = len(prompt) if start is None else start
    labels = [IGNORED] * start + tokens[start:]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def wanted(model: nn.Module, text: Encoded) -> tuple[float, int]:
    """By the model's own loss, of the whole text alone."""
    labels = torch.tensor([text["labels"]])
    loss = model(input_ids=torch.tensor([text["input_ids"]]), labels=labels).loss
    count = int((labels[:, 1:] != IGNORED).sum())
    return -float(loss) * count, count


TEXTS = [
    [answered([3, 4, 5, 6, 7, 8, 9], [10, 11]), answered([3, 4, 5, 6, 7, 8, 9], [12])],
    [answered([3, 5], [10, 11, 12, 13]), answered([3, 5], [10, 9]), answered([3, 5], [8])],
    [answered([6, 5, 4, 3], [9], start=3), answered([6, 5, 4, 8], [9], start=4)],  # "…3" is "…8"
]


@pytest.mark.parametrize(
    "build", [llama, functools.partial(gpt2, n_positions=32), mistral, gemma, bloom, opt]
)
@pytest.mark.parametrize("batch_size", [1, 8])
@torch.inference_mode()
def test_answers_are_as_likely_as_in_whole_texts(build: Callable[[], nn.Module], batch_size: int):
    torch.manual_seed(0)
    model = build().eval()
    nn.init.normal_(model.get_input_embeddings().weight)
    found = shared_likelihoods(runner(batch_size), model, "texts", TEXTS)
    assert found is not None
    for scored, answers in zip(found, TEXTS, strict=True):
        for (total, count), (other, tokens) in zip(
            scored, [wanted(model, answer) for answer in answers], strict=True
        ):
            assert count == tokens
            assert total == pytest.approx(other, abs=2e-4)


@torch.inference_mode()
def test_answers_of_one_token_need_no_second_look():
    model, calls = llama().eval(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    texts = [[answered([3, 4], [5]), answered([3, 4], [6])], [answered([3], [5])]]
    assert shared_likelihoods(runner(8), model, "texts", texts)
    assert len(calls) == 6  # the first five ask what the model keeps, and whether it reads alike


@torch.inference_mode()
def test_prompts_that_cannot_be_read_once():
    other = [[answered([3, 4], [5]), answered([4, 4], [5])]]
    assert shared_likelihoods(runner(8), llama().eval(), "texts", other) is None
    state = shared_likelihoods(runner(8), mamba().eval(), "texts", TEXTS)
    assert state is None


def cpm_ant() -> nn.Module:
    """It takes no second look at answers: it adds a prompt of its own to all that it reads."""
    config = transformers.CpmAntConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, dim_head=8
    )
    config.dim_ff = 24
    return transformers.CpmAntForCausalLM(config)


def xlm_roberta_xl() -> nn.Module:
    """It counts positions from 2."""
    sizes = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
    config = transformers.XLMRobertaXLConfig(**sizes, max_position_embeddings=64, is_decoder=True)
    return transformers.XLMRobertaXLForCausalLM(config)


@pytest.mark.parametrize("build", [cpm_ant, xlm_roberta_xl])
@torch.inference_mode()
def test_a_model_that_reads_in_a_way_of_its_own_reads_whole_texts(build: Callable[[], nn.Module]):
    model = build().eval()
    assert shared_likelihoods(runner(8), model, "texts", TEXTS) is None


@torch.inference_mode()
def test_a_model_that_sees_padding_reads_one_text_at_a_time():
    model = cpm_ant().eval()
    letters = {letter: place for place, letter in enumerate("_abcdefgh")}
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    tokenizer.__call__ = lambda _, text: {"input_ids": [letters[one] for one in text.split()]}
    rows = tuple({"text": text} for text in ("a b c d", "h a g b f c e d", "c a f e"))
    task = TextTask(name="letters", rows=rows, measure="loss")
    found = outcomes_of(
        Runner(tokenizer(), torch.device("cpu"), 8, 64, tracker(False)), model, task
    )
    for loss, row in zip(found, rows, strict=True):
        tokens = torch.tensor([tokenizer()(row["text"])["input_ids"]])
        logits = model(input_ids=tokens).logits[0, :-1]
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, tokens[0, 1:])))
