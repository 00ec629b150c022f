"""docs/serving.md, "From four adapters to answers": its commands as they stand, and what llama.cpp makes of them."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import lora
from tiny_language import save_language_model, write_gguf

from pcb_peft import check
from pcb_peft.commands.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "serving.md").read_text("utf-8")
SECTION = TEXT.partition("## From four adapters to answers")[2].partition("\n## ")[0]
PROMPTS = ([40, 50, 60, 70, 80], [5, 4, 3, 2, 1, 0])


@pytest.fixture
def here(tmp_path, workshop, monkeypatch):
    """A current directory with the base model and the four adapters that the page names."""
    monkeypatch.chdir(tmp_path)
    save_language_model(tmp_path / "base-model")
    for seed, name in enumerate(("math", "code", "law", "chat")):
        config = lora("q_proj", "v_proj", "down_proj", r=8, lora_alpha=8, task_type="CAUSAL_LM")
        model = transformers.AutoModelForCausalLM.from_pretrained("base-model").float()
        wrapped = workshop.peft_model(model, config, seed=seed)
        for path, values in wrapped.named_parameters():
            if "lora_" in path:
                values.data *= 0.1
        wrapped.save_pretrained(f"{name}-lora")
    return tmp_path


@torch.no_grad()
def computed(model):
    return [model.eval()(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in PROMPTS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the merged adapter retains:UserWarning")
def test_the_commands_lead_to_answers(here, capsys):
    pytest.importorskip("gguf")
    for line in re.findall(r"^\$ pcb-peft (.*)$", SECTION, re.MULTILINE):
        assert main(shlex.split(line)) == 0, line
    assert "computes as the adapter" in capsys.readouterr().out
    (flags,) = re.findall(
        r"^vllm serve base-model (.*) --lora-modules merged=merged$", SECTION, re.M
    )
    assert " ".join(check("merged", "vllm").verdicts[0].flags) == flags
    (file,) = re.findall(r"^llama-server -m base-model.gguf --lora (.*)$", SECTION, re.MULTILINE)
    assert (here / file).is_file()
    assert "ADAPTER ./adapter.gguf" in (here / "merged-gguf" / "Modelfile").read_text()
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("the commands ran; xllamacpp is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained("base-model").float()
    bare = computed(base)
    wanted = computed(peft.PeftModel.from_pretrained(base, "merged"))
    write_gguf(here / "base-model", here / "base-model.gguf")
    request = {"base": "base-model", "directories": [file], "prompts": PROMPTS, "options": {}}
    (here / "request.json").write_text(json.dumps(request))
    script = ROOT / "tests" / "consumers" / "in_llama_cpp.py"
    done = subprocess.run([sys.executable, script, "request.json"], capture_output=True, check=True)
    found = json.loads(done.stdout)["logprobs"]
    for one, right, plain in zip(found, wanted, bare, strict=True):
        errors = [abs(value - right[int(token)]) for token, value in one.items()]
        effects = [abs(value - plain[int(token)]) for token, value in one.items()]
        assert max(errors) < 0.02 < 0.2 < max(effects)
