"""AdvMoE: adversarially trained sparse mixture-of-experts CNNs (Zhang et al., ICCV 2023).

>>> import advmoe
>>> model = advmoe.create_model("vgg16", kind="moe", num_classes=10, num_experts=2, model_scale=0.5)
>>> model = advmoe.load("runs/cifar10-vgg16-moe-advmoe")  # doctest: +SKIP

Models are plain `torch.nn.Module`s from images [B, 3, H, W] in [0, 1] to logits.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.errors import AdvMoEError

if TYPE_CHECKING:
    from advmoe.models.registry import create_model, list_models
    from advmoe.models.routing import Routing
    from advmoe.training.checkpoint import load

__version__ = version("advmoe")

__all__ = [
    "AdvMoEError",
    "AttackConfig",
    "ModelConfig",
    "Routing",
    "TrainConfig",
    "__version__",
    "create_model",
    "list_models",
    "load",
]

_WITH_TORCH = {
    "Routing": "advmoe.models.routing",
    "create_model": "advmoe.models.registry",
    "list_models": "advmoe.models.registry",
    "load": "advmoe.training.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Names whose modules import torch are imported on first use (PEP 562), because importing torch takes seconds."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WITH_TORCH[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion and `dir`, including those whose modules are not imported yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
