"""Nothing is fetched unless a user names a repository; links that lead out of a directory are said; no code is run."""

import ast
import json
import re
import socket
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
from helpers import lora

import pcb_peft
from pcb_peft import load_adapter, merge_adapters
from pcb_peft.base.model import open_base_model
from pcb_peft.commands import cli
from pcb_peft.data.models import load_base, load_tokenizer
from pcb_peft.errors import AdapterError, BaseModelError, OptionError

PACKAGE = Path(pcb_peft.__file__).parent


@pytest.fixture
def asked(monkeypatch):
    """The hosts that were asked, though none can be reached; the Hub may be asked as far as it is concerned."""
    hosts = []

    def refuse(*arguments, **_):
        hosts.append(arguments)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return hosts


def test_no_host_is_asked_unless_a_user_names_a_repository(asked, workshop, tmp_path, capsys):
    base = workshop.base("llama")
    configs = [lora("q_proj", "v_proj"), lora("q_proj", "v_proj")]
    one, two = workshop.adapters("llama", configs, base="somebody/else")
    out = tmp_path / "out"
    for words in (
        ["inspect", one],
        ["compare", one, two],
        ["merge", one, two, "-o", out],
        ["merge", one, two, "-o", tmp_path / "based", "--base-model", base],
        ["fold", out, base, "-o", tmp_path / "folded"],
        ["check", out],
        ["merge", one, two, "--dry-run"],
    ):
        assert cli.main(list(map(str, words))) == 0, capsys.readouterr().err
    assert asked == []
    with pytest.raises(AdapterError, match="somebody/adapter"):
        load_adapter("somebody/adapter")
    assert asked


def test_links_that_lead_out_of_a_base_or_an_adapter_are_said(workshop, tmp_path):
    (tmp_path / "secret").write_text("{}")
    base, adapter = workshop.base("llama"), workshop.adapter("llama", lora("q_proj"))
    (base / "notes.json").symlink_to(tmp_path / "secret")
    (adapter / "tokenizer.json").symlink_to("../secret")
    with pytest.warns(UserWarning, match=r"notes.json to .+secret.+: what they lead to is read"):
        open_base_model(base)
    with pytest.warns(UserWarning, match=r"tokenizer.json to ../secret"):
        load_adapter(adapter)


def test_the_links_of_the_cache_of_the_hub_and_those_in_a_directory_are_not(workshop, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    workshop.adapter("llama", lora("q_proj")).rename(blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot / "again.json").symlink_to("adapter_config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapters([snapshot, snapshot])


def test_no_code_of_a_stranger_is_allowed_to_run():
    """Transformers asks at the terminal unless it is told; PEFT and generation settings hold no code."""
    without = {"PeftModel", "GenerationConfig"}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        assert not re.search(r"trust_remote_code(?!=False)|weights_only=False", text), path
        calls = [one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.Call)]
        for call in calls:
            owner, _, name = ast.unparse(call.func).rpartition(".")
            if name in ("from_pretrained", "from_config") and owner.split(".")[-1] not in without:
                assert "trust_remote_code" in {one.arg for one in call.keywords}, (path, owner)


def test_nor_does_that_of_a_tokenizer_or_a_model(workshop, tmp_path, monkeypatch):
    base, ran = workshop.base("llama"), tmp_path / "ran"
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    stated = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(stated))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(OptionError, match="no tokenizer that can be loaded"):
        load_tokenizer(base)
    stated = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (base / "config.json").write_text(json.dumps(stated))
    with pytest.raises(BaseModelError, match="cannot be loaded with transformers"):
        load_base(base, None)
    assert not ran.exists()
