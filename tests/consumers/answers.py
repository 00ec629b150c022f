"""One side of a conversation: a script in a consumer's environment reads a request, and answers a line per directory.

A script needs nothing of pcb_peft. It is called with a file that says what to do:

    {"base": DIRECTORY, "directories": [DIRECTORY, …], "prompts": [[TOKEN, …], …], "options": {…}}

and prints, as JSON, `{"logprobs": [{TOKEN: VALUE, …}, …]}` per directory: the most likely next tokens after each
prompt. A consumer that refuses a directory answers `{"refused": MESSAGE}`.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOP = 10

Values = dict[str, float]
"""Token, as JSON writes it, to its log-probability."""


def answer(prepare: Callable[[dict[str, Any]], Callable[[str], Sequence[Values]]]) -> None:
    """Answer a request.

    Args:
        prepare: Gets the request, loads the base model, and returns a function from a directory to the values after
            each prompt. The directory "" stands for the bare base model.
    """
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    request = json.loads(Path(sys.argv[1]).read_text())
    compute = prepare(request)
    for directory in request["directories"]:
        try:
            found = {"logprobs": compute(directory)}
        except Exception as error:  # noqa: BLE001  (a refusal, in whatever class)
            found = {"refused": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(found), file=lines, flush=True)


def top(values: Any) -> Values:
    """Return the largest of a tensor of log-probabilities."""
    largest = values.float().topk(min(TOP, values.shape[-1]))
    return {
        str(token): value
        for token, value in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
    }
