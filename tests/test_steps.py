"""Algorithm 1 step by step: the parameters that each level changes, its attack, and the order of the steps."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advmoe
from advmoe.attacks.pgd import cross_entropy_objective, kl_objective, pgd, plain, starting_point
from advmoe.config import AttackConfig, RouterStep, TrainConfig
from advmoe.data.loader import Batch
from advmoe.errors import ConfigError
from advmoe.models.modes import own_parameters, submodules
from advmoe.models.network import RoutedNetwork
from advmoe.training import levels
from advmoe.training.awp import perturbed_weights
from advmoe.training.guard import Kept, statistics, take_step
from advmoe.training.levels import LevelName, make_levels
from advmoe.training.losses import load_balance, trades
from advmoe.training.methods import METHODS
from advmoe.training.steps import StepResult, adversarial_update, attacked, robust_loss, robust_update, training_attack

CONFIG = TrainConfig(dataset="digits", batch_size=8)


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.rand(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator), torch.arange(8)
    )


def noise_of(part: Batch) -> torch.Generator:
    return torch.Generator().manual_seed(int(1000 * float(part.images[0, 0, 0, 0])))


def run(
    method: str, model: RoutedNetwork, *batches: Batch, config: TrainConfig = CONFIG, iteration: int = 0
) -> list[StepResult | None]:
    """One step of a method with new optimizers; the noise of each level depends on its batch alone."""
    levels = make_levels(METHODS[method].levels, model, config, fresh=False)
    noise = [noise_of(part) for part in batches]
    return METHODS[method].step(levels, batches, config, noise, iteration)


def state(model: RoutedNetwork, routers: bool) -> dict[str, Tensor]:
    """Parameters and buffers of the routers (phi), or of all the rest (psi)."""
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith("routers.") == routers}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(params=["layer", "image"])
def model(request: pytest.FixtureRequest, tiny_vgg: Callable[..., RoutedNetwork]) -> RoutedNetwork:
    return tiny_vgg(warm=True, granularity=request.param)


def test_the_router_step_leaves_psi_bit_identical(model: RoutedNetwork) -> None:
    phi, psi = state(model, True), state(model, False)
    assert any("running_mean" in name for name in psi)
    run("router_at", model, batch(1))
    assert same(state(model, False), psi)
    assert all(parameter.grad is None for parameter in model.expert_parameters()), "work that nobody wanted"
    after = state(model, True)
    assert all(not torch.equal(after[name], value) for name, value in phi.items() if name.endswith("weight"))


def test_the_expert_step_leaves_phi_bit_identical(model: RoutedNetwork) -> None:
    phi, psi = state(model, True), state(model, False)
    run("expert_at", model, batch(1))
    assert same(state(model, True), phi)
    assert all(parameter.grad is None for parameter in model.router_parameters())
    after = state(model, False)
    assert all(not torch.equal(after[name], value) for name, value in psi.items() if name.endswith("weight"))


def test_advmoe_is_a_router_step_and_then_an_expert_step_on_another_batch(model: RoutedNetwork) -> None:
    apart, swapped = copy.deepcopy(model), copy.deepcopy(model)
    results = run("advmoe", model, batch(1), batch(2))
    levels = make_levels(["routers", "experts"], apart, CONFIG, fresh=False)
    results_apart = [
        adversarial_update(level, part, CONFIG, noise_of(part))
        for level, part in zip(levels, (batch(1), batch(2)), strict=True)
    ]
    assert [result.loss for result in results] == [result.loss for result in results_apart]
    assert same(dict(model.state_dict()), dict(apart.state_dict()))
    run("advmoe", swapped, batch(2), batch(1))
    assert not same(state(model, False), state(swapped, False))


def test_the_order_of_the_two_steps_matters(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model, reversed_order = tiny_vgg(warm=True), tiny_vgg(warm=True)
    run("advmoe", model, batch(1), batch(2))
    run("expert_at", reversed_order, batch(2))
    run("router_at", reversed_order, batch(1))
    assert not same(state(model, False), state(reversed_order, False))


def test_the_second_attack_meets_the_updated_routers_and_its_own_batch(model: RoutedNetwork) -> None:
    seen: list[tuple[bool, Tensor, dict[str, Tensor], dict[str, Tensor]]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((module.training, inputs[0].detach().clone(), state(model, True), state(model, False)))

    phi, psi = state(model, True), state(model, False)
    handle = model.register_forward_pre_hook(record)
    run("advmoe", model, batch(1), batch(2))
    handle.remove()
    # An attack looks at the clean images once and takes K = 2 steps; both attacks run in eval mode
    # at psi as it was.
    assert len(seen) == 2 * (1 + 2)
    for position, (training, images, routers, experts) in enumerate(seen):
        first = position < 3
        assert not training
        assert same(experts, psi)
        assert same(routers, phi if first else state(model, True))
        assert (images - batch(1 if first else 2).images).abs().max() <= CONFIG.attack.eps + 1e-6
    assert not same(phi, state(model, True))


def test_joint_training_changes_routers_and_experts(model: RoutedNetwork) -> None:
    phi, psi = state(model, True), state(model, False)
    run("at", model, batch(1))
    assert not same(state(model, True), phi)
    assert not same(state(model, False), psi)


def test_a_step_is_sgd_on_trades_at_the_attacked_images(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    # The same step by hand: attack in eval mode, forward in training mode, w - lr (gradient + decay
    # * w).
    model = tiny_vgg(kind="dense", warm=True)
    by_hand, part = copy.deepcopy(model), batch(1)
    by_hand.eval()
    generator = torch.Generator().manual_seed(int(1000 * float(part.images[0, 0, 0, 0])))
    start = starting_point(part.images, CONFIG.attack, generator)
    adversarial = pgd(plain(by_hand), part.images, kl_objective(by_hand(part.images)), CONFIG.attack, start=start)
    by_hand.train()
    loss = trades(by_hand(part.images), by_hand(adversarial), part.labels, CONFIG.trades_beta)
    loss.backward()
    (result,) = run("at", model, part)
    torch.testing.assert_close(result.loss, loss.detach())
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert theirs.grad is not None
        expected = theirs.detach() - CONFIG.lr * (theirs.grad + CONFIG.weight_decay * theirs.detach())
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-6)


def test_statistics_move_by_the_two_training_passes_only(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    # Clean and adversarial images pass once each in training mode; the attack's passes leave no
    # trace.
    model = tiny_vgg(kind="s_dense")
    run("at", model, batch(1))
    assert {int(value) for name, value in model.state_dict().items() if "num_batches" in name} == {2}


def test_standard_training_makes_no_adversarial_images(model: RoutedNetwork) -> None:
    part = batch(1)
    reference = copy.deepcopy(model)
    (result,) = run("standard", model, part)
    assert result.adversarial_correct is None
    assert result.adversarial_routing is None
    torch.testing.assert_close(result.loss, F.cross_entropy(reference(part.images), part.labels).detach())


def test_load_balance_adds_its_weight_times_the_imbalance_of_the_attacked_images(
    tiny_vgg: Callable[..., RoutedNetwork],
) -> None:
    (plain,) = run("router_at", tiny_vgg(), batch(1))
    (balanced,) = run("router_at", tiny_vgg(), batch(1), config=dataclasses.replace(CONFIG, balance=0.5))
    assert balanced.adversarial_routing is not None
    torch.testing.assert_close(balanced.loss - plain.loss, 0.5 * load_balance(balanced.adversarial_routing).detach())


@pytest.mark.parametrize(("method", "kind"), [("advmoe", "moe"), ("at", "s_dense"), ("standard", "s_dense")])
def test_steps_descend_on_a_batch_that_is_repeated(
    tiny_vgg: Callable[..., RoutedNetwork], method: str, kind: str
) -> None:
    model, part = tiny_vgg(kind=kind, granularity="image" if kind == "moe" else "layer"), batch(1)
    config = dataclasses.replace(CONFIG, lr=0.03, trades_beta=1.0)
    levels = make_levels(METHODS[method].levels, model, config, fresh=False)
    losses = []
    for step in range(10):
        noise = [torch.Generator().manual_seed(step)] * len(levels)
        losses.append(METHODS[method].step(levels, [part] * len(levels), config, noise, 0)[-1].loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_results_count_their_batch(model: RoutedNetwork) -> None:
    for result in run("advmoe", model, batch(1), batch(2)):
        assert result is not None
        assert result.images == 8
        assert 0 <= int(result.clean_correct) <= 8
        assert result.adversarial_correct is not None
        assert 0 <= int(result.adversarial_correct) <= 8
        assert result.routing.expert_index_BL.shape == (8, 12)
        assert not result.loss.requires_grad


def test_reused_images_are_those_attacked_for_the_experts(model: RoutedNetwork) -> None:
    """The same as the experts' update, then a router's update on its images: no attack and no batch of its own."""
    reference, experts_batch = copy.deepcopy(model), batch(2)
    config = dataclasses.replace(CONFIG, router_step="reuse", router_share=0.5)
    lower, _ = run("advmoe", model, batch(1), experts_batch, config=config)
    levels = make_levels(("routers", "experts"), reference, CONFIG, fresh=False)
    noise = torch.Generator().manual_seed(int(1000 * float(experts_batch.images[0, 0, 0, 0])))
    found = attacked(reference, experts_batch, CONFIG, noise)
    robust_update(levels[1], experts_batch, found, CONFIG)
    half = Batch(*(part[::2] for part in experts_batch[:3]))
    expected = robust_update(levels[0], half, found._replace(images=found.images[::2]), CONFIG)
    assert same(dict(model.state_dict()), dict(reference.state_dict()))
    assert lower is not None
    assert (lower.images, lower.loss) == (4, expected.loss)


def test_a_share_of_the_routers_batch_is_attacked_and_learned_from(model: RoutedNetwork) -> None:
    reference, part = copy.deepcopy(model), batch(1)
    config = dataclasses.replace(CONFIG, router_share=0.25)
    run("advmoe", model, part, batch(2), config=config)
    run("advmoe", reference, Batch(*(each[::4] for each in part[:3])), batch(2))
    assert same(dict(model.state_dict()), dict(reference.state_dict()))


@pytest.mark.parametrize(("method", "loss"), [("at", "trades"), ("at", "pgd_at"), ("standard", "trades")])
def test_a_batch_in_parts_is_the_batch_where_no_image_depends_on_others(method: str, loss: str) -> None:
    torch.set_default_dtype(torch.float64)  # an attack's sign would make rounding large
    try:
        torch.manual_seed(0)
        whole = advmoe.create_model("vit", kind="dense", width=1 / 6, depth=1)
        part = batch(1)
    finally:
        torch.set_default_dtype(torch.float32)
    part = part._replace(images=part.images.double())
    in_parts = copy.deepcopy(whole)
    config = dataclasses.replace(CONFIG, method=method, loss=loss, accumulate=3)  # type: ignore[arg-type]
    (cut,) = run(method, in_parts, part, config=config)  # 3, 3 and 2 images
    (one,) = run(method, whole, part, config=dataclasses.replace(config, accumulate=1))
    assert cut is not None
    assert one is not None
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(in_parts.state_dict()[name], value, rtol=1e-11, atol=1e-12, msg=name)
    torch.testing.assert_close(cut.loss, one.loss)
    assert (cut.images, cut.clean_correct, cut.adversarial_correct) == (8, one.clean_correct, one.adversarial_correct)


def test_batchnorm_normalizes_by_a_part_and_takes_in_each(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    """By hand: the parts' gradients, each weighted by its share, add up; then one step."""
    model, images = tiny_vgg(kind="s_dense"), batch(1)
    reference = copy.deepcopy(model)
    config = dataclasses.replace(CONFIG, method="standard", accumulate=3)
    run("standard", model, images, config=config)
    optimizer = torch.optim.SGD(
        reference.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    for part in range(3):
        logits = reference(images.images[part::3])
        (F.cross_entropy(logits, images.labels[part::3], reduction="sum") / 8).backward()
    optimizer.step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    counts = {int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts == {3}


def test_routes_of_a_batch_in_parts_are_in_the_order_of_its_images(model: RoutedNetwork) -> None:
    part = batch(1)
    config = dataclasses.replace(CONFIG, accumulate=3, lr=1e-9)
    expected = [copy.deepcopy(model).train().forward_with_routing(part.images[k::3])[1].expert_index_BL for k in (0, 1)]
    result = adversarial_update(make_levels(["all"], model, config, fresh=False)[0], part, config, noise_of(part))
    assert torch.equal(result.routing.expert_index_BL[0::3], expected[0])
    assert result.routing.expert_index_BL.shape == (8, 12)
    assert result.adversarial_routing is not None
    assert result.adversarial_routing.expert_index_BL.shape == (8, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 5}, "accumulate 5 divides the 8 images of a step into parts of fewer than 2"),
        (
            {"accumulate": 2, "router_share": 0.25},
            "accumulate 2 divides the 2 images of a step into parts of fewer than 2",
        ),
        ({"accumulate": 2, "compile": "graphs"}, "compile graphs overwrites the gradients that accumulate 2 adds up"),
        ({"accumulate": 2, "awp": 0.01}, "awp 0.01 looks at a whole batch at once"),
        ({"accumulate": 2, "balance": 0.1}, "balance 0.1 looks at a whole batch at once"),
    ],
)
def test_what_cannot_be_computed_in_parts_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("router_step", ["exact", "reuse"])
def test_routers_move_in_every_kth_iteration_only(model: RoutedNetwork, router_step: RouterStep) -> None:
    config = dataclasses.replace(CONFIG, router_step=router_step, router_every=3)
    for iteration in range(4):
        before = state(model, True)
        lower, upper = run("advmoe", model, batch(1), batch(2), config=config, iteration=iteration)
        due = iteration in {0, 3}
        assert (lower is not None) == due
        assert same(state(model, True), before) != due
        assert upper is not None


