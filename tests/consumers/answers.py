"""One side of a conversation: a script in a consumer's environment reads a request, and answers a line per directory.

A script needs nothing of pcb_peft. It is called with a file that says what to do:

    {"base": DIRECTORY, "directories": [DIRECTORY, …], "prompts": [[TOKEN, …], …], "options": {…}}

and prints, as JSON, `{"logprobs": [{TOKEN: VALUE, …}, …]}` per directory: the most likely next tokens after each
prompt. A consumer that refuses a directory answers `{"refused": MESSAGE}`.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TOP = 10

Values = dict[str, float]
"""Token, as JSON writes it, to its log-probability."""

Prepare = Callable[[dict[str, Any]], Callable[[str], Sequence[Values]]]
"""Gets the request, loads the base model, and returns a function from a directory to the values after each prompt."""


def answer(prepare: Prepare) -> None:
    """Read a request, and answer it on the standard output."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for found in answers_to(json.loads(Path(sys.argv[1]).read_text()), prepare):
        print(json.dumps(found), file=lines, flush=True)


def answers_to(request: dict[str, Any], prepare: Prepare) -> Iterator[Mapping[str, Any]]:
    """Return the answer for each directory of a request, one after the other."""
    compute = prepare(request)
    return (_answer(compute, directory) for directory in request["directories"])


def _answer(compute: Callable[[str], Sequence[Values]], directory: str) -> Mapping[str, Any]:
    try:
        return {"logprobs": compute(directory)}
    except Exception as error:  # noqa: BLE001  (a refusal, in whatever class)
        return {"refused": f"{type(error).__name__}: {error}"[:500]}


def top(values: Any) -> Values:
    """Return the largest of a tensor of log-probabilities."""
    largest = values.float().topk(min(TOP, values.shape[-1]))
    return {
        str(token): value
        for token, value in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
    }
