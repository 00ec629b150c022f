"""Features of an adapter that not every consumer reads alike: a function for each says what was found, if anything."""

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from pcb_peft.consumers.files import OutputFiles
from pcb_peft.runtime.shown import some_of

Feature: TypeAlias = Callable[[OutputFiles], str]
"""Says what a consumer meets in the files, such as "DoRA (28 modules)"; an empty text where they hold nothing such."""

_SAVED = re.compile(r"(?:base_model\.model\.)?(.+)\.(?:weight|bias)$")
_LORA_PART = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|token_adapter)(\.|$)|lora_"
)
_CLASSIFIERS = ("classifier", "score")
_ENDS = ("lm_head", "embed_tokens", "wte", "embed_out", "word_embeddings", "embed_in")
_NORMS = re.compile(r"(norm|ln_\w+|layernorm)\w*$", re.IGNORECASE)
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
VARIANTS = (
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "layer_replication",
)


def other_kind(files: OutputFiles) -> str:
    """Name an adapter that is no LoRA."""
    kind = str(files.config.get("peft_type", "LORA")).upper()
    return "" if kind == "LORA" else {"IA3": "(IA)³"}.get(kind, kind)


def dora(files: OutputFiles) -> str:
    """Count the modules of a DoRA."""
    count = sum(".lora_magnitude_vector" in name for name in files.tensors)
    return f"DoRA ({count} modules)" if count else ""


def other_task(files: OutputFiles) -> str:
    """Name a task other than writing text."""
    task = files.config.get("task_type")
    if task is None and files.heads:
        return "heads of tasks"
    return "" if task in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM") else f"task type {task}"


def rslora(files: OutputFiles) -> str:
    """Say that the scaling is alpha/√r."""
    return "rsLoRA scaling" if files.config.get("use_rslora") and files.rank > 1 else ""


def alpha_pattern(files: OutputFiles) -> str:
    """Say that modules have an alpha of their own."""
    return "alpha_pattern" if files.config.get("alpha_pattern") else ""


def rank_pattern(files: OutputFiles) -> str:
    """Say that modules have a rank of their own."""
    if files.config.get("rank_pattern") or len(set(files.ranks.values())) > 1:
        return f"different ranks ({', '.join(map(str, sorted(set(files.ranks.values()))))})"
    return ""


def scaling(files: OutputFiles) -> str:
    """Name a scaling other than 1."""
    r, alpha = files.config.get("r"), files.config.get("lora_alpha")
    numbers = isinstance(r, int) and isinstance(alpha, int | float) and r
    return f"scaling alpha/r = {alpha}/{r}" if numbers and alpha != r else ""


def _saved_modules(files: OutputFiles) -> list[str]:
    """Return the modules that the adapter stores whole, PEFT's copies of the base model's beside a LoRA aside."""
    names = (_SAVED.fullmatch(name) for name in files.tensors if not _LORA_PART.search(name))
    if other_kind(files):
        return []
    modules = (match[1].replace(".modules_to_save", "") for match in names if match)
    copies = {f"{module}.base_layer" for module in files.ranks}
    return [module for module in dict.fromkeys(modules) if module not in copies]


def _listed(words: str, modules: Iterable[str]) -> str:
    names = list(modules)
    if not names:
        return ""
    return f"{words}: {some_of(names)}"


_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def _kind(module: str) -> str:
    leaf = module.rpartition(".")[2]
    if any(part in _CLASSIFIERS for part in module.split(".")):
        return "classifier"
    if leaf in _ENDS:
        return "end"
    return "norms" if _NORMS.search(leaf) else "other"


def classifier(files: OutputFiles) -> str:
    """Name a classifier that the adapter stores whole."""
    return _listed(
        "a head stored whole", (m for m in _saved_modules(files) if _kind(m) == "classifier")
    )


def classifying_model(files: OutputFiles) -> str:
    """Name the class of a whole model with a head that language models lack."""
    stated = files.config.get("architectures")
    named = [str(name) for name in stated] if isinstance(stated, list) else []  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return next((name for name in named if name.endswith(_OTHER_HEADS)), "")


def saved_ends(files: OutputFiles) -> str:
    """Name embeddings or an output layer that the adapter stores whole."""
    modules = (m for m in _saved_modules(files) if _kind(m) == "end")
    return _listed("embeddings or output layer stored whole", modules)


def saved_norms(files: OutputFiles) -> str:
    """Name norms that the adapter stores whole."""
    return _listed("norms stored whole", (m for m in _saved_modules(files) if _kind(m) == "norms"))


def saved_others(files: OutputFiles) -> str:
    """Name other layers that the adapter stores whole, biases of layers with a LoRA aside."""
    modules = (m for m in _saved_modules(files) if _kind(m) == "other" and m not in files.ranks)
    return _listed("layers stored whole", modules)


def heads_apart(files: OutputFiles) -> str:
    """Name the heads that are kept beside the adapter, or beside a folded model."""
    thing = "model" if files.form == "model" else "adapter"
    return _listed(f"the heads beside the {thing}", files.heads)


def embedding_lora(files: OutputFiles) -> str:
    """Name input embeddings that have a LoRA."""
    end = ".lora_embedding_A"
    having = {name.removesuffix(end) for name in files.tensors if name.endswith(end)}
    names = (m for m in files.ranks if having & {m, f"base_model.model.{m}"})
    return _listed("a LoRA on embeddings", names)


def output_lora(files: OutputFiles) -> str:
    """Name an output layer that has a LoRA."""
    return _listed("a LoRA on the output layer", (m for m in files.ranks if m.endswith("lm_head")))