def test_a_cheap_router_step_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="router_every 4 has no effect on method at"):
        dataclasses.replace(CONFIG, method="at", router_every=4)


@pytest.mark.parametrize("method", ["router_at", "expert_at", "at"])
def test_a_loss_that_is_not_finite_changes_nothing(model: RoutedNetwork, method: str) -> None:
    # beta = 1e300 is finite, its product with the divergence in float32 is not.
    before = copy.deepcopy(dict(model.state_dict()))
    (result,) = run(method, model, batch(1), config=dataclasses.replace(CONFIG, trades_beta=1e300))
    assert result is not None
    assert not result.finite
    assert same(dict(model.state_dict()), before)
    # The frozen level is thawed again, whatever happened.
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_training_attack_does_not_use_the_labels(model: RoutedNetwork) -> None:
    # TRADES attacks the prediction (KL), not the label: with beta alone driving, other labels give
    # the same attack.
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    part, fresh = batch(1), copy.deepcopy(model)
    run("at", model, part)
    run("at", fresh, part._replace(labels=(part.labels + 1) % 10))
    assert len(seen) == 6
    assert torch.equal(seen[2], seen[5])


def test_the_radius_holds_in_training(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    seen: list[Tensor] = []
    model, part = tiny_vgg(), batch(1)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    attack = AttackConfig(eps=0.01, steps=5, step_size=0.1, start="gaussian")
    run("at", model, part, config=dataclasses.replace(CONFIG, attack=attack))
    assert len(seen) == 6
    for images in seen:
        assert (images - part.images).abs().max() <= 0.01 + 1e-6
        assert images.min() >= 0
        assert images.max() <= 1


def test_modules_and_parameters_are_listed_as_torch_lists_them(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model = tiny_vgg()
    modules = submodules(model)
    assert list(map(id, modules)) == list(map(id, model.modules()))
    assert list(map(id, own_parameters(modules))) == list(map(id, model.parameters()))


@pytest.mark.parametrize("name", ["routers", "experts", "all"])
def test_a_level_trains_its_own_modules_and_parameters_only(
    tiny_vgg: Callable[..., RoutedNetwork], name: LevelName
) -> None:
    model = tiny_vgg()
    (level,) = make_levels([name], model, TrainConfig(dataset="digits"))
    routers = set(map(id, model.routers.modules()))
    of_routers = set(map(id, model.router_parameters()))
    with level.training():
        for module in model.modules():
            assert module.training == (name == "all" or (id(module) in routers) == (name == "routers"))
        for parameter in model.parameters():
            assert parameter.requires_grad == (name == "all" or (id(parameter) in of_routers) == (name == "routers"))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_routers_can_learn_on_features_normalized_as_the_experts_update_does(
    tiny_vgg: Callable[..., RoutedNetwork],
) -> None:
    """In a run's first steps the stored statistics are still far from those of any batch."""
    model = tiny_vgg()  # statistics as initialized, mean 0 and variance 1
    seen: list[Tensor] = []
    hook = model.routers[3].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    by_batch = dataclasses.replace(CONFIG, router_statistics="batch")
    routers, experts = make_levels(["routers", "experts"], model, by_batch)
    (alone,) = make_levels(["routers"], model, CONFIG)
    images = batch(1).images
    before = state(model, False)
    for level in (routers, alone, experts):
        assert same(state(model, False), before)
        with level.training(), torch.no_grad():
            level.model(images)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[2])
    assert not torch.allclose(seen[1], seen[2])  # those of inference


@pytest.mark.parametrize("loss", ["trades", "pgd_at"])
@pytest.mark.parametrize("attack_routing", ["mixture", "margin"])
def test_an_attack_that_sees_the_routing_moves_more_decisions(
    tiny_vgg: Callable[..., RoutedNetwork], attack_routing: str, loss: str
) -> None:
    model, images = tiny_vgg(warm=True), torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(32) % 10
    clean = model.eval().forward_with_routing(images)[1].expert_index_BL
    flips = {}
    for seen in ("fixed", attack_routing):
        config = dataclasses.replace(CONFIG, attack_routing=seen, loss=loss)  # type: ignore[arg-type]
        found = training_attack(model, images, labels, config, torch.Generator().manual_seed(0))
        assert (found - images).abs().max() <= config.attack.eps + 1e-6
        flips[seen] = (model.forward_with_routing(found)[1].expert_index_BL != clean).double().mean().item()
    assert flips[attack_routing] > 1.02 * flips["fixed"]


@pytest.mark.parametrize("method", ["at", "advmoe"])
def test_routers_can_have_a_learning_rate_of_their_own(tiny_vgg: Callable[..., RoutedNetwork], method: str) -> None:
    model = tiny_vgg()
    config = dataclasses.replace(CONFIG, method=method, router_lr=0.7)  # type: ignore[arg-type]
    levels = make_levels(METHODS[method].levels, model, config)
    peaks = {
        id(parameter): group.get("peak", config.lr)
        for level in levels
        for group in level.optimizer.param_groups
        for parameter in group["params"]
    }
    assert {peaks[id(parameter)] for parameter in model.router_parameters()} == {0.7}
    assert {peaks[id(parameter)] for parameter in model.expert_parameters()} == {config.lr}
    with pytest.raises(ConfigError, match=r"router_lr 0.7 needs routers that learn a choice"):
        make_levels(["all"], tiny_vgg(kind="s_dense"), config)


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_fused_sgd_equals_the_plain_form_to_the_bit(tensor_rate: bool) -> None:
    config = TrainConfig(dataset="digits", method="at", lr=0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in ((8, 4, 3, 3), (8,), (10, 33))]
    ours, theirs = ([torch.nn.Parameter(values.clone()) for values in start] for _ in range(2))
    optimizer = levels._sgd([{"params": ours}], config, torch.device("cpu"))
    other = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False, fused=False)
    if tensor_rate:  # as on a GPU
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    for rate in (0.1, 0.07, 0.01):
        for mine, plain_one in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            plain_one.grad = mine.grad.clone()
        for each in (optimizer, other):
            levels.set_rates(each, lambda _, rate=rate: rate)
            each.step()
        for mine, plain_one in zip(ours, theirs, strict=True):
            assert torch.equal(mine, plain_one)


