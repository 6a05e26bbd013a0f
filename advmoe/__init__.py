"""AdvMoE: adversarially trained sparse mixture-of-experts CNNs (Zhang et al., ICCV 2023).

>>> import advmoe
>>> model = advmoe.create_model("vgg16", kind="moe", num_classes=10, num_experts=2, model_scale=0.5)
>>> model = advmoe.load("runs/cifar10-vgg16-moe-advmoe/best.pt")  # doctest: +SKIP

Models are plain `torch.nn.Module`s from images [B, 3, H, W] in [0, 1] to logits.
"""

from importlib.metadata import version

from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.errors import AdvMoEError
from advmoe.models.registry import create_model
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
    "load",
]
