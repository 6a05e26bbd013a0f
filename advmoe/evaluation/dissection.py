"""The fate of each adversarial example: router and prediction, each fooled or not (paper, Sec. 3, Figs. 4 and 5).

Shape suffixes: L MoE layers.
"""

from __future__ import annotations

from typing import Any

from advmoe.evaluation.results import SuiteResult
from advmoe.models.network import RoutedNetwork
from advmoe.routing_log import Condition, RouteLog


def route_log(result: SuiteResult, model: RoutedNetwork) -> RouteLog:
    """The pathways of an evaluation under the conditions `clean`, `pgd` (after its last step) and `worst`."""
    log = RouteLog([model.config.num_experts] * (len(model.expert_layouts) * model.rows_per_image))
    for name, pathways in result.arrays.items():
        kind, _, condition = name.partition("/")
        if kind == "pathway":
            log.append(
                condition,
                result.arrays["index"],
                pathways,
                labels=result.arrays["label"],
                predictions=result.arrays[f"prediction/{condition}"],
            )
    return log


def dissection(
    log: RouteLog, attack: Condition, clean: Condition = "clean", *, layers: int | None = None
) -> dict[str, Any]:
    """Shares of all images in per cent: the four classes, and their sums.

    All images count, including images that are wrong when clean. Under `pgd`, the MoE's robustness
    is the accuracy after the last step. It may exceed RA, for which an image must be right at every
    step. Under `worst` it is `ra_worst`, up to the rounding of another batch.
    `changed_by_layer` is the share of decisions that the attack changes in each of the MoE layers;
    a layer that routes tokens makes several for an image. Default: every decision is a layer.
    Empty if the two conditions have no image in common, or a label or prediction is unknown.
    """
    change = log.compare(clean, attack)
    if change is None or change.dissection is None:
        return {}
    parts = change.dissection
    total = parts.num_samples

    changed_L = change.changed_by_layer
    if layers is not None:
        changed_L = changed_L.reshape(layers, -1).mean(axis=1)

    def percent(count: float) -> float:
        return round(100 * count / total, 2)

    return {
        "router_survives_right": percent(parts.survived_right),
        "router_fooled_right": percent(parts.fooled_right),
        "router_survives_wrong": percent(parts.survived_wrong),
        "router_fooled_wrong": percent(parts.fooled_wrong),
        "router_robustness": round(100 * parts.router_robustness, 2),
        "moe_robustness": round(100 * parts.robust_accuracy, 2),
        "changed_by_layer": [round(100 * share, 2) for share in changed_L],
    }
