"""The Triton convolution by tiles, in Triton's interpreter on the CPU, and on a GPU if there is one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from claimed_gpu import claimed_gpu
from tiles import CASES, compared
from torch import Tensor

from advmoe.cli.app import main
from advmoe.config import ModelConfig, TrainConfig, check_together
from advmoe.errors import ConfigError
from advmoe.evaluation.precision import full_precision
from advmoe.models.moe_conv import check_tiles

triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
tiles = pytest.importorskip("advmoe.models.tiles")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # a default of the next Triton


def test_tiles_compute_outputs_and_gradients_of_the_sorted_convolution() -> None:
    # another process: Triton interprets kernels only if it is told so before it is imported
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "tiles.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(CASES)
    for case, differences in zip(CASES, found, strict=True):
        assert {"y", "x", "gate", "weight"} <= differences.keys()
        assert max(differences.values()) < 1e-5, (case, differences)


class Launches:
    """Stands for a kernel: notes the arguments of its launches."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.devices: list[torch.device] = []
        """The device that was the current one at each launch."""
        self.current = torch.device("cuda", 7)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: (self.seen.append(args), self.devices.append(self.current))[0]

    @contextmanager
    def device_of(self, x: Tensor) -> Iterator[None]:
        """`torch.cuda.device_of`."""
        before, self.current = self.current, x.device
        yield
        self.current = before


def launch_all(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Launches:
    """Launches the output, the gradient of its input and that of its filters, of a claimed GPU."""
    launches = Launches()
    monkeypatch.setattr(tiles, "_convolve_tile", launches)
    monkeypatch.setattr(tiles, "_filter_gradient_tile", launches)
    monkeypatch.setattr(torch.cuda, "device_of", launches.device_of)
    with claimed_gpu():
        x, bank = torch.rand(2, 3, 4, 4, device="cuda", dtype=dtype), torch.rand(2, 5, 3, 3, 3, device="cuda").to(dtype)
        chosen_B, geometry = torch.zeros(2, dtype=torch.int64, device="cuda"), tiles.Geometry(1, 1)
        y = tiles.convolve(x, bank, chosen_B, geometry)
        tiles.input_gradient(y, bank, chosen_B, x, geometry)
        tiles.filter_gradient(y, x, chosen_B, bank, geometry)
    return launches


@pytest.mark.parametrize(
    ("dtype", "by_default", "exact"), [(torch.float32, "tf32", "ieee"), (torch.bfloat16, "ieee", "ieee")]
)
def test_tiles_multiply_in_tf32_where_torch_does_and_never_in_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by_default: str, exact: str
) -> None:
    launches = launch_all(monkeypatch, dtype).seen
    with full_precision(torch.nn.Conv2d(1, 1, 1)):
        launches += launch_all(monkeypatch, dtype).seen
    ways = [[value for value in args if isinstance(value, str)] for args in launches]
    assert ways == 3 * [[by_default]] + 3 * [[exact]]


def test_tiles_are_started_on_the_gpu_that_holds_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = launch_all(monkeypatch, torch.float32)  # while another GPU is the current one
    assert launches.devices == 3 * [torch.device("cuda", 0)]
    assert launches.current == torch.device("cuda", 7)


