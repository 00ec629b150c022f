"""One weight, one name: from any trainer's name of a module to its component in a diffusers pipeline and its path.

::

    lora_unet_input_blocks_4_1_proj_in              unet.down_blocks.1.attentions.0.proj_in
    lora_unet_down_blocks_1_attentions_0_proj_in    the same
    diffusion_model.double_blocks.0.img_attn.proj   transformer.transformer_blocks.0.attn.to_out.0

A matrix that a trainer keeps whole and diffusers in parts has the names of its parts in braces:
``transformer.transformer_blocks.0.attn.{to_q,to_k,to_v}``. A name that no table has is kept as it is.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.images import text_encoders
from pcb_peft.images.architecture import Architecture, Shapes
from pcb_peft.images.rows import parts_of
from pcb_peft.images.tables import ARCHITECTURES

DIFFUSERS, KOHYA, COMFYUI = "diffusers", "kohya", "comfyui"
UNDERSCORES = re.compile(r"(lora_unet_|lora_te\d?_|lora_transformer_|lycoris_)(.+)")
DOTS = re.compile(
    r"((?:model\.)?diffusion_model\.|unet\.|transformer(?:_\d)?\.|text_encoder(?:_\d)?\.|"
    r"text_encoders\.\w+\.transformer\.|base_model\.model\.)(.+)"
)
WRAPPER = re.compile(r"(?<=\.)base_model\.model\.|^pipe\.dit\.")
"""Matches what PEFT and DiffSynth put before a path, and what says nothing."""
CUT = re.compile(r"(?<=diffusion_model\.)sformer_blocks\.")
"""Matches what some files of Flux.2 have of ``transformer_blocks``; diffusers reads it so, too."""
TEXT = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
COMFYUI_TEXT = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
EMBEDDING = "bundle_emb."
"""Beginning of the names of embeddings of new words (textual inversions), as OneTrainer and web UIs bundle them."""
IN_PIPELINE = re.compile(r"(unet|transformer(_\d)?|text_encoder(_\d)?)\.")
"""Matches canonical names."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredName:
    """The name of a module in a file.

    Attributes:
        prefix: Its beginning, which says where it belongs; empty for a bare path.
        path: The rest.
        separator: What stands between the parts of the path: a dot or an underscore.
    """

    prefix: str
    path: str
    separator: str

    @property
    def text_encoder(self) -> str | None:
        """The text encoder that the module belongs to; None for an image model."""
        if self.prefix.startswith("text_encoders."):
            return COMFYUI_TEXT.get(self.prefix)
        if self.prefix.startswith("text_encoder"):
            return self.prefix.rstrip(".")
        return TEXT.get(self.prefix)

    @property
    def dialect(self) -> str:
        """The programs that write such names."""
        if self.separator == "_":
            return KOHYA
        by_comfyui = "diffusion_model" in self.prefix or self.prefix in COMFYUI_TEXT
        return COMFYUI if by_comfyui else DIFFUSERS


@dataclasses.dataclass(frozen=True, slots=True)
class ImageLora:
    """Facts about a LoRA of an image or video model beside its deltas.

    Attributes:
        dialect: Format of the file: "diffusers", "kohya" or "comfyui".
        architectures: Names of the architectures that it may belong to; empty where none is recognised.
        metadata: Metadata in the file.
        sources: Formats of the files that a merge was made from.
    """

    dialect: str
    architectures: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    sources: tuple[str, ...] = ()

    @property
    def came_as_kohya(self) -> bool:
        """True if the LoRA, or one that it was merged from, has kohya's names."""
        return KOHYA in (self.dialect, *self.sources)

    @property
    def candidates(self) -> list[Architecture]:
        """The architectures that it may belong to."""
        return [one for one in ARCHITECTURES if one.name in self.architectures]

    def kernel(self, module: str) -> tuple[int, ...] | None:
        """Return the kernel of a convolution by its canonical name; None for other layers, or if it is not known."""
        path = module.partition(".")[2]
        found = {one.kernel(path) for one in self.candidates}
        return found.pop() if len(found) == 1 and IN_PIPELINE.match(module) else None

    def splits(self, module: str) -> bool:
        """Return whether a fused module is only a part of what other programs keep whole, as one of XLabs' is."""
        paths = {part.partition(".")[2] for part in parts_of(module)}
        wholes = {one.rows.whole_of.get(path) for one in self.candidates for path in paths}
        return "{" in module and module.partition(".")[2] not in wholes


