"""OpenVINO GenAI: adapters in safetensors, added to a converted model."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from answers import Values, answer


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Convert the base model, once."""
    converted = Path(f"{request['base']}-openvino")
    if not converted.is_dir():
        command = Path(sys.executable).with_name("optimum-cli")
        words = ["--task", "text-generation-with-past", "--weight-format", "fp32", converted]
        subprocess.run([command, "export", "openvino", "-m", request["base"], *words], check=True)
    prompts = [openvino.Tensor(np.array([tokens])) for tokens in request["prompts"]]

    def compute(directory: str) -> list[Values]:
        """Return the two most likely tokens: the scores of beams are all that a pipeline tells."""
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if directory:
            adapter = openvino_genai.Adapter(str(Path(directory) / "adapter_model.safetensors"))
            options["adapters"] = openvino_genai.AdapterConfig(adapter)
        pipeline = openvino_genai.LLMPipeline(str(converted), "CPU", **options)
        found: list[Values] = []
        for ids in prompts:
            encoded = pipeline.generate(ids, max_new_tokens=1, num_beams=2, num_return_sequences=2)
            pairs = zip(encoded.tokens, encoded.scores, strict=True)
            found.append({str(tokens[-1]): score for tokens, score in pairs})
        return found

    return compute


if __name__ == "__main__":
    answer(prepare)
