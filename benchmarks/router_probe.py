"""Measure what routers learn: compare their gradients with the exact effect of changed decisions.

    python benchmarks/router_probe.py --json
    python benchmarks/router_probe.py --dataset cifar10 --data-dir DATA --num-experts 2 4 --json

The exact loss of (router, image, expert) is the TRADES loss of the image if this router chose this
expert; later routers then decide again. It costs N passes per router, so it can measure a training
but not replace it. In the first figures, the clean and the attacked version of an image count as two
decisions: one changes, the other one and the attacked pixels stay. There is one AdvMoE run per
router gradient. It is probed at regular intervals:

- `probed_loss`: mean loss of the probed images
- `better`: share of decisions for which another expert would give a smaller loss
- `gain`: decrease of the loss if one decision takes its best expert, relative to the loss, mean
  over all decisions
- `regret`: the same relative to uniformly random decisions, which have 1; 0 is the best choice everywhere
- `held_out`: share and regret on half of the images, for the trained routers, for linear routers
  fitted to exact losses of the other half, and for the expert that is best for the other half
- `together`: the figures of `held_out` if both versions of an image take the expert, and the attack
  of training is made anew against it. The first figures favor the chosen expert in two ways that
  these avoid: if one version changes its expert, the KL divergence also contains how much two
  experts differ. And if both change but the attacked pixels stay, the other expert meets an attack
  that was not made against it. `one_decision` is the share of (router, image) that choose one
  expert for both versions
- `oracle`: mean loss if each router in turn takes, for both versions of each image, the expert that
  gives the lowest loss; before and after the attack is made anew against these pathways. It knows
  the labels, so routers cannot reach it
- `load`: share of the busiest expert, mean over routers. At 1 only one expert is used, so other
  figures say nothing. `loads`: shares of all experts from the busiest on, mean over routers
- `raises_chosen`: among decisions with a better expert, share for which a descent step raises the
  logit of the chosen expert
- `finds_best`: among them, share for which the step raises the logit of the best expert most
- `together` of an estimator: the last two figures for images of which both versions take one expert
  and should take another one. The step is then the sum of both versions' steps
- `cosine`: between the gradient of the routers' weights and the gradient by the exact losses, mean
  over layers
- `to_start`: cosine between the routers' weights and their initial weights
- `loss`, `router_loss`: mean losses of the experts' and the routers' updates in the last interval

Shape suffixes: B batch, L MoE layers, N experts, R routers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.attacks.pgd import Forward, kl_objective, pgd, starting_point
from advmoe.attacks.relaxations import SteeredTape
from advmoe.config import ROUTER_GRADIENTS, ExpertFilters, RouterGradient, TrainConfig, from_dict
from advmoe.data.loader import Batch, BatchLoader
from advmoe.data.sources import dataset_info, load_dataset
from advmoe.data.views import training_transform
from advmoe.evaluation.cost import hardware
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.models.router import Router
from advmoe.models.routing import RoutingTape
from advmoe.seeding import generator_for, seeded
from advmoe.settings import resolve
from advmoe.training.checkpoint import load_checkpoint
from advmoe.training.levels import Level, make_levels
from advmoe.training.methods import METHODS
from advmoe.training.schedule import cosine as schedule
from advmoe.training.steps import training_attack

TEXTS = ("router_statistics", "attack_routing", "router_step")
"""Fields of `TrainConfig` that are not numbers."""
DESCRIBED = ("arch", "width", "granularity", "num_experts", "expert_filters", "model_scale", "router_gradient")
"""Fields of `ModelConfig` that are repeated in a result."""
EQUAL = 1e-6
"""Losses that differ by less are treated as equal."""


def trades_of_each(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """The loss of each image, [B]."""
    kl = F.kl_div(adversarial.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
    return F.cross_entropy(clean, labels, reduction="none") + beta * kl


def steered(model: RoutedNetwork, pathways_BL: Tensor) -> Forward:
    """The network on given pathways; a layer whose expert is -1 follows its router."""
    return lambda images, rows: model.forward_with_routing(images, pathways_BL[rows], tape_type=SteeredTape)[0]


class Probed:
    """A network in eval mode, images and labels, and the attack of training on given pathways."""

    def __init__(self, model: RoutedNetwork, batch: Batch, config: TrainConfig) -> None:
        self.model, self.images, self.labels, self.config = model, batch.images, batch.labels, config
        self.start = starting_point(batch.images, config.attack, generator_for(config.seed, 0))
        self.rows = torch.arange(len(batch.images))

    def loss(self, pathways_BL: Tensor, attacked: Tensor | None = None) -> Tensor:
        """Loss of each image on pathways, [B], with these attacked versions or, by default, new ones."""
        forward = steered(self.model, pathways_BL)
        with torch.no_grad():
            clean = forward(self.images, self.rows)
        if attacked is None:
            attacked = pgd(forward, self.images, kl_objective(clean), self.config.attack, start=self.start)
        with torch.no_grad():
            return trades_of_each(clean, forward(attacked, self.rows), self.labels, self.config.trades_beta)

    def pathways(self, router: int, expert: int, rest_BL: Tensor | None = None) -> Tensor:
        """Pathways on which a router takes an expert, and the other routers those of `rest_BL`."""
        if rest_BL is None:
            rest_BL = torch.full((len(self.rows), len(self.model.router_of_layer)), -1)
        return torch.where(torch.tensor(self.model.router_of_layer) == router, expert, rest_BL)

    def of_both(self) -> Tensor:
        """[1, B, R, N]: loss of an image if one router chose a given expert for both versions of it."""
        routers, experts = len(self.model.routers), self.model.config.num_experts
        losses = [[self.loss(self.pathways(router, expert)) for expert in range(experts)] for router in range(routers)]
        return torch.stack([torch.stack(of_router, dim=1) for of_router in losses], dim=1)[None]

    def oracle(self, attacked: Tensor) -> dict[str, float]:
        """Mean loss on the pathways that a sweep over the routers finds, before and after a new attack."""
        found_BL = torch.full((len(self.rows), len(self.model.router_of_layer)), -1)
        losses_BN = torch.empty(0)
        for router in range(len(self.model.routers)):
            tried = [self.pathways(router, expert, found_BL) for expert in range(self.model.config.num_experts)]
            losses_BN = torch.stack([self.loss(pathways_BL, attacked) for pathways_BL in tried], dim=1)
            found_BL = torch.stack(tried)[losses_BN.argmin(dim=1), self.rows]
        return {"loss": float(losses_BN.amin(dim=1).mean()), "attacked_anew": float(self.loss(found_BL).mean())}


@torch.no_grad()
def exact_losses(model: RoutedNetwork, views: Sequence[Tensor], labels: Tensor, beta: float) -> Tensor:
    """[views, B, R, N]: loss of an image if one router chose a given expert for a view (clean, attacked) of it."""
    own = [model(view) for view in views]
    layers, rows = torch.tensor(model.router_of_layer), torch.arange(len(labels))
    losses = torch.empty(len(views), len(labels), len(model.routers), model.config.num_experts)
    for number, view in enumerate(views):
        for router in range(losses.shape[2]):
            for expert in range(losses.shape[3]):
                forced_BL = torch.where(layers == router, expert, -1).expand(len(view), -1)
                logits = list(own)
                logits[number] = steered(model, forced_BL)(view, rows)
                losses[number, :, router, expert] = trades_of_each(logits[0], logits[1], labels, beta)
    return losses


def router_gradients(level: Level, views: Sequence[Tensor], labels: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Logits and their gradients in the lower level, each [views, B, R, N]. The model is not changed."""
    level = dataclasses.replace(level, model=copy.deepcopy(level.model))
    tapes: list[RoutingTape] = []

    def remembered(routers: nn.ModuleList, of_layer: Sequence[int], forced_BL: Tensor | None) -> RoutingTape:
        tapes.append(RoutingTape(routers, of_layer, forced_BL))
        return tapes[-1]

    with level.training():
        adversarial = level.model.forward_with_routing(views[1], tape_type=remembered)[0]
        clean = level.model.forward_with_routing(views[0], tape_type=remembered)[0]
        loss = trades_of_each(clean, adversarial, labels, beta).sum()
        decisions = [decision for tape in reversed(tapes) for _, decision in sorted(tape._decisions.items())]
        logits = [decision.logits_BN for decision in decisions if decision.logits_BN is not None]
        gradients = torch.autograd.grad(loss, logits)
    routers = len(level.model.routers)
    shaped = [torch.stack(tensors).unflatten(0, (2, routers)).transpose(1, 2) for tensors in (logits, list(gradients))]
    return shaped[0].detach(), shaped[1]


