"""Training in bf16: the parts that use bf16, and the parts that stay in fp32."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from grid import Cell
from torch import Tensor

from advmoe.config import Precision, TrainConfig
from advmoe.data.loader import Batch
from advmoe.errors import ConfigError
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.network import RoutedNetwork
from advmoe.training.levels import make_levels
from advmoe.training.methods import METHODS
from advmoe.training.steps import arithmetic, training_attack

CONFIG = TrainConfig(dataset="digits", batch_size=8)
LABELS = torch.arange(8)


def attack(model: RoutedNetwork, images: Tensor, precision: Precision) -> Tensor:
    config = dataclasses.replace(CONFIG, loss="pgd_at", precision=precision)
    return training_attack(model, images, LABELS, config, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("precision", "in_attack", "in_update"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16_attack", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_convolutions_use_the_precision_asked_for_and_routers_never_do(
    tiny_vgg: Callable[..., RoutedNetwork],
    images: Tensor,
    precision: Precision,
    in_attack: torch.dtype,
    in_update: torch.dtype,
) -> None:
    model = tiny_vgg(warm=True)
    seen: list[tuple[bool, torch.dtype]] = []
    decided: set[torch.dtype] = set()
    layer = next(module for module in model.modules() if isinstance(module, MoEConv2d))
    layer.register_forward_hook(lambda module, _, y: seen.append((module.training, y.dtype)))
    for router in model.routers:
        router.register_forward_hook(lambda _, __, logits: decided.add(logits.dtype))
    config = dataclasses.replace(CONFIG, method="at", precision=precision)
    levels = make_levels(METHODS["at"].levels, model, config)
    METHODS["at"].step(levels, [Batch(images, LABELS, LABELS)], config, [torch.Generator().manual_seed(0)], 0)
    assert {dtype for training, dtype in seen if not training} == {in_attack}
    assert {dtype for training, dtype in seen if training} == {in_update}
    assert decided == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("granularity", ["layer", "token"])
@pytest.mark.parametrize("num_experts", [2, 3])
def test_the_routers_of_a_vit_learn_in_bf16_as_in_fp32(granularity: str, num_experts: int) -> None:
    """Its experts are computed once more in the backward pass, which is not under autocast."""
    model = Cell("vit", "moe", 32).build(num_experts=num_experts, granularity=granularity)
    images, gradients = Cell("vit", "moe", 32).images(8), []
    for _ in range(3):
        model(images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for half in (False, True):
        model.load_state_dict(state)  # each pass moves the statistics by which routers decide
        with arithmetic(images, half=half):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), LABELS % 5)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.router_parameters()))]))
    assert gradients[0].any()
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


def test_an_attack_in_bf16_raises_the_loss_by_most_of_what_fp32_does(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg(kind="s_dense", warm=True)
    exact, half = (attack(model, images, precision) for precision in ("fp32", "bf16_attack"))
    assert exact.dtype == half.dtype == torch.float32
    assert (half - images).abs().max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        clean, by_exact, by_half = (F.cross_entropy(model.eval()(x), LABELS) for x in (images, exact, half))
    assert by_half - clean > 0.6 * (by_exact - clean) > 0


def test_a_precision_of_the_attack_is_refused_where_none_is_made() -> None:
    with pytest.raises(ConfigError, match="bf16_attack has no effect on method standard"):
        TrainConfig(dataset="digits", method="standard", precision="bf16_attack")
