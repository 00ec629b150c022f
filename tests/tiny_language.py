"""A tiny Llama with a tokenizer, for programs that load real checkpoints; and the same model as llama.cpp reads it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor


def save_language_model(directory: Path, *, tied: bool = True) -> Path:
    """Save a Llama of random values, large enough that its answers differ, with a tokenizer of bytes."""
    tokens = words()
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=128,  # with heads of 32, the smallest that vLLM has on the CPU
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=tokens["<s>"],
        eos_token_id=tokens["</s>"],
        pad_token_id=tokens["</s>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    stated = json.loads((directory / "config.json").read_text())
    old = {"rope_theta": 5000.0, "torch_dtype": "float32"}  # mlx-lm's and transformers 4's names
    (directory / "config.json").write_text(json.dumps(stated | old, indent=2))
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(tokens, [("Ġ", "t")]))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def words() -> dict[str, int]:
    """Token to number: all bytes, one pair, and special ones."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return {word: number for number, word in enumerate([*letters, "Ġt", "<s>", "</s>"])}


def write_gguf(directory: Path, target: Path) -> Path:
    """Write a Llama as a GGUF file of 32 bits: llama.cpp's names, and its order of the rows of queries and keys."""
    import gguf

    config = json.loads((directory / "config.json").read_text())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        count = heads.get(name.split(".")[-2])
        rows = values if count is None else interleaved(values, count)
        translated = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(translated, np.ascontiguousarray(rows.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _describe(writer: Any, config: dict[str, Any]) -> None:
    """Write the sizes, and a tokenizer of whole words: llama.cpp holds back bytes that are no character yet."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    tokens = [f"word{number}" for number in range(config["vocab_size"])]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["w o"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return rows in llama.cpp's order: of each head the first, the first of the second half, the second …"""
    size = len(rows) // heads
    order = [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]
