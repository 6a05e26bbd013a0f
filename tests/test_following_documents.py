"""The commands in the README and the tutorial run; commands in all documents have the options they name.

Every command in a `console` block of these two pages runs, in the order of the page. `SMALLER`
replaces settings that would take hours or a download. `NOT_RUN` lists commands that cannot run in a
test, with the reason.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from advmoe_export.serve.command import parse
from PIL import Image

from advmoe.cli.app import command_line, main
from advmoe.data.digits import load_digits

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "export" / "README.md", *ROOT.glob("docs/*.md")])
COMMANDS: dict[str, Any] = command_line().commands

SMALLER = {
    # The tutorial: networks are as small as they get, epochs and attacks as few.
    "--epochs 30": "--epochs 1 --width 0.0625 --steps 1",
    "evaluate runs/photos": "evaluate --steps 2 --diagnose 4 --no-latency runs/photos",
    # The README: its CIFAR-10 would be downloaded and trained for hours. Digits come with the
    # package.
    "train cifar10 --arch vgg16 ": "train digits --arch vgg16 --width 0.0625 --epochs 1 --steps 1 --limit-train 128 "
    "--val-limit 20 --out runs/cifar10-vgg16-moe-advmoe ",
    "evaluate runs/cifar10-vgg16-moe-advmoe": "evaluate runs/cifar10-vgg16-moe-advmoe --steps 2 --limit-eval 20 "
    "--diagnose 4 --no-latency",
    # Another test may be using the port.
    "serve    model.onnx ": "serve    model.onnx --port 8000 ",
}
NOT_RUN = {
    "make demo": "takes minutes; the tests run its commands one by one",
    "make test": "would start itself",
    "pip install": "needs a network",
    "serve    model.onnx ": "goes on until it is stopped; the tutorial starts and stops it",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def followed(page: Path) -> list[str]:
    """The commands of a page, smaller ones where that is said above, block by block."""
    found = []
    for block in blocks(page, "console"):
        kept = [line for line in block.splitlines(keepends=True) if not any(name in line for name in NOT_RUN)]
        text = "".join(kept)
        for usual, smaller in SMALLER.items():
            text = text.replace(usual, smaller)
        found.append(text)
    return found


def photograph(path: Path, seed: int, hue: tuple[int, int, int]) -> None:
    """An image of a size of its own, whose color tells its class."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(36, 60, 2)
    pixels = np.clip(rng.normal(hue, 60, (height, width, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(commands: str, folder: Path) -> str:
    """Run the commands of a block, and return what they printed on stdout.

    A block that only calls `advmoe` runs in this process, which has imported torch already; any
    other in a shell.
    """
    lines = [line for line in commands.splitlines() if line.strip()]
    if all(line.startswith("advmoe ") and "&" not in line for line in lines):
        return "".join(map(in_this_process, lines))
    return in_a_shell(commands, folder)


def in_this_process(line: str) -> str:
    """Run one command, with its output in a file if it ends in `> file`."""
    words = shlex.split(line, comments=True)[1:]
    command, target = (words[:-2], words[-1]) if words[-2] == ">" else (words, os.devnull)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(command) == 0, line
    Path(target).write_text(said.getvalue())
    return said.getvalue()


def in_a_shell(commands: str, folder: Path) -> str:
    """As a user would, with `advmoe` that of this tree and port 8000 a free one."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / "advmoe"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m advmoe "$@"\n')
    program.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        ["bash", "-e", "-m", "-c", commands.replace("8000", str(port))],
        cwd=folder,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_tutorial_leads_from_photographs_to_a_served_model(desk: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the tutorial uses curl")
    hues = {"beach": (220, 200, 120), "forest": (40, 120, 50)}
    for number, (name, hue) in enumerate(hues.items()):
        for picture in range(1, 21):
            photograph(desk / "photos" / name / f"IMG_{picture}.jpg", 100 * number + picture, hue)
    said = [follow(commands, desk) for commands in followed(ROOT / "docs" / "tutorial.md")]
    # Every fifth of 20 photographs a class is a test image: 16 and 4.
    assert [len(list((desk / "data" / part).rglob("*.jpg"))) for part in ("train", "val")] == [32, 8]
    card = json.loads((desk / "runs/photos/evaluation/card.json").read_text())
    assert (card["advmoe"]["images"], card["eps"]) == (8, "2/255")
    assert "Can these numbers be trusted?" in (desk / "report.html").read_text()
    rows = list(csv.DictReader((desk / "labels.csv").read_text().splitlines()))
    assert len(rows) == 40
    assert rows[0]["image"] == "photos/beach/IMG_1.jpg"
    assert {row["label"] for row in rows} <= hues.keys()
    chosen = json.loads((desk / "labels.json").read_text())["predictions"]
    assert [Path(each["image"]).stem for each in chosen][:3] == ["IMG_1", "IMG_10", "IMG_11"]
    served = json.loads(said[-1].replace('{"ready":true}', ""))
    assert served["label"] == rows[0]["label"]  # the page, the table and the server agree


@pytest.mark.slow
def test_the_readme_can_be_followed(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_digits().test.images
    for name, image in zip(("cat.png", "dog.jpg"), digits, strict=False):
        Image.fromarray(image).save(desk / name)
    said = "".join(follow(commands, desk) for commands in followed(ROOT / "README.md"))
    assert "cat.png" in said
    images = "import numpy as np, torch\nimages = torch.rand(2, 3, 32, 32)\n"
    ours, served = blocks(ROOT / "README.md", "python")
    exec(images + ours, {})
    exec(f"{images}images = images.numpy()\n{served}", {})


def test_what_is_made_smaller_or_left_out_is_in_the_pages() -> None:
    text = "".join(block for name in ("README.md", "docs/tutorial.md") for block in blocks(ROOT / name, "console"))
    for part in (*SMALLER, *NOT_RUN):
        assert part in text, f"{part!r} is in no page any more"


def calls(page: Path) -> Iterator[list[str]]:
    """The words of every `advmoe` command in a page: in blocks, and between backticks."""
    text = page.read_text()
    fenced = re.findall(r"^```(?:console|sh|bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    quoted = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in (*lines, *(part.replace("\n", " ") for part in quoted)):
        for call in re.findall(r"(?:^|\s)(?:-m )?advmoe((?: +[^|&>#;]+)?)", line):
            yield call.replace("…", "").replace("...", "").split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_of_a_page_exists(page: Path) -> None:
    for words in calls(page):
        if not words or words[0].startswith("--") or not words[0].isascii() or words[0] == "COMMAND":
            continue
        assert words[0] in COMMANDS, words
        asked = {word.split("=")[0] for word in words if word.startswith("--") and len(word) > 2}
        if words[0] == "serve":
            parse(["model.onnx", *(part for name in asked for part in (name, "1"))], "advmoe serve")
            continue
        known = {
            name for parameter in COMMANDS[words[0]].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert asked <= known | {"--help"}, (words, asked - known)