def comparison(logits: Tensor, losses: Tensor, chosen: Tensor) -> Tensor:
    """Gradients by the exact losses: the chosen expert compared with the best other, as in `advmoe.models.routing`."""
    other = losses.scatter(3, chosen, torch.inf).argmin(dim=3, keepdim=True)
    probability = (logits.gather(3, other) - logits.gather(3, chosen)).sigmoid()
    push = probability * (1.0 - probability) * (losses.gather(3, other) - losses.gather(3, chosen))
    return torch.zeros_like(logits).scatter(3, other, push).scatter(3, chosen, -push)


def routers_of(model: RoutedNetwork) -> list[Router]:
    """The routers, which a `ModuleList` does not know to be such."""
    return [router for router in model.routers if isinstance(router, Router)]


def weight_gradients(model: RoutedNetwork, views: Sequence[Tensor], of_logits: Tensor) -> list[Tensor]:
    """Gradients of the routers' weights, from the gradients of their logits."""
    found = [torch.zeros_like(router.linear.weight) for router in routers_of(model)]
    for number, view in enumerate(views):
        for at, features in enumerate(router_features(model, view)):
            found[at] += of_logits[number, :, at].T @ features
    return found


@torch.no_grad()
def router_features(model: RoutedNetwork, view: Tensor) -> list[Tensor]:
    """The input of the linear layer of each router, [B, C]."""
    features: dict[nn.Module, Tensor] = {}

    def note(linear: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        features[linear] = inputs[0].detach()

    hooks = [router.linear.register_forward_hook(note) for router in routers_of(model)]
    model(view)
    for hook in hooks:
        hook.remove()
    return [features[router.linear] for router in routers_of(model)]


def held_out(model: RoutedNetwork, views: Sequence[Tensor], exact: Tensor, chosen: Tensor) -> dict[str, Any]:
    """Decisions of three routings on the second half of the images, `wrong` and `regret` of each.

    - `trained`: by the network's routers.
    - `fitted`: by linear routers on the same features, fitted to the exact losses of the first half.
      The objective is the expected loss of a random choice with the probabilities of the layer, plus
      an L2 penalty of one of two weights. The better of the two on the second half is given. They
      have seen few images, so training can do better.
    - `constant`: each router takes the expert that is best for the first half.

    Args:
        model: The network, in eval mode.
        views: V versions of the images that are decided on, [B, 3, H, W] each.
        exact: Exact losses, [V, B, R, N].
        chosen: Experts that the routers chose, [V, B, R].
    """
    half = exact.shape[1] // 2
    features = [router_features(model, view) for view in views]
    rest = exact[:, half:]
    best = exact[:, :half].mean(dim=(0, 1)).argmin(dim=1)
    found = {
        "trained": decided(rest, chosen[:, half:]),
        "constant": decided(rest, best.expand(rest.shape[:3])),
    }
    for penalty in (1e-3, 1e-1):
        choice = torch.empty(rest.shape[:3], dtype=torch.int64)
        for at in range(len(model.routers)):
            x, other = (torch.cat([of[at][part] for of in features]) for part in (slice(half), slice(half, None)))
            losses = exact[:, :half, at].flatten(0, 1)
            losses = (losses - losses.mean(dim=1, keepdim=True)) / losses.std(dim=1).mean().clamp(min=EQUAL)
            weight = torch.zeros(exact.shape[3], x.shape[1], requires_grad=True)
            optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

            def closure(
                x: Tensor = x, losses: Tensor = losses, weight: Tensor = weight, decay: float = penalty
            ) -> Tensor:
                weight.grad = None
                value = ((x @ weight.T).softmax(dim=1) * losses).sum(dim=1).mean() + decay * weight.square().sum()
                value.backward()
                return value.detach()

            optimizer.step(closure)
            choice[:, :, at] = (other @ weight.detach().T).argmax(dim=1).unflatten(0, (len(views), -1))
        figures = decided(rest, choice)
        if "fitted" not in found or figures["regret"] < found["fitted"]["regret"]:
            found["fitted"] = figures
    return found


def decided(exact: Tensor, choice: Tensor) -> dict[str, float]:
    """`wrong` and `regret` of decisions [V, B, R] with exact losses [V, B, R, N]."""
    best = exact.min(dim=3).values
    lost = exact.gather(3, choice[..., None]).squeeze(3) - best
    return {
        "wrong": float((lost > EQUAL).double().mean()),
        "regret": float(lost.mean() / (exact.mean(dim=3) - best).mean().clamp(min=EQUAL)),
    }


def probe(
    levels: Sequence[Level], batch: Batch, config: TrainConfig, forms: Sequence[RouterGradient]
) -> dict[str, Any]:
    """The figures of the list above for one model."""
    model, labels = levels[0].model, batch.labels
    adversarial = training_attack(model, batch.images, labels, config, generator_for(config.seed, 0))
    views = (batch.images, adversarial)
    with evaluating(model):
        exact = exact_losses(model, views, labels, config.trades_beta)
        probed = Probed(model, batch, config)
        of_both, oracle = probed.of_both(), probed.oracle(adversarial)
        chosen = torch.stack([model.forward_with_routing(view)[1].expert_index_BL for view in views])
        first = [model.router_of_layer.index(router) for router in range(len(model.routers))]
        chosen = chosen[:, :, first]
        base = exact.gather(3, chosen[..., None]).squeeze(3)
    best_loss, best = exact.min(dim=3)
    better, of_all = best_loss < base - EQUAL, decided(exact, chosen)
    best_of_both, one = of_both[0].argmin(dim=2), chosen[0] == chosen[1]
    better_both = one & (of_both[0].amin(dim=2) < of_both[0].gather(2, chosen[0, ..., None]).squeeze(2) - EQUAL)
    loads_RN = F.one_hot(chosen, exact.shape[3]).double().mean(dim=(0, 1)).sort(dim=1, descending=True).values
    figures: dict[str, Any] = {
        "probed_loss": float(base.mean()),
        "better": of_all["wrong"],
        "gain": float((base - best_loss).mean() / base.mean()),
        "regret": of_all["regret"],
        "load": float(loads_RN[:, 0].mean()),
        "loads": loads_RN.mean(dim=0).tolist(),
        "oracle": oracle,
        "estimators": {},
    }
    with evaluating(model):
        figures["held_out"] = held_out(model, views, exact, chosen)
        figures["together"] = held_out(model, views[:1], of_both, chosen[:1])
        figures["together"]["one_decision"] = float((chosen[0] == chosen[1]).double().mean())
    for form in forms:
        own = [router.router_gradient for router in routers_of(model)]
        for router in routers_of(model):
            router.router_gradient = form
        logits, gradient = router_gradients(levels[0], views, labels, config.trades_beta)
        for router, of_training in zip(routers_of(model), own, strict=True):
            router.router_gradient = of_training
        true_gradient = comparison(logits, exact, chosen[..., None])
        with evaluating(model):
            ours, theirs = (weight_gradients(model, views, of) for of in (gradient, true_gradient))
        cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(ours, theirs, strict=True)]
        of_chosen = gradient.gather(3, chosen[..., None]).squeeze(3)
        figures["estimators"][form] = (
            None
            if not better.any()
            else {
                "raises_chosen": float((of_chosen < 0)[better].double().mean()),
                "finds_best": float((gradient.argmin(dim=3) == best)[better].double().mean()),
                "cosine": float(torch.stack(cosines).mean()),
                "together": None
                if not better_both.any()
                else {
                    "raises_chosen": float((of_chosen.sum(dim=0) < 0)[better_both].double().mean()),
                    "finds_best": float(
                        (gradient.sum(dim=0).argmin(dim=2) == best_of_both)[better_both].double().mean()
                    ),
                },
            }
        )
    return figures


