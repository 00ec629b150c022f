"""Tiny models: two that are no model of transformers, and some that are."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 10, bias=False)
        self.mix = nn.Linear(10, 10)


class Mlp(nn.Module):
    """No model of transformers; its first layer has the last name of others."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(10, 3)


class Odd(nn.Module):
    """Layers that are not linear, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.line = nn.Conv1d(3, 4, 3)
        self.image = nn.Conv2d(3, 4, 2)
        self.point = nn.Conv2d(3, 4, 1)
        self.volume = nn.Conv3d(2, 3, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(6)
        self.inner = nn.Module()
        self.inner.experts = nn.Parameter(torch.ones(3, 6, 5))
        self.inner.others = nn.Parameter(torch.ones(3, 4))
        self.linear = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 9)
        self.deep = nn.Conv1d(64, 16, 2)


def llama(**config: Any) -> nn.Module:
    default = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**default | config))


def gpt2(**config: Any) -> nn.Module:
    default = {
        "vocab_size": 32,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**default | config))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def roberta() -> nn.Module:
    """A classifier whose head has two layers, always the same."""
    config = transformers.RobertaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        num_labels=3,
    )
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config)


def mixtral(**config: Any) -> nn.Module:
    """Experts in memory as stacks (E, out, in), in files one by one."""
    default = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**default | config))


def gpt_oss() -> nn.Module:
    """Experts as stacks (E, in, out), also in files."""
    config = transformers.GptOssConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    return transformers.GptOssForCausalLM(config)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "odd": Odd,
    "llama": llama,
    "gpt2": gpt2,  # its layers are Conv1D, one of them square
    "bert": bert,
    "mixtral": mixtral,
    "square mixtral": functools.partial(mixtral, hidden_size=12),
    "gpt_oss": gpt_oss,
}


@functools.cache
def original(kind: str, **config: Any) -> nn.Module:
    """The model with these settings: always with the same values, none of them zero; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind](**config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


@functools.cache
def doubled(kind: str) -> dict[str, Tensor]:
    """The model's parameters and buffers in float64."""
    return copy.deepcopy(original(kind)).double().state_dict()


def save(
    model: nn.Module, directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB"
) -> Path:
    """The model as a checkpoint, in files of at most the size `shard`."""
    if isinstance(model, transformers.PreTrainedModel):
        copy.deepcopy(model).to(dtype).save_pretrained(directory, max_shard_size=shard)
    else:
        directory.mkdir(parents=True)
        save_file(model.state_dict(), directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
    return directory
