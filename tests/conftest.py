"""Adapters on tiny models (models.py): made, saved and measured by PEFT itself."""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import models
import peft
import pytest
import torch
import transformers
from launching import Launcher
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pcb_peft import Adapter

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Makes models and adapters below a directory."""

    directory: Path
    store: ClassVar[Path]

    def model(self, kind: str) -> nn.Module:
        """Always with the same values, none of them zero."""
        return copy.deepcopy(models.original(kind))

    def base(self, kind: str) -> Path:
        """The model as a checkpoint."""
        directory = self.directory / "bases" / kind
        if directory.is_dir():
            return directory
        return self._copied(kind, directory, lambda path: models.save(models.original(kind), path))

    def peft_model(
        self,
        model: nn.Module | str,
        config: peft.PeftConfig,
        *,
        seed: int = 1,
        name: str = "default",
        base: str | None = None,
    ) -> peft.PeftModel:
        """A model with an adapter of which no trained value is zero; `base` is what it calls its base model."""
        model = self.model(model) if isinstance(model, str) else model
        config = copy.deepcopy(config)  # PEFT writes into it
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if isinstance(model, peft.PeftModel):
                model.add_adapter(name, config)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name)
            biases = getattr(config, "bias", "none") != "none"
            for path, parameter in model.named_parameters():
                trained = biases and path.endswith(".bias") and parameter.requires_grad
                if name in path.split(".") or trained:
                    mean = 1.0 if "ia3_l" in path else 0.0
                    nn.init.normal_(parameter, mean=mean, std=0.5)
        model.peft_config[name].base_model_name_or_path = base
        return model

    def adapter(
        self,
        kind: nn.Module | str,
        config: peft.PeftConfig,
        name: str = "adapter",
        *,
        seed: int = 1,
        base: str | None = None,
        dtype: torch.dtype = torch.float32,
        safetensors: bool = True,
    ) -> Path:
        """The directory of such an adapter, saved."""

        def make(directory: Path) -> None:
            model = self.peft_model(kind, config, seed=seed, base=base).to(dtype)
            model.save_pretrained(
                directory, safe_serialization=safetensors, save_embedding_layers=False
            )

        if isinstance(kind, str):
            key = repr((kind, config, seed, base, dtype, safetensors))
            return self._copied(key, self.directory / name, make)
        make(self.directory / name)
        return self.directory / name

    def _copied(self, key: str, directory: Path, make: Callable[[Path], object]) -> Path:
        """A copy of what `make` writes into a directory; it is made once in a session."""
        original = self.store / hashlib.sha256(key.encode()).hexdigest()
        if not original.is_dir():
            make(original)
        return shutil.copytree(original, directory, dirs_exist_ok=True)

    def adapters(
        self, kind: str, configs: Iterable[peft.PeftConfig], base: str | None = None
    ) -> list[Path]:
        """One per configuration, each with other values."""
        return [
            self.adapter(kind, config, f"adapter{seed}", seed=seed, base=base)
            for seed, config in enumerate(configs, 1)
        ]

    def changes(
        self,
        kind: str,
        adapter: Path | peft.PeftModel,
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        """What PEFT's merge_and_unload, in this dtype, adds to each parameter that it changes, in float64."""
        if not isinstance(adapter, peft.PeftModel):
            adapter = peft.PeftModel.from_pretrained(self.model(kind).to(dtype), adapter)
        before = models.doubled(kind)
        after = adapter.to(dtype).merge_and_unload().double().state_dict()
        assert before.keys() == after.keys()
        changes = {name: after[name] - before[name] for name in before}
        return {name: change for name, change in changes.items() if change.any()}

    def deltas(self, kind: str, adapter: Path | peft.PeftModel) -> dict[str, Tensor]:
        """ΔW of each module according to PEFT, in float64."""
        return {
            name.removesuffix(".weight"): change
            for name, change in self.changes(kind, adapter).items()
            if name.endswith(".weight")
        }

    @staticmethod
    def state(checkpoint: Path) -> dict[str, Tensor]:
        """The parameters of a checkpoint, as they are in memory."""
        config = json.loads((checkpoint / "config.json").read_text())
        if not config:  # no model of transformers
            return load_file(checkpoint / "model.safetensors")
        architecture = getattr(transformers, config["architectures"][0])
        return architecture.from_pretrained(checkpoint, dtype=torch.float32).state_dict()

    @staticmethod
    def edit_config(adapter: Path, remove: Iterable[str] = (), **fields: Any) -> Path:
        """The same adapter with other words in its configuration, and these in the order given."""
        path = adapter / "adapter_config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in set(remove)}))
        return adapter

    @staticmethod
    def edit_tensors(
        adapter: Path, edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    ) -> Path:
        """The same adapter with other tensors."""
        path = adapter / "adapter_model.safetensors"
        save_file(dict(edit(load_file(path))), path, metadata={"format": "pt"})
        return adapter

    @staticmethod
    def assert_close(found: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
        """Same shape, and at most so far apart, relative to the norm of what is wanted."""
        assert found.shape == wanted.shape, what
        distance = torch.linalg.vector_norm(found.double() - wanted.double())
        assert distance <= tolerance * torch.linalg.vector_norm(wanted.double()), what

    def assert_deltas(
        self,
        adapter: Adapter,
        wanted: Mapping[str, Tensor],
        tolerance: float = 1e-6,
        base: Path | None = None,
    ) -> None:
        """The adapter touches these modules and no others, and does this to each."""
        assert set(adapter.modules) == set(wanted)
        for module, delta in wanted.items():
            found = adapter.delta(module, base_model=base)
            assert found.dtype == torch.float32
            self.assert_close(found, delta, tolerance, module)


def pytest_runtest_setup() -> None:
    """A test draws the same numbers in every run, alone or after others."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks for all kinds of GPUs, too


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, all tests of a file run in one process: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = (
        False  # files of few tests may be the slowest: they do not come last
    )
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """No test asks the Hub, neither here nor in a process that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_template() -> Iterator[None]:
    """PEFT writes a card beside each adapter: the Hub's template for it is compiled once, not each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jinja2.Template", functools.lru_cache(jinja2.Template))
        yield


@pytest.fixture(scope="session", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A place for what is made once and then copied."""
    Workshop.store = tmp_path_factory.mktemp("store")


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture(scope="module")
def shared_workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """One for all tests of a file: what lies in it must not be changed."""
    return Workshop(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def launch() -> Iterator[Launcher]:
    """Runs a command in several processes."""
    with Launcher() as launcher:
        yield launcher
