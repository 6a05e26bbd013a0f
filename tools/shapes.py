"""Check that each letter of a shape suffix has one meaning, which CONTRIBUTING.md states.

    python tools/shapes.py

A name such as `logits_BRN` ends in a letter for each axis. A file that uses such names lists their
letters at its head, after "Shape suffixes:", in the words of CONTRIBUTING.md. Shapes in prose, such
as [B, C], use the same letters.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("advmoe", "export", "benchmarks", "studies")
SUFFIXED = re.compile(r"_*[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)")
SHAPE = re.compile(r"(?<![\w\]])\[([A-Z](?:, [\w ]+)*)\]")
LEGEND = re.compile(r"Shape suffixes: (.*?)\.\s*(?:$|\n\n)", flags=re.S)


def meanings(text: str) -> dict[str, str]:
    """Letter -> meaning in the first legend of a text, without additions in parentheses."""
    found = LEGEND.search(text)
    if found is None:
        return {}
    listed = re.sub(r"\s*\([^)]*\)", "", " ".join(found[1].split()))
    return {entry[0]: entry[2:] for entry in listed.split(", ")}


def letters(source: str) -> tuple[set[str], set[str]]:
    """Letters of the shape suffixes of a file, and letters of the shapes in its prose."""
    names: set[str] = set()
    prose: set[str] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and (match := SUFFIXED.fullmatch(token.string)):
            names.update(letter for letter in match[1] if letter.isalpha())
        elif token.type in {tokenize.STRING, tokenize.COMMENT}:
            prose.update(axis for shape in SHAPE.findall(token.string) for axis in shape.split(", ") if len(axis) == 1)
    return names, {letter for letter in prose if letter.isupper()}


def wrong_legend(source: str, stated: Mapping[str, str]) -> Iterator[str]:
    """Differences between the legend of a file and its letters: missing, unused or described differently."""
    legend = meanings(ast.get_docstring(ast.parse(source)) or "")
    names, prose = letters(source)
    for letter in sorted(names | prose | set(legend)):
        if letter not in stated:
            yield f"CONTRIBUTING.md does not say what the letter {letter} means"
        elif letter in names and letter not in legend:
            yield f"the legend at the head lacks '{letter} {stated[letter]}'"
        elif letter in legend and letter not in names | prose:
            yield f"no shape has the letter {letter} of the legend"
        elif letter in legend and legend[letter] != stated[letter]:
            yield f"the legend says '{letter} {legend[letter]}' for '{letter} {stated[letter]}'"


def problems() -> list[str]:
    """All wrong legends, by file."""
    stated = meanings((ROOT / "CONTRIBUTING.md").read_text())
    return [
        f"{path.relative_to(ROOT)}: {problem}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for problem in wrong_legend(path.read_text(), stated)
    ]


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or "every letter of a shape means one thing")
    sys.exit(bool(found))