def tied_output_lora(files: OutputFiles) -> str:
    """Name an output layer that has a LoRA, and is tied to the embeddings."""
    return output_lora(files) if files.base.get("tie_word_embeddings") else ""


def resized_vocabulary(files: OutputFiles) -> str:
    """Say that a LoRA on embeddings has another number of rows than the base model."""
    rows = {
        tensor.shape[-1] for name, tensor in files.tensors.items() if "lora_embedding_A" in name
    }
    base = files.base.get("vocab_size")
    there = base is not None and rows - {base}
    return f"a LoRA on {max(rows)} embeddings, for a vocabulary of {base}" if there else ""


def token_rows(files: OutputFiles) -> str:
    """Say that rows of the embeddings were trained."""
    found = any("token_adapter" in name for name in files.tensors)
    return "trained token rows" if found or files.config.get("trainable_token_indices") else ""


def biases(files: OutputFiles) -> str:
    """Say that biases were trained."""
    bias = files.config.get("bias", "none")
    if files.config.get("lora_bias"):
        return "biases beside the LoRA (lora_bias)"
    return f"trained biases (bias = {bias!r})" if bias != "none" else ""


def stored_biases(files: OutputFiles) -> str:
    """Count the biases that are stored, which may be none although the configuration says that they were trained."""
    count = sum(name.endswith(".bias") for name in files.tensors)
    return f"trained biases ({count})" if count else ""


def changed_base(files: OutputFiles) -> str:
    """Name an initialisation that took a part out of the base model's weights."""
    init = files.config.get("init_lora_weights", True)
    plain = isinstance(init, bool) or init is None or str(init).lower() in PLAIN_INITS
    return "" if plain else f"initialisation {init!r}, which changes the base model"


def variants(files: OutputFiles) -> str:
    """Name a variant of LoRA that few consumers know."""
    return _listed("a variant of LoRA", (field for field in VARIANTS if files.config.get(field)))


def pattern_targets(files: OutputFiles) -> str:
    """Say that target_modules is a regular expression."""
    return (
        "target_modules as a pattern" if isinstance(files.config.get("target_modules"), str) else ""
    )


def missing_layers(files: OutputFiles) -> str:
    """Name kinds of modules that some layers have a LoRA on, and others do not."""
    kinds = files.by_layer()
    layers = set[int]().union(*kinds.values())
    count = files.base.get("num_hidden_layers")
    if isinstance(count, int):
        layers |= set(range(count))
    incomplete = [kind for kind, there in kinds.items() if layers - there]
    return _listed("some layers without a LoRA", incomplete)


def fused_experts(files: OutputFiles) -> str:
    """Name stacks of experts (PEFT's target_parameters)."""
    return _listed(
        "stacked experts (target_parameters)", files.config.get("target_parameters") or []
    )


def single_experts(files: OutputFiles) -> str:
    """Count the LoRAs on experts one by one."""
    count = sum(bool(re.search(r"\.experts\.\d+\.", module)) for module in files.ranks)
    return f"experts one by one ({count} modules)" if count else ""


def single_experts_beside_others(files: OutputFiles) -> str:
    """Count the LoRAs on experts one by one, where layers that are no experts have LoRAs of the same names."""
    experts = {module for module in files.ranks if re.search(r"\.experts\.\d+\.", module)}
    names = {module.rpartition(".")[2] for module in experts}
    others = (m for m in files.ranks if m not in experts and m.rpartition(".")[2] in names)
    return single_experts(files) if any(others) else ""


def conv1d(files: OutputFiles) -> str:
    """Say that the layers are Conv1D, as GPT-2's are."""
    return "Conv1D layers (fan_in_fan_out)" if files.config.get("fan_in_fan_out") else ""


def foreign_names(files: OutputFiles) -> str:
    """Name tensors that lack PEFT's prefix, or have an adapter's name inside."""
    odd = (n for n in files.tensors if not n.startswith("base_model.model.") or ".default." in n)
    return _listed("tensors without PEFT's names", odd)


def half_modules(files: OutputFiles) -> str:
    """Name modules that have only one of their two factors."""
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    missing = (
        name
        for name in files.tensors
        for one, two in other.items()
        if f".{one}" in name
        and not name.endswith(".bias")
        and name.replace(f".{one}", f".{two}") not in files.tensors
    )
    return _listed("one factor without the other", missing)


def other_rank(files: OutputFiles) -> str:
    """Say that the tensors have another rank than the configuration says."""
    r, patterns = files.config.get("r", 8), files.config.get("rank_pattern")
    wrong = files.ranks and not patterns and set(files.ranks.values()) != {r}
    ranks = ", ".join(map(str, sorted(set(files.ranks.values()))))
    return f"tensors of rank {ranks}, and r = {r} in the configuration" if wrong else ""


def no_base_name(files: OutputFiles) -> str:
    """Say that the configuration does not name the base model."""
    return (
        ""
        if files.config.get("base_model_name_or_path")
        else "no base model's name in the configuration"
    )


def unreadable(files: OutputFiles) -> str:
    """Name files that only their owner can read."""
    return _listed("files that only their owner can read", files.unreadable)


def empty(files: OutputFiles) -> str:
    """Say that there is no tensor in safetensors."""
    return "" if files.tensors else "no tensors in adapter_model.safetensors"


BEYOND_LORA: tuple[Feature, ...] = (
    *(other_kind, classifier, saved_ends, saved_norms, saved_others, token_rows, variants),
    *(stored_biases, embedding_lora, tied_output_lora, fused_experts),
)
"""Features that neither a LoRA in GGUF nor one for mlx-lm can hold."""
