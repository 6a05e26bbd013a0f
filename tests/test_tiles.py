"""The Triton convolution by tiles, in Triton's interpreter on the CPU, and on a GPU if there is one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from claimed_gpu import claimed_gpu
from tiles import CASES
from torch import Tensor

from advmoe.config import ModelConfig, TrainConfig, check_together
from advmoe.errors import ConfigError
from advmoe.evaluation.precision import full_precision

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_agree_with_plain_convolutions_on_a_gpu(dtype: torch.dtype) -> None:
    from advmoe.models.tiles import Geometry, convolve

    torch.manual_seed(0)
    x = torch.randn(16, 32, 16, 16, device="cuda", dtype=dtype)
    bank = torch.randn(4, 48, 32, 3, 3, device="cuda", dtype=dtype) / 17
    chosen_B = torch.arange(16, device="cuda") % 4
    with torch.backends.cudnn.flags(enabled=False):
        expected = torch.stack(
            [torch.nn.functional.conv2d(x[i].double(), bank[i % 4].double(), padding=1) for i in range(16)]
        )
    found = convolve(x, bank, chosen_B, Geometry(1, 1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=2e-2)