def test_pgd_at_takes_statistics_of_adversarial_images_only(tiny_vgg: Any) -> None:
    model = tiny_vgg(kind="s_dense")
    run("at", model, batch(1), config=dataclasses.replace(CONFIG, loss="pgd_at"))
    assert {int(value) for name, value in model.state_dict().items() if "num_batches" in name} == {1}


@pytest.mark.parametrize("method", ["at", "router_at", "expert_at"])
def test_an_image_that_no_attack_changes_counts_alike_clean_and_attacked(model: RoutedNetwork, method: str) -> None:
    unchanged = AttackConfig(eps=0.0, steps=1)
    config = dataclasses.replace(CONFIG, loss="pgd_at", attack=unchanged)
    (result,) = run(method, model, batch(1), config=config)
    assert result is not None
    assert result.adversarial_routing is not None
    assert result.adversarial_correct is not None
    assert torch.equal(result.routing.expert_index_BL, result.adversarial_routing.expert_index_BL)
    assert int(result.clean_correct) == int(result.adversarial_correct)


def test_a_step_of_pgd_at_is_sgd_on_the_cross_entropy_of_attacked_images(tiny_vgg: Any) -> None:
    config = dataclasses.replace(CONFIG, loss="pgd_at")
    model = tiny_vgg(kind="dense", warm=True)
    by_hand, part = copy.deepcopy(model).eval(), batch(1)
    start = starting_point(part.images, config.attack, noise_of(part))
    found = pgd(plain(by_hand), part.images, cross_entropy_objective(part.labels), config.attack, start=start)
    loss = F.cross_entropy(by_hand.train()(found), part.labels)
    loss.backward()
    (result,) = run("at", model, part, config=config)
    assert result is not None
    torch.testing.assert_close(result.loss, loss.detach())
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        expected = theirs.detach() - config.lr * (theirs.grad + config.weight_decay * theirs.detach())
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_step_descends_at_the_perturbed_weights(tiny_vgg: Any) -> None:
    config, part = dataclasses.replace(CONFIG, awp=0.01), batch(1)
    model = tiny_vgg(kind="s_dense", warm=True)
    reference = copy.deepcopy(model)
    (result,) = run("at", model, part, config=config)
    (level,) = make_levels(["all"], reference, config, fresh=False)
    found = attacked(reference, part, config, noise_of(part)).images

    def loss() -> Tensor:
        return robust_loss(level, part, found, config)[0]

    with level.training(), perturbed_weights(reference, level.parameters, loss, 0.01):
        expected = loss().detach()
    assert result is not None
    torch.testing.assert_close(result.loss, expected)


@pytest.mark.parametrize("ask", [True, False], ids=["cpu", "as on a GPU"])
@pytest.mark.parametrize("where", ["gradient", "statistics"])
def test_a_step_with_a_finite_loss_is_left_out(tiny_vgg: Any, where: str, ask: bool) -> None:
    model = tiny_vgg(kind="s_dense")
    (level,) = make_levels(["all"], model, dataclasses.replace(CONFIG, method="at"))
    before, kept = copy.deepcopy(dict(model.state_dict())), Kept(statistics(submodules(model)))
    for parameter in level.parameters:
        parameter.grad = torch.ones_like(parameter)
    if where == "gradient":
        level.parameters[0].grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
    else:
        next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).running_var[0] = torch.inf  # type: ignore[index]
    assert not take_step(level, torch.tensor(1.0), kept, ask=ask)
    assert same(dict(model.state_dict()), before)
