"""``pcb-peft export``: an adapter as one program reads it right."""

import argparse
from pathlib import Path

from pcb_peft.commands.arguments import (
    DTYPES,
    add_dequantize,
    add_output_arguments,
    progress_of,
)
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.recipe_fields import tied_help
from pcb_peft.runtime.paths import size_on_disk

FOLDED = "transformers"
PROFILES = ("portable", "peft", FOLDED, "gguf", "mlx", "diffusers", "kohya", "comfyui")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="directory, file or hub id")
    parser.add_argument(
        "--to",
        required=True,
        type=str.lower,
        choices=PROFILES,
        metavar="PROFILE",
        help="portable (vLLM, SGLang, TensorRT-LLM, LoRAX, OpenVINO), peft (the smallest exact form), transformers "
        "(the whole model), gguf (llama.cpp, Ollama) or mlx; for a LoRA of an image model diffusers, kohya "
        "(sd-scripts, web UIs) or comfyui",
    )
    parser.add_argument(
        "--base-model", help="directory or hub id; default: the one that the adapter names"
    )
    parser.add_argument("--max-rank", type=int, metavar="N", help="cut every module to this rank")
    parser.add_argument(
        "--dense",
        action="store_true",
        help="write zeros where a module has a LoRA in some layers only",
    )
    parser.add_argument(
        "--pad-to-rank", type=int, metavar="N", help="fill up to this rank with zeros"
    )
    parser.add_argument(
        "--like",
        metavar="OTHER",
        help="an adapter whose modules and rank this one gets, too, so that a server swaps the two without recompiling",
    )
    parser.add_argument(
        "--dtype",
        type=str.lower,
        choices=DTYPES,
        help="data type of the tensors (default: float32; of a whole model, the base model's)",
    )
    parser.add_argument("--tied", type=str.lower, metavar="POLICY", help=tied_help())
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load the result, and compare its log-probabilities with the adapter's and with the bare base model's",
    )
    add_dequantize(parser, folds=True)
    add_output_arguments(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.exporting.export import export

    exported = export(
        parsed.adapter,
        parsed.to,
        parsed.output,
        base_model=parsed.base_model,
        max_rank=parsed.max_rank,
        dense=parsed.dense,
        pad_to_rank=parsed.pad_to_rank,
        like_adapter=parsed.like,
        dtype=parsed.dtype,
        tied=parsed.tied,
        dequantize=parsed.dequantize,
        overwrite=parsed.overwrite,
        verified=parsed.verify,
        progress=progress_of(parsed),
    )
    path = Path(parsed.output)
    data = {
        "output": str(path),
        "bytes": size_on_disk(path),
        "profile": exported.profile,
        "energy": exported.energy,
        "usage": list(exported.usage),
        "check": exported.check.as_dict(),
        "verification": None if exported.verification is None else str(exported.verification),
    }
    return Answer(str(exported), data)


COMMAND = Command(
    "export",
    "Write an adapter as one program reads it right: a server, llama.cpp, mlx-lm, transformers, ComfyUI",
    "pcb-peft export merged --to portable -o merged-portable --max-rank 64\n"
    "pcb-peft export merged --to gguf -o merged.gguf --base-model meta-llama/Llama-3.2-1B\n"
    "pcb-peft export my_style.safetensors --to comfyui -o my_style_comfy.safetensors",
    _add_arguments,
    _run,
)
