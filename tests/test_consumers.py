"""Programs that load adapters, with adapters of every kind: each computes, refuses or misses what `check` says.

What is not installed is skipped by its name. ``python tests/consumers/run.py --install`` makes environments for the
programs that need one of their own; `PCB_PEFT_CONSUMERS` says where these are.
"""

import json
import warnings

import pytest
from consumers.run import main

CONSUMERS = (
    "peft",
    "transformers",
    "llama.cpp",
    "mlx",
    "peft==0.11",
    "ctranslate2",
    "openvino",
    "vllm==0.32",
    "vllm==0.32, its server",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run of all that is installed: consumer to the lines of its table, or to the reason why it did not run."""
    file = tmp_path_factory.mktemp("consumers") / "results.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["--json", str(file)])
    return json.loads(file.read_text())


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_consumer_does_what_check_says(results, consumer):
    lines = results[consumer]
    if isinstance(lines, str):
        pytest.skip(lines)
    assert lines
    assert not [line for line in lines if line.startswith("✗")]


def test_every_consumer_is_named(results):
    assert set(results) == set(CONSUMERS)
