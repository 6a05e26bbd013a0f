"""Markdown pages: the links, files and options that they name exist."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from advmoe_export.serve.config import ServeConfig

from advmoe.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("export/*.md"), *ROOT.glob("rust_router/*.md")])
HOMES = (ROOT, ROOT / "advmoe", ROOT / "export/advmoe_export", ROOT / "rust_router", ROOT / "rust_router/src")
"""Folders that a path in a page may be relative to."""
SUFFIXES = (".py", ".rs", ".ipynb", ".toml", ".json", ".svg", ".j2", ".html", ".npz")
NOT_OURS = ("runs/", "results/small/NETWORK/")
"""Beginnings of paths that a user's files have."""
WIDTH = 100
"""The longest line of a page, in characters."""
FOREIGN = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--model-repository"}
FOREIGN |= {"--max-restarts", "--rdzv-id", "--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node"}
FOREIGN |= {"--cpus-per-task", "--time", "--requeue", "--signal"}
FOREIGN |= {
    "--silent",
    "--fail",
    "--data-binary",
    "--target",
    "--tag",
    "--publish",
    "--volume",
    "--gpus",
    "--release",
    "--logdir",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, heading = target.partition("#")
        other = (page.parent / file) if file else page
        assert other.exists(), target
        if heading:
            assert heading in anchors(other.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_as_wide_as_their_page_allows(page: Path) -> None:
    assert not [(number, line) for number, line in prose(page.read_text()) if len(line) > WIDTH]


def test_tables_code_and_single_links_may_be_wider() -> None:
    ours = ("prose", "- an item", "[a link](a.md) and more")
    exempt = ("| cell |", "    code", "```sh\ncode\n```", "- [a link](a.md).", "![an image](a.svg)")
    assert [line for _, line in prose("\n".join((*ours, *exempt, "the end")))] == [*ours, "the end"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    for path in named_files(page.read_text()):
        assert any((home / path).exists() for home in HOMES), path


def test_named_options_exist() -> None:
    known = set(options(typer.main.get_command(app))) | FOREIGN
    known |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ServeConfig)}
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("studies/*.py")]:
        known |= set(re.findall(r'"(--[a-z][a-z-]+)"', script.read_text()))
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text()):
            assert option in known, (page.name, option)


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a page outside tables and code, and without lines that are one link or image."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not (
            fenced
            or line.startswith("    ")
            or line.lstrip().startswith("|")
            or re.fullmatch(r"\W*!?\[[^\]]*\]\([^)]*\)\W*", line)
        ):
            yield number, line


def named_files(text: str) -> set[str]:
    """Paths between single backticks that have a folder and a known suffix, `{a,b}` expanded."""
    found = set()
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        for word in quoted.split():
            if "/" in word and word.endswith(SUFFIXES) and re.fullmatch(r"[\w./{},-]+", word):
                parts = [part.split(",") for part in re.split(r"[{}]", word)]
                found |= {path for path in map("".join, itertools.product(*parts)) if not path.startswith(NOT_OURS)}
    return found


def options(command: object) -> list[str]:
    """All options of a command and of its subcommands."""
    own = [
        name for parameter in getattr(command, "params", ()) for name in (*parameter.opts, *parameter.secondary_opts)
    ]
    return own + [name for other in getattr(command, "commands", {}).values() for name in options(other)]
