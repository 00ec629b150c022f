"""vLLM: one engine for all adapters, which it takes and gives back one by one."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from answers import TOP, Values, answer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Start the engine.

    A refused adapter is asked for with `add_lora`: after two refusals inside `generate`, vLLM 0.32 waits for ever.
    """
    model = LLM(
        request["base"],
        dtype="float32",
        enable_lora=True,
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        **request["options"],
    )
    prompts: Any = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    one_token = SamplingParams(temperature=0, max_tokens=1, logprobs=TOP, detokenize=False)
    numbers = itertools.count(1)

    def compute(directory: str) -> list[Values]:
        adapter = None
        if directory:
            number = next(numbers)
            adapter = LoRARequest(f"adapter{number}", number, directory)
            model.llm_engine.add_lora(adapter)
        try:
            outputs = model.generate(prompts, one_token, lora_request=adapter, use_tqdm=False)
        finally:
            if adapter is not None:
                model.llm_engine.remove_lora(adapter.lora_int_id)
        tokens = [output.outputs[0].logprobs[0] for output in outputs]
        return [{str(token): one.logprob for token, one in found.items()} for found in tokens]

    return compute


if __name__ == "__main__":
    answer(prepare)
