"""Checks that a robust accuracy (RA) has to pass before it can be trusted.

Each check looks for one known way in which a defense, or the evaluation itself, fools attacks
(Athalye et al., 2018; Carlini et al., 2019; Croce & Hein, 2020; the NaN routers of earlier MoE
results). The checks use a sample of the images. A failed check does not prove the number wrong. It
names a reason why the attack may have been too weak.

Shape suffixes: B batch, I images of a set, K classes, L MoE layers, M pathways, N experts, R routers.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from advmoe.attacks.autoattack import autoattack
from advmoe.attacks.pathways import RouteAttackConfig, route_attack
from advmoe.attacks.pgd import (
    GradientCount,
    check_images,
    cross_entropy_objective,
    gradient_of,
    misclassified,
    pgd,
    plain,
)
from advmoe.attacks.relaxations import is_routed, routing_views
from advmoe.attacks.untargeted import through_view, untargeted
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig
from advmoe.errors import ConfigError
from advmoe.evaluation.precision import full_precision
from advmoe.evaluation.vocabulary import Status
from advmoe.models.modes import evaluating
from advmoe.routing_log import ExpertLoad
from advmoe.seeding import seeded

TOLERANCE = 0.02
"""Share of images by which the result may change under a stronger attack, or another way of running
the model, before a check fails. A single image may always change."""
BLACK_BOX = 0.002
"""The same limit for Square, which sees no gradient. AutoAttack's authors chose this value for their own warning."""
NEEDED = 16
"""Correctly classified images without which a check of an attack shows nothing. A single image may
always change, and of a few images it is a large share."""
LARGE_EPS = AttackConfig(eps=1.0, steps=50, step_size=0.05, start="clean")
"""An attack that may replace the whole image. It starts at the clean image, so that it depends on gradients only."""


@dataclass(frozen=True)
class Diagnostic:
    """Outcome of one check."""

    name: str
    status: Status
    value: str
    """What was seen."""
    expected: str
    """The result of a sound evaluation, and the meaning of a failure."""


def diagnose(sample: Victims, *, withstood: Tensor | None = None, square_queries: int = 500) -> list[Diagnostic]:
    """Run all checks. If outputs are not finite, the checks that need finite outputs are left out.

    Args:
        sample: Some images, right and wrong ones, under the attack whose RA is checked.
        withstood: [B], bool: images that the other white-box attacks of the evaluation did not
            break; None if there were no others.
        square_queries: Queries of the black-box check; 0 leaves it out.

    Raises:
        ConfigError: Images are outside [0, 1].
    """
    check_images(sample.images)
    with evaluating(sample.model), full_precision(sample.model):
        first = check_finite(sample)
        checks = [first, *(check(sample) for check in (check_logits, check_deterministic, check_batch_invariant))]
        if first.status == "failed":
            return checks
        return [
            *checks,
            check_input_range(sample),
            check_label_blind(sample),
            *check_attack(sample, withstood, square_queries),
        ]


def _verdict(name: str, passed: bool, value: str, expected: str) -> Diagnostic:
    return Diagnostic(name, "passed" if passed else "failed", value, expected)


def _slack(images: int, tolerance: float = TOLERANCE) -> float:
    return max(tolerance, 1.0 / max(images, 1)) + 1e-9  # differences of shares carry rounding


