"""Names in files that are written: what diffusers, kohya's tools and ComfyUI look up."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pcb_peft.errors import UnsupportedError
from pcb_peft.images.architecture import Architecture, Shapes
from pcb_peft.images.names import (
    COMFYUI,
    DIFFUSERS,
    EMBEDDING,
    KOHYA,
    TEXT,
    ImageLora,
    halves_exchanged,
    is_canonical,
    recognised,
    stored_name,
)
from pcb_peft.images.rows import parts_of

Item = TypeVar("Item")
WEIGHT, BIAS = ".diff", ".diff_b"
"""Ends of the names of changes that are stored whole."""
LARGEST_FUSED = {3072: 21504}  # inputs to outputs of linear1, in Flux.1 and HunyuanVideo


def names_in_file(modules: Shapes, image: ImageLora | None, target: str) -> dict[str, str]:
    """Return the names of modules in a file of a program.

    Args:
        modules: Module to (out, in).
        image: What is known about the LoRA; None if it was saved by PEFT.
        target: "diffusers", "kohya" or "comfyui".

    Returns:
        Canonical name to the name in the file, with its end where a change is stored whole (``.diff`` of a norm,
        ``.diff_b`` of a bias). Matrices that the program keeps whole, or in parts, are listed so.

    Raises:
        UnsupportedError: The program has no name for a module, or would not find it.
    """
    candidates = _candidates(modules, image)
    if image is None and not candidates:
        raise _of_no_pipeline(next(iter(modules)), target)
    named = with_components(modules, image, target)
    wholes = target != DIFFUSERS
    names: dict[str, str] = {}
    for name in _regrouped(named, candidates if wholes else [], target):
        end = _end_of_whole(name, named.get(name, (0, 0)))
        if end and target == DIFFUSERS:
            raise UnsupportedError(
                f"{name} is a norm, a bias or another vector, and diffusers' files hold LoRAs of matrices: save it as "
                "format='comfyui' or 'kohya' (--format), in which it is a whole difference (diff, diff_b)"
            )
        module = name.removesuffix(".bias") if end == BIAS else name
        names[name] = _name(module, image, candidates, target, set(named)) + end
        exchanged_in_file(names[name], name, named)  # that it can be told
    return names


def refuse_embeddings(parameters: Iterable[str], target: str) -> None:
    """Refuse embeddings of new words in a file of a program that does not look for them there.

    Args:
        parameters: What an adapter replaces.
        target: "diffusers", "kohya" or "comfyui".
    """
    words = sorted({name.split(".")[1] for name in parameters if name.startswith(EMBEDDING)})
    if words and target == DIFFUSERS:
        raise UnsupportedError(
            f"the embeddings of {', '.join(words)} (bundle_emb, a textual inversion) have no place in diffusers' "
            "LoRAs, but files of their own: save it as format='kohya' or 'comfyui' (--format), or take them out "
            "of the file"
        )


def exchanged_in_file(name: str, module: str, shapes: Shapes) -> bool:
    """Return whether a file has the second half of a module's rows before the first.

    Args:
        name: Name in the file, as of `names_in_file`.
        module: Canonical name, of a weight or of a bias.
        shapes: Module to (out, in), perhaps without the component.

    Raises:
        UnsupportedError: Only the bias of such a layer changes.
    """
    weight, stored = module.removesuffix(".bias"), name.removesuffix(BIAS)
    return halves_exchanged(
        stored, weight, shapes.get(weight) or shapes.get(stored_name(weight).path)
    )


def _end_of_whole(name: str, shape: tuple[int, int]) -> str:
    """Return the end of the name of a change that is no LoRA: of a bias, a vector or a table; empty for a LoRA."""
    if name.endswith(".bias"):
        return BIAS
    return WEIGHT if shape[1] == 1 or name.endswith("scale_shift_table") else ""


def factor_names(modules: Shapes, image: ImageLora | None, target: str) -> tuple[str, str]:
    """Return the names of a LoRA's two factors in a file of a program; arguments as of `names_in_file`."""
    architectures = _candidates(modules, image) if target == COMFYUI else []
    if target == KOHYA or any(one.down_up for one in architectures):
        return "lora_down", "lora_up"
    return "lora_A", "lora_B"


def with_components(
    modules: Mapping[str, Item], image: ImageLora | None, target: str
) -> dict[str, Item]:
    """Return modules by names with their component, which PEFT's adapters of one model do not name.

    Raises:
        UnsupportedError: The component of a module is not known.
    """
    if all(stored_name(name).prefix for name in modules):
        return dict(modules)
    candidates = _candidates(modules, image)
    return {_with_component(name, candidates, target): one for name, one in modules.items()}


def _candidates(modules: Mapping[str, Any], image: ImageLora | None) -> list[Architecture]:
    if image is not None and image.architectures:
        return _likely(image.candidates)
    shapes = {name: tuple(getattr(one, "shape", one)) for name, one in modules.items()}
    return _likely(recognised({name: stored_name(name) for name in modules}, shapes))


def _likely(candidates: list[Architecture]) -> list[Architecture]:
    """Return the candidates without those that would show themselves."""
    return [one for one in candidates if not one.shows] or candidates


