"""The hub: uploaded files, the model card, and loading. A local server replaces the hub."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import advmoe
from advmoe.cli.app import main
from advmoe.config import ModelConfig, TrainConfig, to_dict
from advmoe.data.digits import DIGITS
from advmoe.errors import CheckpointError, ConfigError
from advmoe.hub import SILENCE, _network_errors, fetch, hub_errors, is_address
from advmoe.models.registry import build_model
from advmoe.reports.model_card import model_card
from advmoe.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

REVISION = "1" * 40
MODEL = ModelConfig(arch="vgg16", kind="s_dense", width=0.0625, mean=DIGITS.mean, std=DIGITS.std)


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: `files[repository][name]`."""

    files: dict[str, dict[str, bytes]]
    private: set[str]
    refuses: int | None = None
    """Status of every answer, if it is not None."""

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.refuses is not None:
            self.answer(self.refuses)
        elif self.path == "/api/whoami-v2":
            self.answer_json({"name": "owner"})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            content = self.files.get(found[1], {}).get(found[3])
            if content is None:
                code = "EntryNotFound" if found[1] in self.files else "RepoNotFound"
                self.answer(404, X_Error_Code=code, X_Repo_Commit=REVISION)
                return
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=REVISION)
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
            files = self.files.get(found[1], {})
            self.answer_json([{"type": "file", "path": name, "size": 1, "oid": REVISION} for name in files])
        elif found := re.match(r"/api/models/([^/]+/[^/]+)", self.path):
            name = found[1]
            if name not in self.files:
                self.answer(404, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": file} for file in self.files.get(name, {})]
            self.answer_json(
                {"id": name, "sha": REVISION, "siblings": siblings, "private": name in self.private, "tags": []}
            )
        else:
            self.answer(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'nobody')}/{asked['name']}"
            address = json.dumps({"url": f"http://{self.headers['Host']}/{name}"}).encode()
            if name in self.files:
                self.answer(409, address, Content_Type="application/json")
                return
            self.files[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":  # of older and newer versions
                self.private.add(name)
            self.answer(200, address, Content_Type="application/json")
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self.answer_json({"files": modes})
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[found[1]][entry["value"]["path"]] = content
                elif entry["key"] == "deletedFile":
                    del self.files[found[1]][entry["value"]["path"]]
            self.answer_json(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{REVISION}",
                    "commitOid": REVISION,
                    "success": True,
                }
            )
        else:
            self.answer_json({"errors": [], "warnings": []})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, dict[str, bytes]]]:
    """Repositories of a hub that `huggingface_hub` talks to over HTTP."""
    constants = pytest.importorskip("huggingface_hub.constants")
    files: dict[str, dict[str, bytes]] = {}
    handler = type("Handler", (Hub,), {"files": files, "private": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    yield files
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a checkpoint."""
    torch.manual_seed(0)
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    names = tuple(f"digit {number}" for number in range(10))
    weights, train = build_model(MODEL).state_dict(), to_dict(TrainConfig(dataset="digits", method="at"))
    save_checkpoint(path / "best.pt", Checkpoint(model=MODEL, weights=weights, class_names=names, train=train))
    return path


CARD: dict[str, Any] = {
    "dataset": "digits",
    "advmoe": {
        "images": 360,
        "sa": 91.2345,
        "ra_pgd50": 61.5,
        "ra_aa": 58.0,
        "seed": 7,
        "attack": {"eps": 8 / 255, "steps": 50, "step_size": 2 / 255, "restarts": 1, "start": "uniform"},
        "trusted": False,
        "diagnostics": [{"name": "black_box", "status": "failed", "value": "3 images", "expected": "0"}],
    },
}


def test_a_pushed_model_is_loaded_from_its_address(
    hub: dict[str, dict[str, bytes]], run: Path, capsys: pytest.CaptureFixture[str], images: torch.Tensor
) -> None:
    assert main(["push", str(run), "owner/digits", "--no-onnx", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["address"].endswith("/owner/digits")
    assert set(hub["owner/digits"]) == {"README.md", "config.json", "model.safetensors"} == set(found["files"])
    assert json.loads(hub["owner/digits"]["config.json"])["model"]["arch"] == "vgg16"

    model, original = advmoe.load("hf://owner/digits"), advmoe.load(run / "best.pt")
    assert torch.equal(model(images), original(images))
    assert model.class_names == original.class_names
    assert load_checkpoint(f"hf://owner/digits@{REVISION}").train == load_checkpoint(run / "best.pt").train

    line = "train digits --kind s_dense --method at --width 0.0625 --epochs 1 --batch-size 8 --limit-train 8 --steps 1"
    out = str(run.parent / "next")
    assert main([*line.split(), "--val-limit", "4", "--init", "hf://owner/digits", "--out", out]) == 0
    assert 'init = "hf:/owner/digits"' in (run.parent / "next" / "run.toml").read_text()


def test_a_public_repository_gets_nothing_that_should_be_private(
    hub: dict[str, dict[str, bytes]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "owner/mine", "--no-onnx", "--private"]) == 0
    assert main(["push", str(run), "owner/mine", "--no-onnx", "--private"]) == 0, "it is private already"
    hub["owner/known"] = {"README.md": b"public"}
    capsys.readouterr()
    assert main(["push", str(run), "owner/known", "--no-onnx", "--private"]) == 1
    assert "owner/known exists and is public, so nothing was uploaded" in capsys.readouterr().err
    assert hub["owner/known"] == {"README.md": b"public"}


def test_a_second_push_leaves_no_file_of_the_model_before(hub: dict[str, dict[str, bytes]], run: Path) -> None:
    hub["owner/digits"] = dict.fromkeys(("model.onnx", "model.onnx.data", "card.json"), b"of another model")
    hub["owner/digits"]["notes.txt"] = b"of the owner"
    assert main(["push", str(run), "owner/digits", "--no-onnx"]) == 0
    assert set(hub["owner/digits"]) == {"README.md", "config.json", "model.safetensors", "notes.txt"}


def test_a_dry_run_writes_what_would_be_uploaded_and_contacts_nobody(
    hub: dict[str, dict[str, bytes]], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "owner/digits", "--no-onnx"]) == 0
    out = run.parent / "look"
    monkeypatch.setattr("advmoe.hub.hub_errors", None)
    capsys.readouterr()
    command = ["push", str(run), "owner/digits", "--no-onnx", "--out", str(out), "--json"]
    assert main(command) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert json.loads(capsys.readouterr().out) == {"address": str(out), "files": sorted(files)}
    assert files == hub["owner/digits"]
    assert advmoe.load(out / "model.safetensors").class_names[0] == "digit 0"
    assert main(command) == 1
    assert "look exists; give a new folder (--out)" in capsys.readouterr().err


@pytest.mark.slow
def test_an_onnx_file_lies_beside_the_weights(hub: dict[str, dict[str, bytes]], run: Path) -> None:
    pytest.importorskip("onnx_ir")
    assert main(["push", str(run), "owner/digits"]) == 0
    assert {"model.onnx", "model.onnx.data"} <= set(hub["owner/digits"])


@pytest.mark.slow
def test_a_model_on_the_hub_is_evaluated_and_exported_as_the_run_it_came_from(
    hub: dict[str, dict[str, bytes]], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx_ir")
    of_run = load_checkpoint(run / "best.pt")
    save_checkpoint(run / "best.pt", dataclasses.replace(of_run, class_names=DIGITS.class_names))
    assert main(["push", str(run), "owner/digits-v1.5", "--no-onnx"]) == 0
    small = ["--steps", "1", "--limit-eval", "20", "--diagnose", "0", "--no-latency", "--json"]
    found = []
    for place in ("hf://owner/digits-v1.5", str(run)):
        capsys.readouterr()
        assert main(["evaluate", place, *small, "--out", str(tmp_path / str(len(found)))]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert (found[0]["sa"], found[0]["ra"]) == (found[1]["sa"], found[1]["ra"])
    assert json.loads((tmp_path / "0" / "card.json").read_text())["name"] == "owner/digits-v1.5"
    assert main(["export", "hf://owner/digits-v1.5", str(tmp_path / "a.onnx"), "--verify-images", "4"]) == 0
    assert main(["export", str(run), str(tmp_path / "b.onnx"), "--verify-images", "4"]) == 0
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()
    assert main(["info", "hf://owner/digits-v1.5", "--json"]) == 0


@pytest.fixture
def evaluated(run: Path) -> Path:
    """The run folder with an evaluation of its checkpoint, and beside it that of a control."""
    of_run = load_checkpoint(run / "best.pt")
    save_checkpoint(run / "best.pt", dataclasses.replace(of_run, class_names=DIGITS.class_names))
    small = ["--steps", "1", "--limit-eval", "20", "--diagnose", "0", "--no-latency", "--json"]
    assert main(["evaluate", str(run), *small, "--out", str(run / "evaluation")]) == 0
    changed_card(run / "evaluation", run / "evaluation" / "control-averaged", control="averaged")
    return run


def changed_card(source: Path, target: Path, **changes: Any) -> None:
    """The card of another folder with other entries under `advmoe`."""
    target.mkdir(exist_ok=True)
    card = json.loads((source / "card.json").read_text())
    (target / "card.json").write_text(json.dumps(card | {"advmoe": card["advmoe"] | changes}))


def test_the_evaluation_of_the_pushed_file_is_published_and_no_other(
    hub: dict[str, dict[str, bytes]], evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def push(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(["push", str(evaluated), "owner/digits", "--no-onnx", *options]), capsys.readouterr().err

    folder, other = evaluated / "evaluation", tmp_path / "other"
    assert push()[0] == 0  # the control in the run folder does not count
    published = json.loads(hub["owner/digits"]["card.json"])
    assert published == json.loads((folder / "card.json").read_text())
    assert f"| SA, clean images | {published['advmoe']['sa']:.2f} |" in hub["owner/digits"]["README.md"].decode()
    hub.clear()

    model = published["advmoe"]["model"]
    for changes, message in (
        ({"control": "averaged"}, "other is no evaluation of .*best.pt: its model is the control 'averaged'"),
        ({"checkpoint_sha256": "0" * 64}, "it is of a file with SHA-256 000000000000, this has [0-9a-f]{12};"),
        (
            {"checkpoint_sha256": None, "model": model | {"arch": "resnet18"}},
            "it is of a model whose arch is resnet18, this has vgg16; choose or make one .--evaluation.",
        ),
    ):
        changed_card(folder, other, **changes)
        code, err = push("--evaluation", str(other))
        assert code == 1
        assert re.search(message, err)
    changed_card(folder, other, checkpoint_sha256=None)  # by an earlier version
    assert push("--evaluation", str(other))[0] == 0
    hub.clear()

    changed_card(folder, evaluated / "of last.pt", checkpoint_sha256="0" * 64)
    assert push()[0] == 0
    changed_card(folder, evaluated / "again")
    code, err = push()
    assert code == 1
    assert "mine holds 2 evaluations; choose one" in err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner/nothing", "hf://owner/nothing is not there, or is private"),
        ("hf://owner/empty", "hf://owner/empty has no model.safetensors: it was not uploaded by this project"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: dict[str, dict[str, bytes]], address: str, message: str) -> None:
    hub["owner/empty"] = {}
    with pytest.raises(CheckpointError, match=message) as caught:
        advmoe.load(address)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_gives_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    with pytest.raises(CheckpointError, match="the hub cannot give or take hf://owner/name") as caught:
        fetch("hf://owner/name")
    assert "\n" not in str(caught.value)


@pytest.fixture
def silent_hub(hub: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Replaces the hub by one that takes connections and never answers."""
    monkeypatch.setattr("advmoe.hub.CONTACT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system takes the connections
        yield lambda: monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")


def test_a_hub_that_never_answers_gives_one_line(
    silent_hub: Callable[[], None], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent_hub()
    monkeypatch.setattr("advmoe.hub.SILENCE", 0.1)
    for command in (["push", str(run), "owner/digits", "--no-onnx"], ["info", "hf://owner/digits"]):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search("the hub cannot give or take .*owner/digits: timed out; check the network and .HF_ENDP", line)


def test_a_model_in_the_cache_is_used_if_the_hub_does_not_answer(
    hub: dict[str, dict[str, bytes]], silent_hub: Callable[[], None]
) -> None:
    hub["owner/digits"] = {"model.safetensors": b"weights"}
    cached = fetch("hf://owner/digits")
    silent_hub()
    assert fetch("hf://owner/digits") == cached


def test_a_hub_that_falls_silent_after_a_lost_connection_gives_one_line(
    silent_hub: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import http_backoff

    def upload() -> None:
        with hub_errors("owner/name") as library:
            with pytest.raises(_network_errors(library), match="refused"):
                http_backoff("PUT", "http://127.0.0.1:9", max_retries=0)
            assert library.get_session().timeout.read == 0.1  # else the next line waits forever
            http_backoff("PUT", os.environ["HF_ENDPOINT"], max_retries=0)

    silent_hub()
    monkeypatch.setattr("advmoe.hub.SILENCE", 0.1)
    with pytest.raises(CheckpointError, match="cannot give or take owner/name: timed out"):
        upload()
    assert pytest.importorskip("huggingface_hub").get_session().timeout.read is None


@pytest.mark.parametrize(("own", "during"), [(None, SILENCE), (7.0, 7.0)])
def test_the_client_of_a_program_keeps_its_time_outs(own: float | None, during: float) -> None:
    client = pytest.importorskip("huggingface_hub").get_session()
    try:
        client.timeout = own
        with hub_errors("owner/name"):
            assert (client.timeout.connect, client.timeout.read, client.timeout.write) == (during,) * 3
        assert client.timeout.read == own
    finally:
        client.timeout = None


def test_a_client_that_is_made_meanwhile_waits_as_usual_afterwards() -> None:
    hub = pytest.importorskip("huggingface_hub")
    hub.close_session()
    with hub_errors("owner/name"):
        assert hub.get_session().timeout.read == SILENCE
    assert hub.get_session().timeout.read is None


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        (401, "Invalid user token.*; give a token that may do this in .HF_TOKEN, or by 'hf auth login'"),
        (403, "403.*; give a token"),
        (404, "owner/digits.*404"),
        (500, "500.*; try again later"),
        (429, "; try again later"),
        (200, "the hub cannot give or take owner/digits"),
    ],
)
def test_a_hub_that_refuses_is_asked_before_anything_is_exported(
    hub: dict[str, dict[str, bytes]],
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    refuses: int,
    message: str,
) -> None:
    monkeypatch.setattr(Hub, "refuses", refuses, raising=False)
    monkeypatch.setattr("advmoe.cli.push.write_repository", lambda *_, **__: pytest.fail("nothing is written"))
    assert main(["push", str(run), "owner/digits"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_push_without_a_network_or_a_token_gives_one_line(
    hub: dict[str, dict[str, bytes]], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advmoe.cli.push.write_repository", lambda *_, **__: pytest.fail("nothing is written"))
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert main(["push", str(run), "owner/digits"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("there is no token; set $HF_TOKEN or run 'hf auth login'")
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert main(["push", str(run), "owner/digits", "--no-onnx"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the hub cannot give or take owner/digits: " in line
    assert line.endswith("; check the network and $HF_ENDPOINT")


@pytest.mark.parametrize("address", ["hf://owner", "hf://", "hf://owner/name/more", "hf:owner/name"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected an address such as hf://owner/name"):
        fetch(address)
    assert is_address(Path(address))
    assert not is_address("runs/hf/best.pt")


def test_a_repository_needs_an_owner(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "digits", "--no-onnx"]) == 1
    assert "expected a repository on the hub such as owner/name, got 'digits'" in capsys.readouterr().err


def test_a_model_card_tells_the_attack_the_verdict_and_how_to_use_the_model(run: Path) -> None:
    contents = load_checkpoint(run / "best.pt")
    text = model_card(contents, "owner/digits", license="cc-by-4.0", evaluation=CARD, onnx=True)
    assert text.startswith('---\nlicense: "cc-by-4.0"\nlibrary_name: "advmoe"\n')
    for part in (
        "| SA, clean images | 91.23 |",
        "| RA under PGD-50, eps 8/255 | 61.50 |",
        "| RA under AutoAttack (standard) | 58.00 |",
        "360 test images of digits, eps 8/255 (l-infinity), step 2/255, 1 restart(s), start uniform, seed 7.",
        "Diagnostics: these numbers are not to be trusted.",
        "- black_box: failed (3 images)",
        "digit 0, digit 1",
        'advmoe.load("hf://owner/digits")',
        "advmoe-serve model/model.onnx",
    ):
        assert part in text
    unknown = model_card(contents, "owner/digits", license="mit", evaluation=None, onnx=False)
    assert "was not evaluated on test images. Its robustness is unknown." in unknown
    assert "onnx" not in unknown


def test_a_model_card_says_what_the_model_is(run: Path) -> None:
    contents = load_checkpoint(run / "best.pt")
    for settings, said, of_experts in (
        ({}, "vgg16 as a dense CNN of one pathway's size, trained", False),
        ({"kind": "dense"}, "vgg16 as a dense CNN, trained", False),
        ({"kind": "sparse_cnn"}, "vgg16 as a sparse CNN, trained", False),
        (
            {"kind": "moe"},
            "vgg16 as a sparse mixture-of-experts CNN with N = 2 experts at scale r = 0.5, trained",
            True,
        ),
        ({"arch": "vit", "kind": "dense"}, "vit as a dense vision transformer, trained", False),
        ({"arch": "vit", "kind": "moe"}, "vit as a sparse mixture-of-experts vision transformer with N = 2", True),
    ):
        model = dataclasses.replace(MODEL, **settings)
        of_model = dataclasses.replace(contents, model=model)
        text = model_card(of_model, "owner/digits", license="mit", evaluation=None, onnx=True)
        assert said in text
        assert ("mixture-of-experts" in text.split("---")[1]) == of_experts  # the hub's tags
        assert ("`model.onnx` computes the chosen experts of each image only and needs neither" in text) == of_experts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions about files that the hub gets, such as "HEAD owner/name main"."""
    found: list[str] = []
    answer = Hub.do_GET

    def noted(self: Hub) -> None:
        if place := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/model.safetensors", self.path):
            found.append(f"{self.command} {place[1]} {place[2]}")
        answer(self)

    monkeypatch.setattr(Hub, "do_GET", noted)
    return found


def test_a_revision_is_asked_for_until_it_is_in_the_cache(hub: Any, asked: list[str]) -> None:
    hub["owner/digits"] = {"model.safetensors": b"weights"}
    for _ in range(2):
        assert fetch(f"hf://owner/digits@{REVISION}").read_bytes() == b"weights"
    assert asked == [f"{method} owner/digits {REVISION}" for method in ("HEAD", "HEAD", "GET")]


def test_a_model_in_the_cache_costs_one_question_and_is_replaced_by_a_newer_one(
    hub: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub["owner/digits"] = {"model.safetensors": b"weights"}
    first = fetch("hf://owner/digits")
    asked.clear()
    assert fetch("hf://owner/digits") == first
    assert asked == ["HEAD owner/digits main"]
    hub["owner/digits"] = {"model.safetensors": b"newer"}
    monkeypatch.setitem(globals(), "REVISION", "2" * 40)
    assert fetch("hf://owner/digits").read_bytes() == b"newer"
