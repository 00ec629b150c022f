"""All consumers that are known, in the order of reports."""

from pcb_peft.consumers import (
    lorax,
    mlx,
    openvino,
    peft,
    sglang,
    tensorrt_llm,
    transformers,
    vllm,
)
from pcb_peft.consumers.consumer import Consumer, Version, parse_version
from pcb_peft.consumers.image_programs import COMFYUI_PROGRAM, DIFFUSERS, KOHYA_PROGRAM
from pcb_peft.consumers.llama_cpp import LLAMA_CPP, OLLAMA
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean

CONSUMERS: dict[str, Consumer] = {
    one.name: one
    for one in (
        vllm.CONSUMER,
        peft.CONSUMER,
        transformers.CONSUMER,
        sglang.CONSUMER,
        tensorrt_llm.CONSUMER,
        lorax.CONSUMER,
        openvino.CONSUMER,
        LLAMA_CPP,
        OLLAMA,
        mlx.CONSUMER,
        DIFFUSERS,
        COMFYUI_PROGRAM,
        KOHYA_PROGRAM,
    )
}


def named(word: str) -> tuple[Consumer, Version]:
    """Return the consumer of a word such as ``vllm`` or ``vllm==0.32``, and the version: the newest, if none is given.

    Raises:
        OptionError: No such consumer is known, or the version is none.
    """
    name, equals, text = word.partition("==")
    consumer = CONSUMERS.get(name.strip().lower())
    if consumer is None:
        raise OptionError(
            f"no consumer {name!r} is known{did_you_mean(name, CONSUMERS)}; known are {', '.join(CONSUMERS)}"
        )
    version = parse_version(text.strip() if equals else consumer.newest)
    if not version:
        raise OptionError(f"{word!r} has no version; write for example {name}=={consumer.newest}")
    return consumer, version
