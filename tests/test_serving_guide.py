"""The commands in docs/serving.md, the Dockerfile and the workflows run, and the extras exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from advmoe_export.serve.command import parse
from PIL import Image
from serving import server

from advmoe.cli.app import main
from advmoe.models.network import RoutedNetwork
from advmoe.training.checkpoint import Checkpoint, save_checkpoint

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "serving.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
EXTRAS = tomllib.loads((ROOT / "export" / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_vgg: Callable[..., RoutedNetwork]) -> Path:
    """A folder with a checkpoint, its exported model and two photographs."""
    folder = tmp_path_factory.mktemp("desk")
    model = tiny_vgg(warm=True)
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    save_checkpoint(folder / "best.pt", Checkpoint(model=model.config, weights=model.state_dict(), class_names=names))
    assert main(["export", str(folder / "best.pt"), str(folder / "model.onnx")]) == 0
    for seed, name in enumerate(("cat", "dog")):
        pixels = np.random.default_rng(seed).integers(0, 256, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def shell(desk: Path, tmp_path: Path) -> Callable[[str], str]:
    """Runs commands in the folder, with `advmoe` that of this tree and port 8000 a free one."""
    (tmp_path / "advmoe").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m advmoe "$@"\n')
    (tmp_path / "advmoe").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "no_proxy": "*"}

    def run(commands: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-m", "-c", commands.replace("8000", str(port))],
            cwd=desk,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_commands_of_the_guide_run(shell: Callable[[str], str]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the guide uses curl")
    started, helped, exported = (shell(commands) for commands in blocks("console"))
    answer = json.loads(re.findall(r"\{.*?\}$", started.replace('{"ready":true}', ""), re.DOTALL)[0])
    assert answer["label"] in {entry["label"] for entry in answer["top"]}
    assert len(answer["pathway"]) == 12
    assert helped.startswith("usage: advmoe serve")
    assert exported.endswith("1\nconfig.pbtxt\nlabels.txt\n")


def test_the_programs_of_the_guide_run(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("no_proxy", "*")
    session, protocol = blocks("python")
    with server(desk / "model.onnx") as (_, http):
        here = str(http.base_url)
        for program in (session, protocol.replace("http://localhost:8000", here)):
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout


def test_the_guide_names_every_option_that_sets_a_bound_and_no_other() -> None:
    mentioned = set(re.findall(r"`(--[a-z-]+)`", GUIDE))
    options = [name for name in mentioned if name not in ("--verify-images",)]
    assert {"--max-queue", "--max-upload-mb", "--max-megapixels", "--max-batch", "--timeout", "--grace"} <= mentioned
    for option in options:
        value = "127.0.0.1" if option == "--host" else "1"
        parse(["model.onnx", option, value], "advmoe serve")


def test_the_containers_commands_are_those_of_the_package(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tomllib.loads((ROOT / "export" / "pyproject.toml").read_text())["project"]["scripts"]
    entries = [json.loads(text) for text in re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)]
    providers = []
    for program, *arguments in entries:
        assert program in scripts
        config = parse([*arguments, "/models/model.onnx"], program)
        assert (config.host, config.port) == ("0.0.0.0", 8000)
        providers.append(config.provider)
    assert providers == [("cuda", "cpu"), ("cpu",)]
    for extras in re.findall(r"/src/export\[(.*?)\]", DOCKERFILE):
        assert set(extras.split(",")) <= EXTRAS.keys()
    (check,) = re.findall(r"^HEALTHCHECK .*?CMD (.*)$", DOCKERFILE, re.MULTILINE)
    _, flag, program = json.loads(check)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing listens
    with server(desk / "model.onnx") as (_, http):
        here = program.replace("8000", str(http.base_url.port))
        assert here != program
        assert subprocess.run([sys.executable, flag, here], check=False).returncode == 0
    assert subprocess.run([sys.executable, flag, here], capture_output=True, check=False).returncode != 0


def test_no_document_installs_both_runtimes() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "export/README.md", ROOT / "Dockerfile"]
    documents += [ROOT / "Makefile", ROOT / "advmoe/cli/exporter.py", *ROOT.glob(".github/workflows/*.yml")]
    found = set()
    for path in documents:
        for extras in re.findall(r"(?:advmoe-export|\./export|/src/export)\[([a-z,]+)\]", path.read_text()):
            names = set(extras.split(","))
            assert names <= EXTRAS.keys(), (path, extras)
            assert not {"cpu", "gpu"} <= names, (path, extras)
            found.add(path.name)
    assert {"README.md", "serving.md", "export.md", "exporter.py", "Dockerfile"} <= found


def test_the_workflows_use_targets_and_files_that_exist() -> None:
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        for job in workflow["jobs"].values():
            if "uses" in job:
                assert (ROOT / job["uses"]).is_file()
            for step in job.get("steps", []):
                for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
                    assert target in targets
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}  # and no password
    assert release["jobs"]["publish"]["needs"] == ["test", "wheels"]


def test_the_citation_names_the_version_of_the_package() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "export" / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["preferred-citation"]["year"] == 2023
    paper = "https://arxiv.org/abs/2308.10110"
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert project["urls"]["Paper"] == urls["Paper"] == paper
    assert paper.rsplit("/", 1)[1] in citation["preferred-citation"]["identifiers"][0]["value"]