def _with_component(name: str, candidates: list[Architecture], target: str) -> str:
    """Return the name of one module with its component; arguments and errors are those of `with_components`."""
    if stored_name(name).prefix:
        return name
    components = {one.component for one in candidates if one.canonical(name, ".") is not None}
    if len(components) != 1:
        raise _of_no_pipeline(name, target)
    return f"{components.pop()}.{name}"


def _regrouped(modules: Shapes, candidates: list[Architecture], target: str) -> list[str]:
    """Return the modules as the program stores them: wholes of the architecture's code, or parts."""
    wanted: list[str] = []
    for name, shape in modules.items():
        component, _, path = name.partition(".")
        wholes = {whole for one in candidates if (whole := _whole(one, path, target)) is not None}
        if len(wholes) == 1 and component == "transformer":
            whole = f"{component}.{wholes.pop()}"
            _refuse_unknown_sizes(whole, modules, shape, target)
            wanted.append(whole)
        elif candidates and any(_keeps_whole(one, target) for one in candidates):
            wanted.append(name)
        else:
            wanted.extend(parts_of(name) if is_canonical(name) else [name])
    return list(dict.fromkeys(wanted))


def _keeps_whole(architecture: Architecture, target: str) -> bool:
    return _column(architecture, target) == "original"


def _column(architecture: Architecture, target: str) -> str:
    return architecture.comfyui if target == COMFYUI else architecture.kohya


def _whole(architecture: Architecture, path: str, target: str) -> str | None:
    """Return the fused module that a path is a part of, where the program knows it as that."""
    return architecture.rows.whole_of.get(path) if _keeps_whole(architecture, target) else None


def _refuse_unknown_sizes(whole: str, modules: Shapes, shape: tuple[int, int], target: str) -> None:
    """Refuse a fused matrix of which a part is missing whose number of rows is not known."""
    missing = [part for part in parts_of(whole) if part not in modules]
    known = whole.count(",") == 2 or shape[1] in LARGEST_FUSED
    if missing and not known:
        raise UnsupportedError(
            f"{missing[0]} has no LoRA, and {target!r} stores it in one matrix with the layers beside it, whose "
            "size is not known then: save it as format='diffusers' (--format diffusers)"
        )


def _name(
    name: str,
    image: ImageLora | None,
    candidates: list[Architecture],
    target: str,
    modules: set[str],
) -> str:
    """Return the name of a module in a program's file."""
    if not is_canonical(name):
        if image is not None and stored_name(name).dialect == target:
            return name
        raise _no_name(name, target, "save it in the format that it came in")
    if target == DIFFUSERS:
        return name
    component, _, path = name.partition(".")
    if component.startswith("text_encoder"):
        return _text_encoder(component, path, image, modules)
    found = _in_codes(name, path, candidates, target)
    if target == COMFYUI:
        return f"diffusion_model.{found}"
    came_so = image is not None and image.came_as_kohya
    if not came_so and not any(one.loads_kohya for one in candidates):
        raise UnsupportedError(
            f"{name}: diffusers does not read kohya's names of {candidates[0].name}, and would load nothing: save it "
            "as format='diffusers' or 'comfyui' (--format)"
        )
    return f"lora_unet_{found}"


def _in_codes(name: str, path: str, candidates: list[Architecture], target: str) -> str:
    """Return the name in the code of the architectures that a module may belong to, where they agree."""
    names = {found for one in candidates if (found := _in_code(one, path, target)) is not None}
    if target == KOHYA:
        names = {found.replace(".", "_") for found in names}
    models = " or ".join(one.name for one in candidates) or "an unknown architecture"
    if len(names) > 1:
        raise UnsupportedError(
            f"{name} may be a module of {models}, and {target} has other names for each: say the base model in the "
            "file's metadata (ss_base_model_version), or save it as format='diffusers' (--format diffusers)"
        )
    if not names:
        raise _no_name(name, f"{target} of {models}", "save it as format='diffusers'")
    return names.pop()


def _in_code(architecture: Architecture, path: str, target: str) -> str | None:
    """Return the name that a program takes from an architecture's code, or from diffusers'."""
    if not _keeps_whole(architecture, target):
        return path if "{" not in path else None
    return architecture.original(path)


def _text_encoder(component: str, path: str, image: ImageLora | None, modules: set[str]) -> str:
    """Return kohya's name of a module in a text encoder, which ComfyUI reads too."""
    xl = image is not None and image.architectures == ("SDXL",)
    several = xl or any(one.startswith(("text_encoder_", "transformer.")) for one in modules)
    prefixes = {where: prefix for prefix, where in TEXT.items() if prefix != "lora_te_"}
    if component == "text_encoder" and not several:
        return f"lora_te_{path.replace('.', '_')}"
    overridden: Mapping[str, str] = {
        where: prefix
        for one in ([] if image is None else image.candidates)
        for prefix, where in one.text_encoders.items()
    }
    return f"{(prefixes | dict(overridden))[component]}{path.replace('.', '_')}"


def _no_name(name: str, target: str, way_out: str) -> UnsupportedError:
    return UnsupportedError(f"{name} is a name that {target} does not know: {way_out} (--format)")


def _of_no_pipeline(name: str, target: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} does not belong to a diffusion pipeline that is known: save it in PEFT's format (format='peft', "
        f"--format peft), not as {target!r}"
    )