def direction(model: RoutedNetwork) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.router_parameters()])


def run(form: str, num_experts: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train by AdvMoE with one router gradient, and probe the model at regular intervals."""
    settings = {"arch": options.arch, "width": options.width, "granularity": options.granularity}
    settings |= {"num_experts": num_experts, "model_scale": options.model_scale, "router_gradient": form}
    settings |= {"expert_filters": options.expert_filters}
    info = dataset_info(options.dataset, options.data_dir)
    of_training = dict(setting.split("=") for setting in options.set)
    model_config, config = resolve(
        info,
        settings,
        {"seed": options.seed, "batch_size": options.batch_size}
        | {name: value if name in TEXTS else float(value) for name, value in of_training.items()},
    )
    data = load_dataset(options.dataset, options.data_dir)
    with seeded(options.seed):
        model_config = dataclasses.replace(model_config, image_size=model_config.image_size // options.pool)
        model = build_model(model_config)
    method = METHODS["advmoe"]
    levels = make_levels(method.levels, model, config)
    streams = [iter(endless(data.train, info.image_size, config, stream)) for stream in range(len(levels))]
    (probed,) = BatchLoader(data.train, batch_size=options.images, indices=np.arange(options.images)).epoch(0)
    probed = shrunk(probed, options.pool)
    start, records = direction(model), []
    losses: list[list[float | None]] = []
    for step in range(options.steps + 1):
        if step % options.every == 0:
            figures = {"step": step, **probe(levels, probed, config, options.forms)}
            figures["to_start"] = float(F.cosine_similarity(start, direction(model), dim=0))
            if losses:
                for name, values in zip(("router_loss", "loss"), zip(*losses, strict=True), strict=True):
                    taken = [value for value in values if value is not None]
                    figures |= {name: sum(taken) / len(taken), f"worst_{name}": max(taken)} if taken else {}
            records.append(figures)
            losses = []
        if step < options.steps:
            for level in levels:
                for group in level.optimizer.param_groups:
                    group["lr"] = schedule(step, options.steps, group.get("peak", config.lr))
            noise = [generator_for(options.seed, step, level) for level in range(len(levels))]
            batches = [shrunk(next(stream), options.pool) for stream in streams]
            if step >= options.hold:
                lower, upper = METHODS["router_at"].step(levels[:1], batches[:1], config, noise[:1], step)[0], None
            else:
                now = config if step >= options.wait else dataclasses.replace(config, router_every=10**6)
                lower, upper = method.step(levels, batches, now, noise, step + (now is not config))
            losses.append([None if result is None else float(result.loss) for result in (lower, upper)])
    return records


def shrunk(batch: Batch, factor: int) -> Batch:
    """The batch with smaller images, so that a probe takes less time."""
    return batch if factor == 1 else batch._replace(images=F.avg_pool2d(batch.images, factor))


def endless(images: Any, size: int, config: TrainConfig, stream: int) -> Any:
    """Batches of one stream, epoch after epoch."""
    loader = BatchLoader(
        images,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        seed=config.seed,
        stream=stream,
        augment=training_transform(images, size, flip=config.flip),
    )
    for epoch in range(1_000_000):
        yield from loader.epoch(epoch)


def of_checkpoint(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Probe the network of a checkpoint."""
    checkpoint = load_checkpoint(path)
    model, config = checkpoint.build(), from_dict(TrainConfig, checkpoint.train)
    levels = make_levels(("routers",), model, config, fresh=False)
    data = load_dataset(options.dataset, options.data_dir)
    (probed,) = BatchLoader(data.train, batch_size=options.images, indices=np.arange(options.images)).epoch(0)
    found = probe(levels, probed, config, options.forms)
    described = {name: getattr(model.config, name) for name in DESCRIBED}
    return {**described, "epoch": checkpoint.metrics.get("epoch"), "probes": [found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--arch", default="vgg16")
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--granularity", default="layer")
    parser.add_argument("--num-experts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--model-scale", type=float, default=0.5)
    parser.add_argument("--expert-filters", default="windows", choices=get_args(ExpertFilters))
    parser.add_argument(
        "--forms", nargs="+", default=["dense", "sampled", "advantage", "softmax"], choices=ROUTER_GRADIENTS
    )
    parser.add_argument("--train", nargs="+", help="router gradients to train with (default: all of --forms)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=25, help="steps between probes")
    parser.add_argument("--images", type=int, default=128, help="images probed")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=1, help="shrink images by this factor")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of TrainConfig")
    parser.add_argument("--wait", type=int, default=0, help="steps before the routers begin to learn")
    parser.add_argument("--hold", type=int, default=10**9, help="steps after which the experts stay as they are")
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], help="probe these instead of training")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.num_experts, options.train = options.num_experts[-1:], options.forms[:1]
        options.steps, options.every, options.images, options.batch_size, options.width = 2, 2, 16, 16, 0.0625
    torch.set_num_threads(1)
    results = [of_checkpoint(path, options) for path in options.checkpoints]
    for num_experts in [] if results else options.num_experts:
        for form in options.train or options.forms:
            began = time.process_time()
            records = run(form, num_experts, options)
            results.append(
                {
                    "num_experts": num_experts,
                    "trained_with": form,
                    "seconds": time.process_time() - began,
                    "probes": records,
                }
            )
            if not options.json:
                show(results[-1])
    if options.json:
        known = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        known.pop("data_dir")
        if known.pop("checkpoints"):
            known = {name: known[name] for name in ("dataset", "forms", "images")}
        print(json.dumps({"settings": known, "hardware": hardware(torch.device("cpu")), "runs": results}, indent=1))


def show(result: dict[str, Any]) -> None:
    print(f"N = {result['num_experts']}, trained with {result['trained_with']}, {result['seconds']:.0f} s", flush=True)
    for record in result["probes"]:
        print("  ", rounded({name: value for name, value in record.items() if not isinstance(value, dict)}))
        print("      ", "oracle", rounded(record["oracle"]))
        for group in ("held_out", "together", "estimators"):
            for name, figures in record[group].items():
                print("      ", group, name, rounded(figures), flush=True)


def rounded(value: Any) -> Any:
    """The value with three decimals."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
