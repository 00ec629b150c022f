"""mergekit's YAML files, read as recipes where this package has the method, and refused by name where it has not.

    merge_method: ties
    base_model: base
    models:
      - model: base+math-lora
        parameters: {weight: 1.0, density: 0.5}
      - model: base+code-lora
        parameters: {weight: 1.0, density: 0.5}

A model is the base model with an adapter: `base+adapter`. Entries compete as in mergekit: in ΔW, each weight by itself.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.recipes.mergekit_file import check_file
from pcb_peft.recipes.mergekit_methods import MEANINGS, OTHERS, Meaning
from pcb_peft.recipes.mergekit_parameters import (
    Gradient,
    Model,
    Parameters,
    Settings,
    plain_weight,
)
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.shown import quoted, shown

METHOD = "merge_method"
KNOWN = (METHOD, "base_model", "models", "slices", "parameters")
LEFT_OUT = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name")
"""Keys about the files that mergekit writes, and not about numbers: a merge of adapters has no such files."""

DENSE = {"space": "dense", "scope": "module"}


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Return whether a YAML file is one of mergekit's."""
    return METHOD in content


def fields_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the recipe that a file of mergekit stands for.

    What differs from mergekit's numbers is said in a warning.

    Args:
        content: The file's content.

    Raises:
        OptionError: A key holds what mergekit does not know, the method or a parameter has no counterpart here, or a
            model is no adapter.

    >>> models = [{"model": f"base+{name}", "parameters": {"weight": 0.5}} for name in ("math", "code")]
    >>> fields_of({"merge_method": "task_arithmetic", "base_model": "base", "models": models})["weights"]
    [0.5, 0.5]
    """
    check_file(content)
    meaning = _meaning(content)
    unknown = [key for key in content if key not in (*KNOWN, *LEFT_OUT)]
    if unknown:
        raise OptionError(
            f"mergekit's {quoted(unknown[0])} has no counterpart here; give models, {METHOD}, parameters and base_model"
        )
    base, base_adapter = _split(str(content.get("base_model") or ""))
    entries = content.get("models") or _whole_slice(content)
    models = _models(content, entries, base, meaning)
    settings = Settings(meaning, models, content.get("parameters") or {})
    weights, options = settings.weights(()), settings.options(())
    adapters = [model.adapter for model in models if model.adapter]
    if base_adapter is not None:
        adapters, weights = _on_top(meaning, base_adapter, adapters, weights, settings)
    settings.warn(weights, based=bool(base))
    base = base or _common_base(entries)
    fields = {
        "adapters": adapters,
        "weights": [plain_weight(weight) for weight in weights],
        "method": meaning.method,
        "base_model": base or None,
        "options": options,
        "overrides": settings.overrides(weights, options),
        "scale": settings.scale,
        **({} if meaning.exact_in_any_space else DENSE),
    }
    return {key: value for key, value in fields.items() if value not in (None, [], {})}


def _meaning(content: Mapping[str, Any]) -> Meaning:
    """The meaning of mergekit's method here.

    Raises:
        OptionError: There is none.
    """
    name = str(content[METHOD])
    if name in MEANINGS:
        return MEANINGS[name]
    understood = f"understood are {', '.join(MEANINGS)}"
    if name in OTHERS:
        raise OptionError(
            f"mergekit's {name} ({OTHERS[name]}) is not among the methods here; {understood}"
        )
    raise OptionError(
        f"{METHOD}: mergekit has no method {quoted(name)} that is known here{did_you_mean(name, MEANINGS)}; "
        f"{understood}"
    )


def _models(
    content: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], base: str, meaning: Meaning
) -> list[Model]:
    """The models, the first one first; for a turn from one to the other the base model is the first."""
    models = [_model(entry, base) for entry in entries]
    if meaning.turns and "base_model" in content:
        models.sort(key=lambda model: model.name != str(content["base_model"]))
    if not any(model.adapter for model in models):
        raise OptionError("mergekit: none of the models is the base model with an adapter")
    if not meaning.counts_base:
        models = [model for model in models if model.adapter]
    return models


def _whole_slice(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models of a file with one slice of all layers.

    Raises:
        OptionError: There are several slices, or other layers.
    """
    slices: list[Any] = content.get("slices") or []
    if not slices:
        raise OptionError("mergekit: there are no models")
    sources: list[dict[str, Any]] = slices[0].get("sources") or []
    ranges = {tuple(source.get("layer_range") or (0,)) for source in sources}
    if len(slices) > 1 or len(ranges) != 1 or next(iter(ranges))[0] != 0:
        raise OptionError(
            "mergekit's slices put layers of several models one after the other; a merge of adapters leaves every "
            "layer where it is: give models"
        )
    if "layer_range" in sources[0]:
        layers = list(sources[0]["layer_range"])
        warnings.warn(f"mergekit's layer_range {layers} is taken for all layers", stacklevel=5)
    shared: Parameters = slices[0].get("parameters") or {}
    return [{**one, "parameters": {**shared, **(one.get("parameters") or {})}} for one in sources]