def halves_exchanged(stored: str, canonical: str, shape: tuple[int, int] | None) -> bool:
    """Return whether a file has the second half of a weight's rows, and of its bias, before the first.

    Args:
        stored: Name of the module in the file.
        canonical: Its canonical name.
        shape: (out, in) of the weight's change; None where only its bias changes.

    Raises:
        UnsupportedError: Only its bias changes, and depending on the weight it has halves or not.

    >>> names = "lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear"
    >>> halves_exchanged(*names, (64, 32))
    True
    """
    name, path = stored_name(stored), canonical.partition(".")[2]
    sides = (one.rows.exchanged for one in ARCHITECTURES)
    if all(side.get(name.path, name.separator) != path for side in sides):
        return False
    if shape is None:
        raise UnsupportedError(
            f"{stored}: only the bias of this layer changes, and whether the file has its halves in the order of "
            "diffusers cannot be told without a LoRA of its weight: leave it out of the file"
        )
    return shape[0] == 2 * shape[1]


def stored_name(name: str) -> StoredName:
    """Return the parts of a module's name in a file."""
    name = CUT.sub("transformer_blocks.", WRAPPER.sub("", name))
    if match := UNDERSCORES.fullmatch(name):
        return StoredName(match[1], match[2].strip("_"), "_")
    if match := DOTS.fullmatch(name):
        return StoredName(match[1], match[2], ".")
    return StoredName("", name, ".")


def canonical_names(
    shapes: Shapes, metadata: Mapping[str, Any], stored: Iterable[str]
) -> tuple[dict[str, str], ImageLora]:
    """Return the canonical name of every module of a file, and what the names say about the file.

    Args:
        shapes: Name in the file to (out, in), of weights that change.
        metadata: The file's.
        stored: All names in the file.

    Raises:
        AdapterError: Two names mean one weight, or there are none.
    """
    parsed = {name: stored_name(name) for name in stored}
    if not parsed:
        raise AdapterError("the file holds no LoRA of any module")
    candidates = recognised(parsed, shapes, stated_version(metadata))
    names: dict[str, str] = {}
    for name, one in parsed.items():
        new = _canonical(name, one, candidates)
        other = names.setdefault(new, name)
        if other != name:
            raise _one_weight(other, name, new)
    for new, name in names.items():
        whole = next((part for part in parts_of(new) if "{" in new and part in names), None)
        if whole is not None:
            raise _one_weight(name, names[whole], new)
    dialects = [one.dialect for one in parsed.values()]
    dialect = max(sorted(set(dialects)), key=dialects.count)
    found = tuple(one.name for one in candidates)
    return {name: new for new, name in names.items()}, ImageLora(dialect, found, metadata)


def recognised(
    parsed: Mapping[str, StoredName], shapes: Shapes, version: str = ""
) -> list[Architecture]:
    """Return the architectures that modules may belong to: those whose tables have the most of them.

    Args:
        parsed: The modules.
        shapes: Their shapes, by the same names.
        version: What the file says about its base model.
    """
    image = [one for one in parsed.values() if one.text_encoder is None]
    counts = {one: sum(_in_table(one, name) for name in image) for one in ARCHITECTURES}
    most = max(counts.values(), default=0)
    best = [one for one in ARCHITECTURES if most and counts[one] == most]
    best = [one for one in best if not _of_another_model(one, image, shapes)]
    if not image:
        best = [one for one in ARCHITECTURES if one.component == "unet"]
    stated = [one for one in best if version.startswith(tuple(one.versions))]
    fitting = [one for one in best if one.fits(shapes)] or best
    by_trainer = [one for one in fitting if all(_as_trained(one, name) for name in image)]
    return stated or _by_blocks(by_trainer or fitting, image)


