"""mlx-lm: its own directory, or a whole model."""

from collections.abc import Mapping
from typing import Any

from pcb_peft.consumers import features
from pcb_peft.consumers.consumer import Consumer, Rule
from pcb_peft.consumers.files import OutputFiles

ASSUMED_THETA = 10000.0


def hidden_rope_theta(config: Mapping[str, Any]) -> float | None:
    """Return the base of the rotary positions, if it stands where mlx-lm does not look and is not what it assumes."""
    parameters = config.get("rope_parameters")
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    seen = "rope_theta" in config or theta in (None, ASSUMED_THETA)
    return None if seen else theta


def _hidden_rope(files: OutputFiles) -> str:
    theta = hidden_rope_theta(files.config)
    return "" if theta is None else f"rope_theta = {theta} inside rope_parameters"


CONSUMER = Consumer(
    "mlx",
    "mlx-lm",
    "0.32",
    ("mlx", "model"),
    (
        Rule(
            _hidden_rope,
            "misreads",
            "takes 10000 where config.json has no rope_theta of its own; add it",
            "run with mlx-lm 0.32.2",
            form="model",
        ),
        Rule(
            features.classifying_model,
            "refuses",
            "loads language models only",
            "run with mlx-lm 0.32.2",
            form="model",
        ),
    ),
    way="pcb-peft export {path} --to mlx -o adapter-mlx",
    way_lacks=features.BEYOND_LORA,
    flags=lambda files, _: ["--adapter-path"] if files.form == "mlx" else [],
)