def _model(entry: Mapping[str, Any], base: str) -> Model:
    name = str(entry.get("model") or "")
    path, adapter = _split(name)
    parameters: Parameters = entry.get("parameters") or {}
    if adapter is not None and base in ("", path):
        return Model(_located(adapter), name, parameters)
    if adapter is None and path == base:
        return Model(None, name, parameters)
    if adapter is None and (expanded(path) / "adapter_config.json").is_file():
        return Model(_located(path), name, parameters)
    other = f"it is not on the base model {shown(base)}" if adapter else "it is a whole model"
    raise OptionError(
        f"mergekit's model {quoted(name)} is no adapter of the base model: {other}. Write BASE+ADAPTER; a fine-tuned "
        f"model becomes an adapter with pcb-peft extract {shown(path or 'MODEL')} {shown(base or 'BASE')} -o ADAPTER"
    )


def _on_top(
    meaning: Meaning,
    base_adapter: str,
    adapters: list[dict[str, str]],
    weights: list[Gradient],
    settings: Settings,
) -> tuple[list[dict[str, str]], list[Gradient]]:
    """The merge on a base model with an adapter: Δ0 + Σ w (Δ − Δ0), for a sum.

    Raises:
        OptionError: It is no sum.
    """
    own = _located(base_adapter)
    is_mixed_itself = meaning.counts_base or meaning.turns
    if own in adapters and is_mixed_itself:
        return adapters, weights
    if not meaning.exact_in_any_space or settings.scale != 1 or any(settings.selections()):
        raise OptionError(
            f"mergekit's {meaning.name} on a base model with an adapter ({shown(base_adapter)}) takes the differences "
            "from it, which are no adapters of the base model; give the base model alone"
        )
    others = [adapter != own for adapter in adapters]  # its difference from itself is nothing
    adapters = [*itertools.compress(adapters, others)]
    weights = [*itertools.compress(weights, others)]
    rest = tuple(1 - sum(row) for row in zip(*weights, strict=True)) if weights else (1.0,)
    return ([own, *adapters], [rest, *weights]) if any(rest) else (adapters, weights)


def _common_base(entries: Sequence[Mapping[str, Any]]) -> str:
    """The base model that all models name, where the file names none.

    Raises:
        OptionError: They name several.
    """
    names = [str(entry.get("model")) for entry in entries]
    bases = {_split(name)[0] for name in names if "+" in name}
    if len(bases) > 1:
        raise OptionError(
            f"mergekit: the models have different base models ({shown(', '.join(sorted(bases)))}); adapters "
            "of one base model can be merged"
        )
    return bases.pop() if bases else ""


def _split(name: str) -> tuple[str, str | None]:
    """A model's path, and that of its adapter."""
    path, plus, adapter = name.partition("+")
    return path.partition("@")[0], adapter if plus else None


def _located(name: str) -> dict[str, str]:
    path, at, revision = name.partition("@")
    return {"path": path, **({"revision": revision} if at else {})}
