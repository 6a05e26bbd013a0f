"""The analysis of a route log, as plain values for tables, JSON and figures.

Shape suffixes: I images of a set, K classes, L MoE layers, N experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import ConfigError
from advmoe.evaluation.dissection import dissection
from advmoe.evaluation.pathways import BINS, diversity, mask_of, mask_similarity, pathway_channels, reachable_iou
from advmoe.models.network import RoutedNetwork
from advmoe.routing_log import ExpertLoad, RouteLog

CLEAN = "clean"
FREQUENT = 10
"""Number of most frequent pathways in the result."""


def analyze(log: RouteLog, model: RoutedNetwork, *, sparse: RoutedNetwork | None = None) -> dict[str, Any]:
    """Expert load, pathways, dissection and similarity for each condition of a log.

    Args:
        log: The log of an evaluation, with the condition `clean` and some attacks.
        model: The MoE-CNN it is of; its weights are not needed.
        sparse: A Sparse-CNN on the same backbone, to whose mask pathway the pathways are compared
            (Fig. 6).

    Returns:
        `images`; `decisions_per_layer` of each image: 1, or the number of its tokens where these are
        routed; `conditions`: name -> load, entropy, number of pathways, most frequent ones and, for
        attacks, the dissection; `similarity`: overlap of clean and attacked pathways and diversity
        over pairs of images, if there are two, as IoU; `mask`: IoU with the mask pathway; `mask_reachable`: the least
        and the largest that any pathway has. All but the first are absent where experts are no
        channels of a common backbone.

    Raises:
        ConfigError: The log has no clean condition or is of another model, or the Sparse-CNN is on
            another backbone.
    """
    names = [name for name, _ in log.conditions]
    layers = len(model.expert_layouts) * model.rows_per_image
    if not layers:
        raise ConfigError(
            f"only the routing of an MoE-CNN can be analyzed, and a {model.config.kind} network has none; give the "
            "evaluation of an MoE-CNN"
        )
    if CLEAN not in names or len(log.num_experts) != layers:
        raise ConfigError(
            f"expected a route log of {layers} decisions with the condition 'clean', "
            f"got {len(log.num_experts)} with {', '.join(names) or 'none'}; evaluate the model again"
        )
    attacks = [name for name in names if name != CLEAN]
    found: dict[str, Any] = {
        "images": len(log.routes(CLEAN).indices),
        "decisions_per_layer": model.rows_per_image,
        "conditions": {name: condition(log, name, model) for name in names},
    }
    for name in attacks:
        found["conditions"][name]["dissection"] = dissection(log, name, layers=len(model.expert_layouts))
    if model.rows_per_image == 1:
        channels = pathway_channels(model)
        found["similarity"] = {"overlap": {name: histogram(log.overlap(CLEAN, name, channels)[1]) for name in attacks}}
        if found["images"] > 1:
            found["similarity"]["diversity"] = {name: spread(log, name, model) for name in names}
        if sparse is not None:
            mask = mask_of(sparse, model)
            found["mask"] = {
                similar.condition: histogram(similar.iou) | {"cosine": round(float(similar.cosine.mean()), 4)}
                for similar in mask_similarity(log, names, channels, mask)
            }
            found["mask_reachable"] = [round(value, 4) for value in reachable_iou(model, mask)]
    return found


def condition(log: RouteLog, name: str, model: RoutedNetwork) -> dict[str, Any]:
    """Statistics of the routers under one condition: load [layers][experts], by class [layers][classes][experts]."""
    by_class = log.expert_load(name, num_classes=model.config.num_classes).merged(len(model.expert_layouts))
    load = ExpertLoad(counts_LKN=by_class.counts_LKN.sum(axis=1, keepdims=True), num_experts=by_class.num_experts)
    pathways, frequency = log.unique_pathways(name)
    between = "" if model.config.num_experts <= 10 else "-"  # a number of two digits would not end anywhere
    return {
        "load": load.share[:, 0].round(4).tolist(),
        "load_by_class": by_class.share.round(4).tolist(),
        "entropy": load.evenness[:, 0].round(4).tolist(),
        "flow": flow(log.routes(name).experts_IL, model),
        "pathways": len(pathways),
        "frequent": [
            {"pathway": between.join(map(str, pathway.tolist())), "images": int(count)}
            for pathway, count in zip(pathways[:FREQUENT], frequency[:FREQUENT], strict=True)
        ],
    }


def flow(experts_IL: NDArray[np.uint8], model: RoutedNetwork) -> list[list[list[float]]]:
    """Flow of images between layers: the share of images that take expert i and, in the next layer, expert j.

    Returns:
        [layers - 1][experts][experts]; empty if tokens are routed, because an image's tokens take
        different experts.
    """
    if model.rows_per_image > 1:
        return []
    experts = model.config.num_experts
    pairs = experts_IL[:, :-1].astype(np.int64) * experts + experts_IL[:, 1:]
    counts = [np.bincount(column, minlength=experts**2).reshape(experts, experts) for column in pairs.T]
    return [(count / max(len(experts_IL), 1)).round(4).tolist() for count in counts]


def histogram(values: NDArray[np.float64]) -> dict[str, Any]:
    """Counts of values in [0, 1] in equal bins, their mean and standard deviation."""
    counts, _ = np.histogram(values, bins=BINS, range=(0.0, 1.0))
    return {
        "counts": counts.tolist(),
        "mean": round(float(values.mean()), 4),
        "std": round(float(values.std()), 4),
    }


def spread(log: RouteLog, name: str, model: RoutedNetwork) -> dict[str, Any]:
    """IoU over pairs of images."""
    pairs = diversity(log, name, pathway_channels(model))
    return {"counts": pairs.histogram.tolist(), "mean": round(pairs.mean_iou, 4), "pairs": pairs.num_pairs}