def on_enough(check: Diagnostic, right: int) -> Diagnostic:
    """A check of an attack, with the status `not run` if it passed on too few images to mean
    anything. A failure counts on any number.

    Args:
        check: The check.
        right: The number of images that were attacked, because they are classified correctly.
    """
    if check.status != "passed" or right >= NEEDED:
        return check
    are = "image is" if right == 1 else "images are"
    return dataclasses.replace(
        check, status="not run", value=f"{right} {are} classified correctly, the check needs {NEEDED}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@torch.no_grad()
def _accuracy(sample: Victims, images: Tensor) -> float:
    return float((sample.model(images).argmax(dim=1) == sample.labels).float().mean())


def check_finite(sample: Victims) -> Diagnostic:
    """Check that everything is finite: sign(NaN) is 0 and argmax(NaN) is 0, so NaNs look like robustness."""
    model, x = sample.model, sample.images.clone().requires_grad_()
    rows = torch.arange(len(x), device=x.device)
    values: dict[str, Tensor] = {}
    for name, forward in routing_views(model).items():
        logits = forward(x, rows)
        values[f"logits ({name})"] = logits
        values[f"gradients ({name})"] = gradient_of(F.cross_entropy(logits, sample.labels, reduction="sum"), x)
    if is_routed(model):
        with torch.no_grad():
            router_logits = sample.network.forward_with_routing(sample.images)[1].logits_BRN
        assert router_logits is not None
        values["router logits"] = router_logits
    broken = [name for name, value in values.items() if not value.isfinite().all()]
    seen = "all finite" if not broken else f"not finite: {', '.join(broken)}"
    return _verdict("finite", not broken, seen, "finite logits, router logits and gradients; NaN hides the gradient")


@torch.no_grad()
def check_logits(sample: Victims) -> Diagnostic:
    """The model must return logits: a softmax inside it flattens the gradient of the attack's own softmax."""
    outputs = sample.model(sample.images)
    probabilities = bool((outputs >= 0).all() and ((outputs.sum(dim=1) - 1).abs() < 1e-4).all())
    seen = "each row sums to 1" if probabilities else f"from {outputs.min():.3g} to {outputs.max():.3g}"
    return _verdict("logits", not probabilities, seen, "logits; probabilities flatten the gradient of the loss")


@torch.no_grad()
def check_deterministic(sample: Victims) -> Diagnostic:
    """Equal images must get equal logits. An attack on a random defense would need the expected gradient."""
    with seeded(sample.seed):
        first, second = sample.model(sample.images), sample.model(sample.images)
    difference = float((first - second).abs().max())
    passed = difference <= 1e-4 * (1.0 + float(first.abs().max()))
    return _verdict("deterministic", passed, f"largest difference {difference:.2g}", "equal logits for equal images")


@torch.no_grad()
def check_batch_invariant(sample: Victims) -> Diagnostic:
    """An image's prediction must not depend on the other images of the batch or on the image's position."""
    model, images = sample.model, sample.images
    whole = model(images)
    reversed_order = model(images.flip(0)).flip(0)
    one_by_one = torch.cat([model(image[None]) for image in images[:8]])
    scale = 1e-3 * (1.0 + float(whole.abs().max()))
    differing = ((whole - reversed_order).abs() > scale).any(dim=1)
    differing[:8] |= ((whole[:8] - one_by_one).abs() > scale).any(dim=1)
    share = float(differing.float().mean())
    return _verdict(
        "batch_invariant",
        share <= _slack(len(images)),
        f"{_percent(share)} of images differ",
        "the same logits in any batch; else attacked images are judged by their neighbors",
    )


def check_input_range(sample: Victims) -> Diagnostic:
    """Images in [0, 1] must suit the model. A model that expects normalized images has chance
    accuracy on them, and the attack's radius has no meaning.
    """
    images = sample.images
    mean, std = images.mean(dim=(0, 2, 3), keepdim=True), images.std(dim=(0, 2, 3), keepdim=True)
    plain, normalized = _accuracy(sample, images), _accuracy(sample, (images - mean) / std.clamp_min(1e-6))
    return _verdict(
        "input_range",
        normalized <= plain + 0.05,
        f"accuracy {_percent(plain)} on [0, 1], {_percent(normalized)} on normalized images",
        "images in [0, 1] are what the model was trained on; normalization belongs inside it",
    )


@torch.no_grad()
def check_label_blind(sample: Victims) -> Diagnostic:
    """Equal images must get equal predictions. A model that separates them gets labels from elsewhere."""
    gray = torch.full_like(sample.images, 0.5)
    distinct = int(sample.model(gray).argmax(dim=1).unique().numel())
    seen = f"{distinct} distinct predictions for {len(gray)} equal images"
    return _verdict("label_blind", distinct == 1, seen, "one; more means that labels leak into the model")


def check_attack(sample: Victims, withstood: Tensor | None, square_queries: int) -> list[Diagnostic]:
    """Checks on the results of PGD on this model."""
    attack = sample.attack
    right = sample.right()
    victims = sample.take(right)
    total = max(len(sample), 1)

    def ra_under(config: AttackConfig) -> float:
        return float(untargeted(victims.under(config))[1].sum()) / total

    count = GradientCount()
    adversarial, survived = untargeted(victims, count=count)
    ra = float(survived.sum()) / total
    one = dataclasses.replace(attack, steps=1, step_size=attack.eps, start="clean", restarts=1)
    quick = dataclasses.replace(attack, steps=min(attack.steps, 20), step_size=max(attack.step_size, attack.eps / 8))
    radii = (attack.eps / 2, attack.eps, min(2 * attack.eps, 1.0))
    by_radius = [
        ra_under(dataclasses.replace(quick, eps=radius, step_size=quick.step_size * radius / attack.eps))
        for radius in (radii if attack.eps else ())
    ]
    one_step = ra_under(one)
    unbounded = ra_under(LARGE_EPS)
    further = _attacked_further(victims.take(survived), adversarial[survived]) / total
    slack = _slack(total)
    unseen = survived if withstood is None else survived & withstood[right]
    rising = any(later > earlier + slack for earlier, later in itertools.pairwise(by_radius))
    monotone = _verdict(
        "monotone_in_eps",
        not rising,
        f"RA {', '.join(map(_percent, by_radius))} at eps/2, eps, 2 eps",
        "a larger radius never helps the model",
    )
    if not by_radius:
        monotone = dataclasses.replace(monotone, status="not run", value="eps is 0")
    checks = [
        _verdict(
            "zero_gradients",
            count.zero_share <= 0.01,
            f"{_percent(count.zero_share)} of {count.taken} gradients are zero",
            "at most 1 %; an image with a zero gradient never moves",
        ),
        _verdict(
            "large_eps",
            unbounded <= slack,
            f"RA {_percent(unbounded)} at eps = 1",
            "0 %: an attack that may replace the image must win, else it gets no useful gradient",
        ),
        _verdict(
            "one_step",
            one_step >= ra - slack,
            f"RA {_percent(one_step)} after one step, {_percent(ra)} after {attack.steps}",
            "many small steps break more than one big one; else gradients are masked",
        ),
        _verdict(
            "converged",
            further <= slack,
            f"{_percent(further)} more broken by {attack.steps} further steps",
            f"next to nothing; else {attack.steps} steps of {255 * attack.step_size:.3g}/255 are too few",
        ),
        monotone,
        _check_black_box(victims.take(unseen), square_queries, total),
    ]
    return [on_enough(check, len(victims)) for check in checks]


def _attacked_further(survivors: Victims, adversarial: Tensor) -> int:
    """The number of survivors that are broken if PGD continues from its last point."""
    if not len(survivors):
        return 0
    found = pgd(
        plain(survivors.model),
        survivors.images,
        cross_entropy_objective(survivors.labels),
        survivors.attack,
        start=adversarial,
        won=misclassified(survivors.labels),
    )
    return int((~survivors.right(found)).sum())


def _check_black_box(unseen: Victims, queries: int, total: int) -> Diagnostic:
    """Square (Andriushchenko et al., 2020) on images that no white-box attack broke."""
    nothing = black_box(0, total, queries)
    if not queries:
        return dataclasses.replace(nothing, status="not run", value="switched off")
    if not len(unseen):
        return dataclasses.replace(nothing, value="the white-box attacks left nothing to break")
    try:
        found = autoattack(unseen, attacks=("square",), square_queries=queries)
    except ConfigError as error:  # the package is optional
        return dataclasses.replace(nothing, status="not run", value=str(error))
    return black_box(int((~found.robust_after["square"]).sum()), total, queries)


def black_box(broken: int, total: int, queries: int) -> Diagnostic:
    """Square sees no gradient, so it should not break images that all gradient attacks missed.

    Args:
        broken: Images broken by Square, and by no white-box attack.
        total: Number of images.
        queries: Queries of Square for each image.
    """
    return _verdict(
        "black_box",
        broken / total <= _slack(total, BLACK_BOX),
        f"{_percent(broken / total)} of {total} images broken by {queries} queries of Square alone",
        "next to nothing that the white-box attacks left; else the gradient is masked",
    )


def check_routing(sample: Victims, observed_ML: Tensor) -> Diagnostic:
    """`routing_gap` on the sample, for an evaluation that does not attack the routing of all images.

    Args:
        sample: Some images, right and wrong ones. The model routes. Each attack gets one start.
        observed_ML: Pathways of other images, for the route attack.
    """
    with evaluating(sample.model), full_precision(sample.model):
        victims = sample.take(sample.right()).under(dataclasses.replace(sample.attack, restarts=1))
        right, nearby = len(victims), victims.images
        left: list[int] = []
        for view in routing_views(sample.model).values():  # the model itself comes first
            found, kept = through_view(victims, view) if left else untargeted(victims)
            nearby = nearby[kept] if left else found[kept]
            victims = victims.take(kept)
            left.append(len(victims))
        if len(victims):
            _, robust = route_attack(victims, observed_ML=observed_ML, nearby=nearby, config=RouteAttackConfig())
            left.append(int(robust.sum()))
    gap = routing_gap(left[0] / len(sample), left[-1] / len(sample), len(sample))
    return on_enough(gap, right)


def routing_gap(ra: float, ra_routing: float, images: int) -> Diagnostic:
    """Whether plain PGD overstates robustness: compares it with all attacks on the routing together."""
    return _verdict(
        "hidden_by_routing",
        ra - ra_routing <= _slack(images),
        f"RA {_percent(ra)} by the model's own gradient, {_percent(ra_routing)} by it and the attacks on its routing",
        "about the same; else hard routing hides part of the gradient, and the attacks on it count",
    )


def routing_seen(clean_IL: NDArray[np.uint8], attacked_IL: NDArray[np.uint8], num_experts: int) -> Diagnostic:
    """The use of the experts, without a verdict, because a router may rightly prefer one expert.

    Args:
        clean_IL: The experts of each clean image.
        attacked_IL: The experts of each image after PGD.
        num_experts: Number of experts N.
    """
    counts_LN = np.stack([(clean_IL == expert).sum(axis=0) for expert in range(num_experts)], axis=1)
    evenness_L = ExpertLoad(counts_LKN=counts_LN[:, None].astype(np.uint64)).evenness[:, 0]
    changed = clean_IL != attacked_IL
    return Diagnostic(
        "routing",
        "info",
        f"{len(np.unique(clean_IL, axis=0))} pathways in {len(clean_IL)} images; entropy of the load "
        f"{evenness_L.mean():.2f}, lowest layer {evenness_L.min():.2f}; PGD changes the pathway of "
        f"{_percent(float(changed.any(axis=1).mean()))} of images, {_percent(float(changed.mean()))} of decisions",
        "entropy 1 where all experts are used alike, 0 where a layer always takes the same one",
    )
