"""Second moments of the inputs of a base model's layers, measured once on random tokens or texts, and kept in a file.

No adapter and no task is needed for random tokens: 256 sequences of 16 tokens, drawn uniformly from the vocabulary,
already show in which directions the inputs of a layer lie.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.base.model import BaseModel, open_base_model
from pcb_peft.data.batches import read_rows, spread
from pcb_peft.data.models import input_embeddings, load_base, load_tokenizer
from pcb_peft.deltas.linalg import leading_svd
from pcb_peft.deltas.metric import Moments
from pcb_peft.errors import AdapterError, OptionError, UnsupportedError
from pcb_peft.files.json_text import parse_json
from pcb_peft.files.schema import checked
from pcb_peft.files.tensors import SafetensorsFile, read_finite
from pcb_peft.runtime.hashing import sha256_of_file
from pcb_peft.runtime.paths import cache_directory
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import Track
from pcb_peft.runtime.shown import shown
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.targets import writing
from pcb_peft.writing.tensors_file import save_tensors

SEQUENCES, LENGTH = 256, 16  # of random tokens
TEXTS, TEXT_LENGTH = 256, 64  # at most so many texts are read, of at most so many tokens
KEPT = 256  # eigenvectors per layer; of the others the mean eigenvalue is known
EXACT_SIZE = 1024  # moments of at most so many inputs are decomposed in full
FORMAT = "pcb_peft moments 1"
_LARGEST, _UNIT = 1e15, 1.01  # of an eigenvalue, and of an entry of a vector of length 1
PARTS = ("values", "vectors", "rest")
AGAIN = "measure the moments again"


@dataclasses.dataclass(frozen=True, slots=True)
class MomentsFile:
    """The moments of a base model's layers; a layer's are read when they are asked for.

    Attributes:
        tensors: The file.
        sha256: Its hash.
        layers: Layer to the name of its moments: layers with the same input have the same moments.
    """

    tensors: SafetensorsFile
    sha256: str
    layers: Mapping[str, str]

    def of(self, layer: str) -> Moments | None:
        """Return the moments of a layer; None if it was not measured, as an embedding.

        Raises:
            AdapterError: They are damaged.
        """
        if layer not in self.layers:
            return None
        name = self.layers[layer]
        values, vectors, rest = (self._read(f"{name}.{part}") for part in PARTS)
        fitting = vectors.shape[1:] == values.shape and vectors.ndim == 2 and rest.numel() == 1
        within = fitting and all(((part >= 0) & (part < _LARGEST)).all() for part in (values, rest))
        if not (within and (vectors.abs() < _UNIT).all()):
            raise AdapterError(
                f"{self.tensors.where}: the moments of {layer} are damaged: their shapes are {tuple(values.shape)}, "
                f"{tuple(vectors.shape)} and {tuple(rest.shape)}, or their values are none; {AGAIN}"
            )
        return Moments(values.float(), vectors.float(), float(rest))

    def _read(self, name: str) -> Tensor:
        if name not in self.tensors.names():
            raise AdapterError(f"{self.tensors.where} has no {shown(name)}; {AGAIN}")
        return read_finite(self.tensors, name)


def measured_moments(
    base_model: str,
    data: str,
    task_type: str | None,
    device: torch.device,
    track: Track,
    *,
    dequantize: bool = False,
) -> MomentsFile:
    """Return the moments of a base model's layers, from the user's cache if they were measured before.

    Args:
        base_model: Path or hub id.
        data: "random", or a ``.jsonl`` file of texts.
        task_type: PEFT's, of the adapters: it decides what layers are called.
        device: Where the model runs.
        track: Shows progress.
        dequantize: Compute the weights of a quantised base model from their codes.

    Raises:
        BaseModelError: The base model cannot be loaded.
        OptionError: The texts cannot be read.
        UnsupportedError: The model does not take tokens.
    """

    def measure(_: object) -> str:
        base = open_base_model(base_model, dequantize=dequantize)
        path = cache_folder() / f"{_key(base, data, task_type)}.safetensors"
        if not path.is_file():
            model = load_base(base_model, task_type, dequantize=dequantize).to(device)
            batch = random_tokens(model) if data == "random" else _tokens_of(data, base_model)
            save_moments(measure_moments(model, batch, track), path)
        return str(path)

    return open_moments(Path(current().reduce(None, measure)))


def random_tokens(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return sequences of tokens that are drawn uniformly from the vocabulary.

    Raises:
        UnsupportedError: The model does not take tokens.
    """
    size = getattr(input_embeddings(model), "num_embeddings", None)
    if size is None:
        raise UnsupportedError(
            f"metric='random' draws tokens, and {type(model).__name__} takes none: leave metric out"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, size, (SEQUENCES, LENGTH), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def measure_moments(model: Any, batch: Mapping[str, Tensor], track: Track) -> dict[str, Moments]:
    """Run a model once, and decompose the inputs of each linear layer when they come by; none are kept.

    Args:
        model: A model of transformers.
        batch: Its inputs, with an attention mask.
        track: Shows progress.
    """
    device = next(model.parameters()).device
    inputs = {name: values.to(device) for name, values in batch.items()}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    layers = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    seen = _Seen(inputs["attention_mask"].bool(), {}, iter(track(layers, "measure the base model")))
    handles = [layer.register_forward_hook(seen.hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model.base_model(**inputs)  # without a head, whose output may be large
    finally:
        for handle in handles:
            handle.remove()
        list(seen.progress)
    return seen.moments


def is_linear(layer: object) -> bool:
    """True for a linear layer, quantised or not; Conv1D of transformers is one, too."""
    return isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D"


@dataclasses.dataclass(slots=True)
class _Seen:
    """Inputs that came by so far: their moments, by layer.

    Attributes:
        mask: (texts, tokens), False for padding.
        moments: Layer to its moments.
        progress: Moves a bar by one when it is asked for the next.
        last: The last input and its moments: the next layer may have the same.
    """

    mask: Tensor
    moments: dict[str, Moments]
    progress: Any
    last: tuple[Tensor, Moments] | None = None

    def hook(self, layer: str) -> Callable[..., None]:
        """Return a hook that measures a layer's inputs."""

        def look(_layer: object, inputs: tuple[Tensor, ...], _output: object) -> None:
            next(self.progress, None)
            x = inputs[0]
            if self.last is None or self.last[0] is not x:
                same = x.shape[:2] == self.mask.shape
                rows = x[self.mask] if same else x.flatten(0, -2)
                self.last = x, moments_of(rows.float())
            self.moments[layer] = self.last[1]

        return look


def moments_of(inputs: Tensor, kept: int = KEPT) -> Moments:
    """Return the second moments of inputs (N, in): the `kept` largest eigenvalues with their vectors.

    All of them are exact for at most 1024 inputs; of more, the leading ones come from a randomised range finder.
    """
    count, width = inputs.shape
    total = float(inputs.double().square().sum()) / count
    kept = min(kept, width, count)
    if width <= EXACT_SIZE:
        x = inputs.double()
        return moments_of_gram(x.T @ x / count, kept)
    _, s, vh = leading_svd(inputs, kept)
    values, vectors = s.double().square() / count, vh.T
    rest = max(0.0, total - float(values.sum())) / max(1, width - kept)
    return Moments(values.float().cpu(), vectors.float().cpu().contiguous(), rest)


def moments_of_gram(gram: Tensor, kept: int = KEPT) -> Moments:
    """Return second moments (in, in) by their `kept` largest eigenvalues."""
    values, vectors = torch.linalg.eigh(gram.double())
    width, kept = len(gram), min(kept, len(gram))
    values, vectors = values.flip(0)[:kept].clamp(min=0), vectors.flip(1)[:, :kept]
    rest = max(0.0, float(gram.double().trace() - values.sum())) / max(1, width - kept)
    return Moments(values.float().cpu(), vectors.float().cpu().contiguous(), rest)


def save_moments(moments: Mapping[str, Moments], path: Path) -> None:
    """Write the moments of layers into a file, whole or not at all; those of the same input once.

    Raises:
        OutputError: It cannot be written.
    """
    names: dict[int, str] = {}
    layers = {layer: names.setdefault(id(one), str(len(names))) for layer, one in moments.items()}
    tensors: dict[str, Tensor] = {}
    for layer, one in moments.items():
        name = layers[layer]
        tensors |= {f"{name}.values": one.values, f"{name}.vectors": one.vectors}
        tensors[f"{name}.rest"] = torch.tensor(one.rest, dtype=torch.float64)
    metadata = {"format": FORMAT, "layers": json.dumps(layers)}
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(
        path,
        lambda file: save_tensors(tensors, file, metadata),
        overwrite="all",
    )


def open_moments(path: Path) -> MomentsFile:
    """Open a file of moments.

    Raises:
        OptionError: It is none.
    """
    try:
        file = SafetensorsFile(path)
        digest = sha256_of_file(path)
    except (OSError, AdapterError) as error:
        raise OptionError(
            f"metric: {path} cannot be read as a file of moments: {shown(error)}"
        ) from error
    metadata = file.metadata()
    if metadata.get("format") != FORMAT:
        raise OptionError(f"metric: {path} is no file of moments, which this package writes")
    where = f"metric: {path}: layers"
    layers = parse_json(metadata.get("layers", ""), where, OptionError, AGAIN)
    layers = checked(layers, dict[str, str], where, OptionError, AGAIN)
    return MomentsFile(file, digest, layers)


def cache_folder() -> Path:
    """The folder of the user's cache for moments."""
    return cache_directory("moments")


def _tokens_of(data: str, base_model: str) -> dict[str, Tensor]:
    """The texts of a file, evenly spread, as one batch."""
    chosen = spread(read_rows(data), TEXTS)
    tokenizer = load_tokenizer(base_model)
    texts = [row["text"] for row in chosen]
    pairs = [row.get("text_pair") for row in chosen]
    given = (texts, [pair or "" for pair in pairs]) if any(pairs) else (texts,)
    options = {"truncation": True, "max_length": TEXT_LENGTH, "padding": True}
    return dict(tokenizer(*given, return_tensors="pt", **options))


def _hash_of_texts(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise OptionError(f"metric: the texts {path} cannot be read: {shown(error)}") from error


def _key(base: BaseModel, data: str, task_type: str | None) -> str:
    """Return a hash of all that the moments depend on."""
    digest = hashlib.sha256(f"{FORMAT} {task_type} {KEPT} {SEQUENCES}x{LENGTH}".encode())
    if data == "random":
        digest.update(b"random")
    else:
        digest.update(_hash_of_texts(Path(data)).encode())
    for name in ("config.json", *base.files):
        digest.update(sha256_of_file(base.directory / name).encode())
    return digest.hexdigest()[:40]
