"""Docstrings start with what the thing is or does: "Size in bytes of the file", not "Of the file, in bytes"."""

import ast
from pathlib import Path

import pcb_peft

ROOT = Path(pcb_peft.__file__).parent
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# A first line that starts so has neither a verb in the imperative nor the noun that it is about.
PREPOSITIONS = {"as", "at", "by", "for", "from", "in", "of", "on", "to", "with"}
PRONOUNS = {"that", "these", "this", "those", "what", "which", "who", "whose"}
QUESTIONS = {"how", "if", "when", "where", "whether", "why"}
FORBIDDEN = PREPOSITIONS | PRONOUNS | QUESTIONS | {"also", "be"}


def first_lines() -> dict[str, str]:
    """File and line of whatever has a docstring, to the docstring's first line."""
    return {
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}": text.split("\n")[0]
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, DOCUMENTED)
        if (text := ast.get_docstring(node))
    }


def test_a_docstring_starts_with_a_verb_or_with_its_noun():
    lines = first_lines()
    assert len(lines) > 500
    riddles = {
        place: line
        for place, line in lines.items()
        if line.split()[0].strip("`,.:").lower() in FORBIDDEN
    }
    assert not riddles