def stated_version(metadata: Mapping[str, Any]) -> str:
    """Return what a file's metadata say about its base model, in lower case; empty where they say nothing."""
    keys = ("ss_base_model_version", "modelspec.architecture")
    return next((str(metadata[key]).lower() for key in keys if metadata.get(key)), "")


def architecture_of_version(version: str) -> Architecture | None:
    """Return the architecture that metadata name."""
    known = (one for one in ARCHITECTURES if version.startswith(tuple(one.versions)))
    return next(known, None) if version else None


def is_canonical(name: str) -> bool:
    """Return whether a module's name is one of a diffusers pipeline."""
    return bool(IN_PIPELINE.match(name))


def _in_table(architecture: Architecture, name: StoredName) -> bool:
    if name.prefix in ("unet.", "transformer.") and name.prefix != f"{architecture.component}.":
        return False
    return architecture.canonical(name.path, name.separator) is not None


def _of_another_model(
    architecture: Architecture, names: Iterable[StoredName], shapes: Shapes
) -> bool:
    """Return whether modules belong to a model whose names are like those of an architecture, but not the same."""
    in_diffusers = (name for name in names if name.prefix in ("unet.", "transformer."))
    widths = (shape[1] for name, shape in shapes.items() if re.search(r"attn1[._]to_[qkv]$", name))
    return any(not _in_table(architecture, name) for name in in_diffusers) or any(
        width in architecture.other_widths for width in widths
    )


def _as_trained(architecture: Architecture, name: StoredName) -> bool:
    """Return whether a name is as kohya's trainers write those of an architecture; True for a name of diffusers'."""
    original = name.prefix == "lora_unet_" and architecture.kohya == "original"
    known = architecture.rows.to_diffusers.get(name.path, name.separator)
    return not original or architecture.shows or known is not None


def _by_blocks(candidates: list[Architecture], names: Iterable[StoredName]) -> list[Architecture]:
    """Return the candidates that have as many blocks; those with exactly as many, if there are such."""
    known = [(name.path, name.separator) for name in names]
    paths = {one: [one.canonical(*name) or "" for name in known] for one in candidates}
    blocks = {one: one.blocks_of(paths[one]) for one in candidates}
    whole = [one for one in candidates if blocks[one] in one.sizes]
    large_enough = [
        one
        for one in candidates
        if not one.sizes or any(_within(blocks[one], size) for size in one.sizes)
    ]
    return whole or large_enough or candidates


def _within(blocks: Mapping[str, int], size: Mapping[str, int]) -> bool:
    return all(number <= size.get(start, 0) for start, number in blocks.items())


def _canonical(name: str, parsed: StoredName, candidates: Iterable[Architecture]) -> str:
    """Return a module's canonical name; its present one where that is not known, or the architectures disagree."""
    encoder = parsed.text_encoder
    if encoder is not None:
        encoders = {one.text_encoders.get(parsed.prefix, encoder) for one in candidates}
        component = encoders.pop() if len(encoders) == 1 else encoder
        path = text_encoders.canonical(parsed.path, parsed.separator)
        return name if path is None else f"{component}.{path}"
    component = parsed.prefix.rstrip(".") if IN_PIPELINE.fullmatch(parsed.prefix) else ""
    found = {
        f"{component or one.component}.{path}"
        for one in candidates
        if _in_table(one, parsed)
        and (path := one.canonical(parsed.path, parsed.separator)) is not None
    }
    return found.pop() if len(found) == 1 else name


def _one_weight(one: str, other: str, canonical: str) -> AdapterError:
    return AdapterError(
        f"{one} and {other} are one weight under two names ({canonical}), and which one counts is not known; leave one "
        "of them out of the file"
    )
