"""Command lines: words that are wrong, in an order that is wrong, beside files that are in order or not."""

import contextlib
import io
import os
from pathlib import Path
from random import Random
from typing import Any

from fuzz import examples, folders
from fuzz.cases import Attempt, WrongAnswerError
from fuzz.values import ODD, Steps
from pcb_peft.commands import cli
from pcb_peft.commands.exit_codes import BELOW, DONE, NO_SPACE, REFUSED, USAGE
from pcb_peft.errors import OptionError

LINES = [
    "merge A B -o OUT --method ties --density 0.3",
    "merge A B -o OUT --weights 1,0.5 --rank 4 --overwrite all --seed 3",
    "merge RECIPE --dry-run",
    "merge A B --dry-run --max-memory 1GB --scope module --space knots",
    "merge A B -o OUT --base-model BASE --rank full --after norm --override *.up:method=linear",
    "inspect A",
    "inspect A --base-model BASE --json",
    "compare A B",
    "fold A BASE -o OUT --tied refuse",
    "extract BASE --base-model BASE --rank 2 -o OUT",
    "head MERGE h1 -o OUT",
    "export A --to portable -o OUT",
    "export A --to vllm -o OUT --max-rank 8",
    "check A --for vllm",
    "check MERGE",
    "collect A --base-model BASE --data ROWS -o OUT --kind gram --limit 2 --batch-size 1",
    "push A user/name --dry-run",
    "methods",
    "methods pcb",
    "methods --json",
    "distill MERGE A B --base-model BASE --texts ROWS -o OUT --steps 1",
    "evaluate MERGE --adapters A B --base-model BASE --data ROWS ROWS --limit 1 --no-cache",
    "search A B --data ROWS ROWS -o OUT --trials 1 --base-model BASE",
    "--version",
    "--help",
    "merge --help",
]
WORDS = [
    *("--json", "-q", "-v", "--quiet", "--verbose", "-h", "--", "-", "-1", "-1e-3", "1,2,3", "nan"),
    *(
        "1e400",
        "9" * 400,
        "=",
        "--weights",
        "--weights=",
        "--rank",
        "--rank=0",
        "--rank=-1",
        "--seed",
    ),
    *(
        "--override",
        "--overwrite",
        "--options",
        "--density",
        "--density=2",
        "--format",
        "--format=kohya",
    ),
    *(
        "--before",
        "--after",
        "--heads",
        "--head",
        "--metric=random",
        "--statistics",
        "--chain",
        "--scale",
    ),
    *(
        "--max-memory=0",
        "--max-memory=1TB",
        "--max-memory=x",
        "--device=cuda:99",
        "--device=x",
        "--limit",
    ),
    *(
        "none",
        "auto",
        "{}",
        "[1]",
        "a=b",
        "a=b=c",
        ":",
        "*",
        "\ud800",
        "é",
        "a\0b",
        "%s",
        "$HOME",
        "~x",
    ),
    *(
        "/",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        ".",
        "..",
        "A/..",
        "x/" * 500,
        "merge",
        "BASE",
    ),
    *(
        "OUT",
        "RECIPE",
        "ROWS",
        "--report",
        "--report=/",
        "--plot",
        "--companions=x",
        "--revision=\n",
    ),
]
CODES = {DONE, REFUSED, BELOW, NO_SPACE, USAGE}
SLOW = {"distill", "evaluate", "search", "collect"}


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    names = {
        "A": examples.adapter("LoRA"),
        "B": examples.adapter("LoRA", 2),
        "BASE": examples.base("mlp"),
    }
    names |= {
        "OUT": directory / "out",
        "RECIPE": directory / "recipe.yaml",
        "ROWS": directory / "rows.jsonl",
    }
    names["MERGE"] = directory / "merge"
    folders.write(names["MERGE"], folders.files_in(names["A"]))
    names["RECIPE"].write_text(f"adapters: [{names['A']}, {names['B']}]\nmethod: linear\n")
    names["ROWS"].write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    cli.print_unexpected = _raise
    (directory / "here").mkdir()
    os.chdir(directory / "here")  # relative paths lead nowhere else

    def attempt(rng: Random, steps: Steps) -> Any:
        line = rng.choice(LINES)
        if line.split()[0] in SLOW and rng.random() < 0.9:
            line = rng.choice(LINES)
        words = line.split()
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            words = _changed(words, rng)
        words = [str(names.get(word, word)) for word in words]
        steps.append(" ".join(words)[:400])
        return _run(words)

    return attempt


def _raise(error: Exception, _: object) -> None:
    raise error


def _run(words: list[str]) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:  # --help
            code = end.code
    said = err.getvalue()
    if code not in CODES:
        raise WrongAnswerError(f"exit status {code}: {said[-300:]}")
    if "Traceback" in said or "\x1b" in said + out.getvalue():
        raise WrongAnswerError(f"a traceback, or an escape: {said[-300:]}")
    if code not in (DONE, BELOW):
        if said.count("error:") == 0:
            raise WrongAnswerError(f"status {code} without a message")
        raise OptionError(said[:200])
    return str(code)


def _changed(words: list[str], rng: Random) -> list[str]:
    words = list(words)
    place = rng.randrange(len(words) + 1)
    how = rng.choice(("replace", "replace", "insert", "insert", "remove", "swap", "repeat", "odd"))
    if how == "insert" or place == len(words):
        words.insert(place, rng.choice(WORDS))
    elif how == "replace":
        words[place] = rng.choice(WORDS)
    elif how == "remove":
        del words[place]
    elif how == "swap":
        other = rng.randrange(len(words))
        words[place], words[other] = words[other], words[place]
    elif how == "repeat":
        words.insert(place, words[place])
    else:
        words[place] = str(rng.choice(ODD))
    return words
