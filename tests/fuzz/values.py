"""Odd values, and small changes of JSON, of texts and of bytes."""

import copy
import json
from random import Random
from typing import Any

Steps = list[str]
"""What was changed, in words, for the report of a case."""

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1000, 10**6, 10**9, 2**31, 2**53 + 1, 2**63, -(2**63)),
    *(10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -3.7, 1e-320, 1e-8, 1e38, 1e300, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "3", "nan", "1e400", "a\nb\x1b[31m", "\ud800", "\0", "é", "x" * 5000),
    *("..", "../../etc/passwd", "/", "/dev/zero", "/dev/null", "~nouser/x", "~", "a/b", "C:\\x"),
    *("(a+)+$", "(?!x)", "(a)\\1", "(", "[", ".*", "^", "a{1001}", "*", "re:(", "re:.*", "auto"),
    *("LORA", "IA3", "ADALORA", "LOHA", "VERA", "XLORA", "PROMPT_TUNING", "lora", "all-linear"),
    *("global", "linear", "pcb", "ties", "dense", "full", "lossless", "none", "all", "random"),
    *([], [[]], [None], [0], [-1], ["x"], ["x", "x"], [1.5], [[1], [2]], [10**9], ["x"] * 3000),
    *({}, {"": None}, {"x": 3}, {"x": {"x": {}}}, {"(a+)+": 4}, {"q_proj": -1}, {"0": ["x"]}),
]


def odd(rng: Random) -> Any:
    """One odd value."""
    return copy.deepcopy(rng.choice(ODD))


def mutated(tree: Any, rng: Random, steps: Steps) -> Any:
    """A copy of JSON content in which one to three things are different."""
    box = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(box))
        holder, key = rng.choice(places)
        change = rng.choice(CHANGES)
        steps.append(f"{change.__name__.strip('_')} {key!r}")
        change(holder, key, rng, places)
    return box[0]


def _places(holder: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for key in holder if isinstance(holder, dict) else range(len(holder)):
        found.append((holder, key))
        if isinstance(holder[key], dict | list):
            found += _places(holder[key])
    return found


def _replace(holder: Any, key: Any, rng: Random, _: Any) -> None:
    holder[key] = odd(rng)


def _remove(holder: Any, key: Any, rng: Random, _: Any) -> None:
    del holder[key]
    if isinstance(holder, list) and not holder:
        holder.append(odd(rng))


def _wrap(holder: Any, key: Any, rng: Random, _: Any) -> None:
    holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 2))


def _other_type(holder: Any, key: Any, rng: Random, _: Any) -> None:
    value = holder[key]
    if isinstance(value, dict):
        holder[key] = list(value)
    elif isinstance(value, list):
        holder[key] = {str(item): number for number, item in enumerate(value)}
    else:
        holder[key] = rng.choice((str(value), [value], not value))


def _from_elsewhere(holder: Any, key: Any, rng: Random, places: Any) -> None:
    other, place = rng.choice(places)
    holder[key] = copy.deepcopy(other[place]) if _is_there(other, place) else odd(rng)


def _rename(holder: Any, key: Any, rng: Random, _: Any) -> None:
    if isinstance(holder, dict):
        name = odd(rng)
        holder[name if isinstance(name, str) else str(key) + "x"] = holder.pop(key)
    else:
        holder[key] = odd(rng)


def _add(holder: Any, key: Any, rng: Random, places: Any) -> None:
    other, place = rng.choice(places)
    value = copy.deepcopy(other[place]) if _is_there(other, place) else odd(rng)
    if isinstance(holder, dict):
        name = odd(rng)
        holder[name if isinstance(name, str) else "x"] = value
    else:
        holder.insert(key, value)


def _nudge(holder: Any, key: Any, rng: Random, _: Any) -> None:
    value = holder[key]
    if isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        holder[key] = (
            value[:place] + rng.choice((".", "/", "\n", "x", "", "*")) + value[place + 1 :]
        )
    elif isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 1000, value * 10**9))
    else:
        holder[key] = odd(rng)


def _is_there(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


CHANGES = (
    *(_replace, _replace, _replace, _remove, _wrap, _other_type, _from_elsewhere, _rename, _add),
    _nudge,
)


def json_bytes(tree: Any, rng: Random, steps: Steps) -> bytes:
    """JSON content as a file; now and then its text is damaged as well."""
    content = json.dumps(tree).encode()
    return damaged(content, rng, steps) if rng.random() < 0.15 else content


TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b":",
        b",",
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"\\u0000",
    ),
    *(
        b'"\\ud800"',
        b"\xff",
        b"\xef\xbb\xbf",
        b"\0",
        b"\n",
        b"\r",
        b"\t",
        b"9" * 5000,
        b"[" * 100_000,
    ),
    *(
        b'{"a":' * 5000,
        b"true",
        b"1.",
        b"// x",
        b"\x1b[31m",
        b"'",
        b"&a",
        b"*a",
        b"!!",
        b"? ",
        b"<<: ",
    ),
]


def damaged(content: bytes, rng: Random, steps: Steps) -> bytes:
    """Bytes of which one to four places are changed, cut, repeated or filled."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((0, 1, 1, 2, 8, 60)))
        change = rng.choice(("flip", "token", "cut", "remove", "repeat", "empty"))
        steps.append(f"{change} bytes {start} to {end}")
        if change == "flip":
            content = content[:start] + rng.randbytes(end - start) + content[end:]
        elif change == "token":
            content = content[:start] + rng.choice(TOKENS) + content[end:]
        elif change == "cut":
            content = content[:start]
        elif change == "remove":
            content = content[:start] + content[end:]
        elif change == "repeat":
            content = content[:end] + content[start:]
        elif rng.random() < 0.1:
            content = b""
    return content