class Failing:
    """Stands for a kernel that Triton cannot compile."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*_: object) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

        return launch


@pytest.mark.parametrize("kernel", ["_convolve_tile", "_filter_gradient_tile"])
def test_kernels_that_cannot_be_compiled_are_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernel: str
) -> None:
    for name in ("_convolve_tile", "_filter_gradient_tile"):
        monkeypatch.setattr(tiles, name, Failing() if name == kernel else Launches())
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    command = ["train", "digits", "--arch", "vgg16", "--width", "0.0625", "--num-experts", "4", "--limit-train", "128"]
    command += ["--device", "cuda", "--dispatch", "tiles", "--out", str(tmp_path / "run")]
    with claimed_gpu():
        assert main(command) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: dispatch tiles needs Triton, and a C compiler for its kernels, but they do not run here: Failed to "
        "find C compiler; mend that, or use dispatch auto (--dispatch)"
    )
    assert not (tmp_path / "run").exists()


def test_tiles_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "advmoe.models.tiles")
    with pytest.raises(ConfigError, match=r"they do not run here: import of triton halted") as caught:
        check_tiles(torch.device("cpu"))
    assert caught.value.options == ("dispatch",)


@pytest.mark.parametrize(("precision", "tensor_cores"), [("tf32", True), ("ieee", False)])
@pytest.mark.parametrize("kernel", [tiles._convolve_tile, tiles._filter_gradient_tile], ids=["output", "filters"])
def test_tf32_of_tiles_needs_the_tensor_cores_of_an_h100(kernel: Any, precision: str, tensor_cores: bool) -> None:
    # compiled for the GPU, not run
    constant = {"backward": False, "precision": precision, "kernel_height": 1, "kernel_width": 1, "stride": 1}
    constant |= {"padding": 0, "splits": 8, "depth": 32, **dict.fromkeys(("pixels", "rows", "columns"), 64)}
    kinds = dict.fromkeys(("x", "bank", "y", "gradient", "partial"), "*fp32")
    kinds |= dict.fromkeys(("expert_of", "order", "first_of"), "*i64")
    signature = {p.name: "constexpr" if p.is_constexpr else kinds.get(p.name, "i32") for p in kernel.params}
    constants = {(p.num,): constant[p.name] for p in kernel.params if p.is_constexpr}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ("tf32.tf32" in compiled.asm["ptx"]) == tensor_cores


def test_tiles_are_refused_where_they_would_do_nothing() -> None:
    with pytest.raises(ConfigError, match="no effect on passes that are compiled"):
        TrainConfig(dataset="digits", dispatch="tiles", compile="kernels")
    with pytest.raises(ConfigError, match="dispatch tiles is for routed convolutions"):
        check_together(
            ModelConfig(arch="vgg16", kind="s_dense"), TrainConfig(dataset="digits", method="at", dispatch="tiles")
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "exact", "least", "most"),
    [
        pytest.param(torch.float32, True, 0.0, 1e-5, id="fp32"),
        # TF32 drops all but 11 bits of both numbers of a product: at most 2e-3 of it. bf16 rounds
        # the result to 8 bits: 4e-3 of it.
        pytest.param(torch.float32, False, 1e-5, 5e-3, id="tf32"),
        pytest.param(torch.bfloat16, True, 0.0, 2e-2, id="bf16"),
    ],
)
def test_tiles_agree_with_plain_convolutions_on_a_gpu(
    dtype: torch.dtype, exact: bool, least: float, most: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 32, 16, 16).to(dtype)
    bank = (torch.randn(4, 48, 32, 3, 3) / 17).to(dtype)
    toward = torch.randn(16, 48, 8, 8).to(dtype)
    chosen_B, geometry = torch.arange(16) % 4, tiles.Geometry(2, 1)
    x64, bank64 = (tensor.double().requires_grad_() for tensor in (x, bank))
    y = torch.stack([F.conv2d(x64[i], bank64[i % 4], stride=2, padding=1) for i in range(16)])
    expected = (y, *torch.autograd.grad(y, (x64, bank64), toward.double()))
    x, bank, toward, chosen_B = (tensor.cuda() for tensor in (x, bank, toward, chosen_B))
    with full_precision(torch.nn.Conv2d(1, 1, 1)) if exact else nullcontext():
        found = (
            tiles.convolve(x, bank, chosen_B, geometry),
            tiles.input_gradient(toward, bank, chosen_B, x, geometry),
            tiles.filter_gradient(toward, x, chosen_B, bank, geometry),
        )
    for ours, theirs in zip(found, expected, strict=True):
        distance = float((ours.cpu().double() - theirs).detach().abs().max() / theirs.detach().abs().max())
        assert least <= distance < most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['layout']}-{case['kernel']}-{case['signal']}")
def test_layers_and_signals_of_routers_by_tiles_on_a_gpu_are_those_of_sorted_images_on_the_cpu(
    case: dict[str, Any],
) -> None:
    with full_precision(torch.nn.Conv2d(1, 1, 1)):
        differences = compared(case, "cuda")
    assert {"y", "x", "gate", "weight"} <= differences.keys()
    assert max(differences.values()) < 2e-5, differences


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tiles_compute_on_a_gpu_that_is_not_the_current_one() -> None:
    with full_precision(torch.nn.Conv2d(1, 1, 1)), torch.cuda.device(0):
        assert max(compared(CASES[0], "cuda:1").values()) < 2e-5
