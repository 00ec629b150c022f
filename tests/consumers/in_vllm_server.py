"""vLLM's server, as a user starts it: `--lora-modules` names the adapters, and requests over HTTP name one of them."""

import atexit
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from answers import TOP, Values, answer

PATIENCE = 600  # seconds for the start


def prepare(request: dict[str, Any]) -> Callable[[str], Sequence[Values]]:
    """Start the server on a free port of this machine; it ends with this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {path: f"adapter{number}" for number, path in enumerate(request["directories"])}
    flags = [
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "128", "--enable-lora"),
        *(f"--{key.replace('_', '-')}={value}" for key, value in request["options"].items()),
        *("--lora-modules", *(f"{name}={path}" for path, name in names.items())),
    ]
    module = "vllm.entrypoints.openai.api_server"
    server = subprocess.Popen([sys.executable, "-m", module, "--model", request["base"], *flags])
    atexit.register(_end, server)
    address = f"http://127.0.0.1:{port}"

    def compute(directory: str) -> list[Values]:
        _wait(server, f"{address}/health")
        return [_next_tokens(address, names[directory], ids) for ids in request["prompts"]]

    return compute


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(PATIENCE):
        if _is_up(address):
            return
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        time.sleep(1)
    raise TimeoutError(f"no answer after {PATIENCE} seconds")


def _is_up(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=10).close()
    except (urllib.error.URLError, TimeoutError):
        return False
    return True


def _next_tokens(address: str, model: str, tokens: Sequence[int]) -> Values:
    body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
    body["return_tokens_as_token_ids"] = True
    sent = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(sent, timeout=60) as answered:
        found = json.load(answered)["choices"][0]["logprobs"]["top_logprobs"][0]
    return {token.removeprefix("token_id:"): value for token, value in found.items()}


if __name__ == "__main__":
    answer(prepare)
