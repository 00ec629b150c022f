"""Metadata of LoRA files, by which web UIs file a LoRA under its base model and know it again.

The keys are those of kohya's sd-scripts (``ss_…``, ``sshs_…``), of the ModelSpec standard (``modelspec.…``), and of
AUTOMATIC1111's merges (``sd_merge_models``).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
from torch import Tensor

from pcb_peft.images.names import DIFFUSERS, KOHYA, ImageLora

STATED = ("ss_", "modelspec.", "sd_merge_")
"""Beginnings of keys that say something about the LoRA, whatever form it has."""
OF_THE_FORM = ("ss_network_", "modelspec.hash_sha256", "modelspec.implementation")
"""Beginnings of keys that hold for one file."""
LEGACY = slice(0x100000, 0x110000)  # bytes that the older hash of web UIs is made from


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
    stated: dict[str, Any] = {
        key: value
        for key, value in image.metadata.items()
        if key.startswith(STATED) and not key.startswith(OF_THE_FORM)
    }
    only = image.candidates[0] if len(image.candidates) == 1 else None
    if only is not None and only.modelspec:
        stated.setdefault("ss_base_model_version", only.versions[0])
        stated.setdefault("modelspec.architecture", f"{only.modelspec}/lora")
    version = str(stated.get("ss_base_model_version") or "")
    if not version:
        return {}
    stated.setdefault("modelspec.sai_model_spec", "1.0.0")
    if version.startswith("sd_v"):
        stated.setdefault("ss_v2", version.startswith("sd_v2"))
    if target == DIFFUSERS:
        stated["modelspec.implementation"] = "diffusers"
    if target == KOHYA:
        stated |= {"ss_network_module": "networks.lora", "ss_network_dim": rank}
        stated["ss_network_alpha"] = float(rank)
    return {key: str(value) for key, value in stated.items()}


def merged_from(
    images: Sequence[ImageLora], names: Sequence[str], hashes: Sequence[str | None]
) -> dict[str, str]:
    """Return the metadata that say what a LoRA was merged from.

    Args:
        images: What is known about the sources.
        names: Their names.
        hashes: SHA-256 of their files, as Civitai and web UIs look them up; None where it is not known.
    """
    titles = [
        str(image.metadata.get("modelspec.title") or name).replace(",", " ")
        for image, name in zip(images, names, strict=True)
    ]
    models = {
        sha256: {"name": name, "model_hash": image.metadata.get("sshs_model_hash")}
        for image, name, sha256 in zip(images, names, hashes, strict=True)
        if sha256 is not None
    }
    stated = {"modelspec.title": " + ".join(titles), "modelspec.merged_from": ", ".join(titles)}
    return stated | ({"sd_merge_models": json.dumps(models)} if models else {})


def with_title_and_hashes(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], title: str
) -> dict[str, str]:
    """Return metadata with a title, and with the hashes by which web UIs know a file again.

    They are made as sd-scripts makes them: from the tensors' bytes, and from a part of the file that it would be with
    the metadata of its training (``ss_…``) alone.

    Args:
        metadata: The metadata; where they are empty, they stay so.
        tensors: Tensors of the file.
        title: Title where the metadata have none.
    """
    if not metadata:
        return {}
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = safetensors.torch.save(dict(tensors), training)
    start = 8 + int.from_bytes(content[:8], "little")
    whole = hashlib.sha256(memoryview(content)[start:]).hexdigest()
    return {
        "modelspec.title": title,
        **metadata,
        "modelspec.hash_sha256": f"0x{whole}",
        "sshs_model_hash": whole,
        "sshs_legacy_hash": hashlib.sha256(content[LEGACY]).hexdigest()[:8],
    }
