"""Publishing with the real client of the Hub, and a server on this machine in the Hub's place."""

import base64
import http.server
import json
import threading

import huggingface_hub
import pytest
from helpers import lora

from pcb_peft import OptionError, OutputError, merge_adapters, publish
from pcb_peft.commands import cli


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
    paths = workshop.adapters("mlp", [lora(), lora()])
    merge_adapters(paths).save_pretrained(workshop.directory / "merged")
    return workshop.directory / "merged"


def visible(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_what_was_written_is_sent_and_hidden_files_are_not(hub, merged):
    (merged / ".secret").write_text("token")
    publication = publish(merged, "me/merged", private=True)
    assert hub.files == visible(merged)
    assert {"README.md", "adapter_model.safetensors", "merge_recipe.yaml"} <= hub.files.keys()
    assert "private" in json.dumps(hub.created[0])
    assert hub.cards == [(merged / "README.md").read_text()]
    assert publication.url == f"{hub.url}/me/merged"


def test_a_dry_run_sends_nothing_and_says_what_would_be_sent(hub, merged, capsys):
    assert cli.main(["push", str(merged), "me/merged", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would be sent to me/merged" in said
    assert all(name in said for name in visible(merged))
    assert not hub.files
    assert not hub.created


def test_the_command_sends_and_says_where(hub, merged, capsys):
    assert cli.main(["push", str(merged), "me/merged"]) == 0
    assert f"sent to {hub.url}/me/merged" in capsys.readouterr().out
    assert hub.files == visible(merged)


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
