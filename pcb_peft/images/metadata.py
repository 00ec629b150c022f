"""Metadata of LoRA files, by which web UIs file a LoRA under its base model."""

from typing import Any

from pcb_peft.images.names import KOHYA, ImageLora


def metadata_of(image: ImageLora | None, target: str, rank: int) -> dict[str, str]:
    """Return the metadata of a file.

    Where the base model is not known, nothing is written: web UIs take any metadata without a model for Stable
    Diffusion 1.

    Args:
        image: What is known about the LoRA.
        target: Program that the file is for.
        rank: Highest rank.
    """
    if image is None:
        return {}
    stated: dict[str, Any] = dict(image.metadata)
    if len(image.candidates) == 1:
        (only,) = image.candidates
        stated.setdefault("ss_base_model_version", only.versions[0])
        stated.setdefault("modelspec.architecture", f"{only.modelspec}/lora")
    if not stated.get("ss_base_model_version"):
        return {}
    stated.setdefault("modelspec.sai_model_spec", "1.0.0")
    if target == KOHYA:
        stated |= {"ss_network_module": "networks.lora", "ss_network_dim": rank}
        stated["ss_network_alpha"] = float(rank)
    return {key: str(value) for key, value in stated.items()}
