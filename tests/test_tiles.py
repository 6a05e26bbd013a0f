"""The Triton convolution by tiles, in Triton's interpreter on the CPU, and on a GPU if there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiles import CASES

from advmoe.config import ModelConfig, TrainConfig, check_together
from advmoe.errors import ConfigError

pytest.importorskip("triton")


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
