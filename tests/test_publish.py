"""Publishing with the real client of the Hub, and a server on this machine in the Hub's place."""

import base64
import http.server
import json
import shutil
import sys
import threading

import huggingface_hub
import pytest
from helpers import lora

from pcb_peft import OptionError, OutputError, merge_adapters, publish
from pcb_peft.commands import cli

pytestmark = pytest.mark.slow


class Hub(http.server.BaseHTTPRequestHandler):
    """The Hub's answers to `create_repo` and `upload_folder`; what was committed is kept in `server.files`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/me/merged", "name": "me/merged"})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            commit = {"commitUrl": f"{self.server.url}/me/merged/commit/1", "commitOid": "1"}
            self.answer(commit | {"success": True})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        self.answer({"id": "me/merged", "sha": "0", "siblings": []})

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
    server.created, server.cards = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(server.url, token=server.token))
    server.token = "secret"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def merged(workshop):
    paths = workshop.adapters("llama", [lora("q_proj"), lora("q_proj")])
    merge_adapters(paths).save_pretrained(workshop.directory / "merged")
    return workshop.directory / "merged"


def visible(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


MADE = {"merge_report.html", "merge_report.png"}
"""Files that are made when a merge is sent."""


def assert_sent(sent, merged):
    """All that is visible; the card has the picture of the report; and no text has a local path."""
    here = visible(merged)
    assert sent.keys() == here.keys() | MADE
    changed = {name for name, content in here.items() if sent[name] != content}
    assert changed == {"README.md", "merge_recipe.yaml"}
    card = sent["README.md"].decode()
    assert card.startswith(here["README.md"].decode().rstrip())
    assert (
        "![The share of each adapter's own change that the merge makes, by layer](merge_report.png)"
        in card
    )
    assert sent["merge_report.png"].startswith(b"\x89PNG")
    assert "Cosine of ΔW" in sent["merge_report.html"].decode()
    for name in ("merge_report.html", "merge_report.json", "merge_recipe.yaml", "README.md"):
        assert "adapter2" in sent[name].decode()
        assert str(merged.parent) not in sent[name].decode()


def test_what_was_written_is_sent_and_hidden_files_are_not(hub, merged):
    (merged / ".secret").write_text("token")
    before = visible(merged)
    publication = publish(merged, "me/merged", private=True)
    assert visible(merged) == before
    assert_sent(hub.files, merged)
    assert {"README.md", "adapter_model.safetensors", "merge_recipe.yaml"} <= hub.files.keys()
    assert "private" in json.dumps(hub.created[0])
    assert hub.cards == [hub.files["README.md"].decode()]
    assert publication.url == f"{hub.url}/me/merged"


def test_a_dry_run_sends_nothing_and_says_what_would_be_sent(hub, merged, capsys):
    assert cli.main(["push", str(merged), "me/merged", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would be sent to me/merged" in said
    assert all(name in said for name in visible(merged).keys() | MADE)
    assert not hub.files
    assert not hub.created


def test_the_command_sends_and_says_where(hub, merged, capsys):
    assert cli.main(["push", str(merged), "me/merged"]) == 0
    assert f"sent to {hub.url}/me/merged" in capsys.readouterr().out
    assert_sent(hub.files, merged)


def test_a_merge_from_elsewhere_is_sent_without_its_adapters(hub, merged, workshop):
    shutil.rmtree(workshop.directory / "adapter1")
    publish(merged, "me/merged")
    page = hub.files["merge_report.html"].decode()
    assert "adapter1" in page
    assert "Cosine of ΔW" not in page


def test_without_matplotlib_there_is_no_picture(hub, merged, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    publish(merged, "me/merged")
    assert hub.files.keys() == visible(merged).keys() | {"merge_report.html"}
    assert "merge_report.png" not in hub.files["README.md"].decode()


def test_an_adapter_that_is_no_merge_is_sent_as_it_is(hub, workshop):
    path = workshop.adapter("mlp", lora(), "alone")
    publish(path, "me/merged")
    assert hub.files == visible(path)


def test_without_a_right_token_the_way_out_is_said(hub, merged):
    hub.token = "wrong"
    with pytest.raises(OutputError, match="hf auth login"):
        publish(merged, "me/merged")
    assert not hub.files


def test_offline_nothing_is_tried(hub, merged, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match=r"(?i)offline"):
        publish(merged, "me/merged")
    assert not hub.created


@pytest.mark.parametrize("name", ["a/b/c", "no spaces", ""])
def test_a_wrong_name_is_refused_before_anything_is_sent(hub, merged, name):
    with pytest.raises(OptionError, match="no name of a repository"):
        publish(merged, name)
    assert not hub.created


def test_a_directory_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(OptionError, match="no adapter and no model"):
        publish(tmp_path, "me/merged", dry_run=True)
