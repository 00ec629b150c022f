"""One place where a stranger's file becomes ours: who else opens files, and why."""

import ast
from pathlib import Path

import pcb_peft

PACKAGE = Path(pcb_peft.__file__).parent
LIBRARIES = ("json", "torch", "yaml", "pickle", "numpy", "np", "tomllib", "safetensors.torch")

OTHERS = {  # files outside of files/ that open others, and what they read there
    "base/files.py": "asks the library of safetensors for its opinion, too, and reads through files/header.py",
    "base/plain_checkpoint.py": "one tensor of a file whose header was checked when the model was opened",
    "commands/cli.py": "the null device",
    "commands/output.py": "the descriptors of a program that was started without standard streams",
    "commands/sources.py": "the source of this package",
    "deltas/replacements.py": "bytes that safetensors has just made",
    "exporting/in_llama_cpp.py": "what its own child process prints",
    "runtime/hashing.py": "bytes that are only hashed",
    "writing/atomic.py": "bytes that are only copied",
    "writing/chunks.py": "values at places that were checked when the model was opened",
    "writing/growing_file.py": "a file that it writes",
    "writing/lines.py": "the last byte of a log",
    "writing/locks.py": "a file or a directory, to lock it",
    "writing/manifest.py": "bytes that are only hashed",
    "writing/model_card.py": "the first bytes of a card; its front matter goes through files/yaml_text.py",
    "writing/shards.py": "headers that were checked when the model was opened",
    "writing/tensors_file.py": "a file that safetensors has just written",
}


def reads(call: ast.Call) -> bool:
    """Return whether a call opens a file, or turns bytes into objects; not through the functions of files/."""
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if name in ("load", "loads", "load_file"):
        return owner in LIBRARIES
    if name == "open":
        return "block" not in owner  # of a matrix
    return name == "safe_open" or (name in ("read_text", "read_bytes") and owner != "")


def test_strangers_files_are_read_in_one_place():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and reads(call)
    }
    assert {name for name in found if not name.startswith("files/")} == set(OTHERS)
