"""A LoRA for llama.cpp and Ollama: one GGUF file, with llama.cpp's names and its order of rows.

llama.cpp scales by alpha / rank, with the rank of each tensor: alpha = rank says 1. Models of the Llama family are
stored there with the rows of queries and keys in another order (pairs of rotary positions side by side); the rows of
lora_B follow them. No other family that is listed here reorders anything.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.saving import RECIPE, RECIPE_FILE, REPORT, REPORT_FILE
from pcb_peft.deltas.delta import LowRank
from pcb_peft.errors import MismatchError, OptionError, UnsupportedError
from pcb_peft.exporting.profile import Profile, Request, in_one_process
from pcb_peft.files.gguf import gguf_library, is_adapter
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.runtime.shown import typed
from pcb_peft.writing.atomic import replace_directory, write_file_atomically, write_files
from pcb_peft.writing.model_card import public_name
from pcb_peft.writing.targets import writing

FILE, SUFFIX = "adapter.gguf", ".gguf"


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: Its name there (``general.architecture``).
        permuted: True if the rows of queries and keys are reordered.
    """

    name: str
    permuted: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3": Architecture("gemma3"),
    "gemma3_text": Architecture("gemma3"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
}
"""transformers' model_type to llama.cpp's architecture: those whose other tensors are not reordered."""


def _write(request: Request) -> Sequence[str]:
    if not request.config:
        raise OptionError(
            "llama.cpp's names depend on the architecture: give base_model (--base-model), of which config.json is read"
        )
    architecture = architecture_of(request.config)
    refuse_tied(request, "llama.cpp has no output layer of its own for it")
    tensors = _tensors(request, architecture)
    dtype = request.dtype or torch.float32
    if request.output.suffix == SUFFIX:
        file = request.output

        def write(path: Path) -> None:
            _write_file(path, architecture, tensors, dtype, request, _report(request))

        write_file_atomically(file, write, overwrite=request.overwrite, is_ours=is_adapter)
    else:
        file = request.output / FILE
        with replace_directory(
            request.output, overwrite=request.overwrite, inputs=request.adapter.inputs
        ) as directory:
            with writing(directory / FILE):
                _write_file(directory / FILE, architecture, tensors, dtype, request)
            modelfile = f"FROM ./model.gguf\nADAPTER ./{FILE}\n".encode()
            write_files(directory, request.beside() | {"Modelfile": modelfile})
    return [
        f"llama-server -m model.gguf --lora {typed(file)}",
        f"Ollama, in a Modelfile beside FROM: ADAPTER {file}",
    ]


def _report(request: Request) -> dict[str, str]:
    """Return a merge's recipe and report for the header of a single file, by their names there."""
    names = {RECIPE_FILE: RECIPE, REPORT_FILE: REPORT}
    return {names[name]: content.decode() for name, content in request.beside().items()}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return llama.cpp's architecture of a base model, by its configuration.

    Raises:
        UnsupportedError: It is not one of those whose tensors are known to keep their order.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"the base model is a {kind}: LoRAs are written as GGUF for {', '.join(ARCHITECTURES)}; for others use "
            "llama.cpp's convert_lora_to_gguf.py on an adapter of pcb-peft export --to portable, or fold (--to "
            "transformers) and convert the model"
        )
    return ARCHITECTURES[kind]


def refuse_tied(request: Request, why: str) -> None:
    """Raise UnsupportedError where an output layer that is tied to the embeddings has a LoRA."""
    tied = {**request.config, **_text_config(request.config)}.get("tie_word_embeddings")
    outputs = [module for module in request.adapter.modules if module.endswith("lm_head")]
    if tied and outputs:
        raise UnsupportedError(
            f"{request.adapter.name} has a LoRA on {outputs[0]}, which the base model ties to its embeddings, and "
            f"{why}; fold it with --to transformers --tied untie and convert the model, or leave the module out"
        )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _tensors(request: Request, architecture: Architecture) -> dict[str, Tensor]:
    """Return name in llama.cpp to values, sorted."""
    config = _text_config(request.config)
    names = _names(config, architecture)
    heads = int(config["num_attention_heads"])
    groups = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}
    tensors: dict[str, Tensor] = {}
    entries: Mapping[str, LazyDelta] = request.adapter.modules.entries
    rank = max(entry.rank or 0 for entry in entries.values())
    for module in request.track(sorted(entries), "convert"):
        name = names.get_name(_text_name(module) + ".weight", try_suffixes=(".weight",))
        if name is None:
            raise MismatchError(
                f"{module} has no counterpart in llama.cpp's {architecture.name}; leave it out, or fold it: --to "
                "transformers"
            )
        delta = entries[module].load()
        if not isinstance(delta, LowRank):
            raise UnsupportedError(f"{module} is a {delta.kind_name}; cut it to a rank: --max-rank")
        lora_A, lora_B = delta.padded(rank)  # one alpha for all: one rank, too
        leaf = module.rpartition(".")[2]
        if architecture.permuted and leaf in groups:
            lora_B = rotary_pairs(lora_B, groups[leaf])
        tensors |= {f"{name}.lora_a": lora_A, f"{name}.lora_b": lora_B}
    return dict(sorted(tensors.items()))


def _names(config: Mapping[str, Any], architecture: Architecture) -> Any:
    gguf = gguf_library()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    return gguf.get_tensor_name_map(number, int(config["num_hidden_layers"]))


def _text_name(module: str) -> str:
    """Return a module's name as the text model alone has it."""
    return module.replace("model.language_model.", "model.").removeprefix("language_model.")


def rotary_pairs(rows: Tensor, heads: int) -> Tensor:
    """Return rows of queries or keys in llama.cpp's order: 0, n/2, 1, n/2 + 1 … within a head of n rows.

    Args:
        rows: (heads · n, r).
        heads: Number of heads that the rows belong to.
    """
    count, width = rows.shape
    return rows.view(heads, 2, count // heads // 2, width).transpose(1, 2).reshape(count, width)


def _write_file(
    path: Path,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    request: Request,
    texts: Mapping[str, str] | None = None,
) -> None:
    gguf = gguf_library()
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_a"))
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type("adapter")
    writer.add_name(request.adapter.name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    if base := public_name(request.adapter.base_model):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for name, text in (texts or {}).items():
        writer.add_string(name, text)
    for name, values in tensors.items():
        stored = values.to(dtype).contiguous()
        if dtype == torch.bfloat16:
            shape = stored.shape
            array = stored.view(torch.uint8).numpy()
            writer.add_tensor(
                name, array, raw_shape=(shape[0], 2 * shape[1]), raw_dtype=kinds[dtype]
            )
        else:
            writer.add_tensor(name, stored.numpy(), raw_dtype=kinds[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PROFILE = Profile(
    "gguf",
    "llama.cpp and Ollama: a GGUF file",
    frozenset({"output"}),
    in_one_process(_write),
    tolerance=0.02,
    suffix=SUFFIX,
    is_ours=is_adapter,
)
