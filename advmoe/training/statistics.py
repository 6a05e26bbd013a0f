"""Running sums over the steps of an epoch: accuracies, losses, and what the routers did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advmoe.training.steps import StepResult


class EpochSums:
    """Sums for one level. They live in a dict of tensors, which a checkpoint in mid-epoch carries along."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._num_experts = num_experts
        self._sums: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("images", "loss", "clean_correct", "adversarial_correct", "attacked", "fooled")
        }
        self._sums["load"] = torch.zeros((num_layers, num_experts), dtype=torch.float64, device=device)

    def add(self, result: StepResult) -> None:
        """Count one step."""
        sums = self._sums
        sums["images"] += result.images
        sums["loss"] += result.loss * result.images
        sums["clean_correct"] += result.clean_correct
        index_BL = result.routing.expert_index_BL
        if index_BL.shape[1]:
            chosen_BLN = torch.nn.functional.one_hot(index_BL, self._num_experts)
            # where tokens are routed, a layer has several decisions per image, side by side
            sums["load"] += chosen_BLN.unflatten(1, (len(sums["load"]), -1)).sum(dim=(0, 2))
        if result.adversarial_correct is not None and result.adversarial_routing is not None:
            sums["attacked"] += result.images
            sums["adversarial_correct"] += result.adversarial_correct
            sums["fooled"] += (index_BL != result.adversarial_routing.expert_index_BL).any(dim=1).sum()

    @property
    def images(self) -> int:
        """Images counted."""
        return int(self._sums["images"])

    def summary(self) -> dict[str, float]:
        """Mean loss, training SA and RA (per cent), and the share of images whose pathway the attack changed."""
        sums = {name: value.item() for name, value in self._sums.items() if name != "load"}
        images, attacked = max(sums["images"], 1.0), sums["attacked"]
        figures = {"loss": sums["loss"] / images, "sa": 100 * sums["clean_correct"] / images}
        if attacked:
            figures["ra"] = 100 * sums["adversarial_correct"] / attacked
            if self._sums["load"].numel():
                figures["routers_fooled"] = 100 * sums["fooled"] / attacked
        return figures

    def router_load(self) -> list[float]:
        """Share of images at the busiest expert of each MoE layer; 1 is a collapsed router, 1 / N perfect balance."""
        load_LN = self._shares()
        return [round(share, 4) for share in load_LN.amax(dim=1).tolist()] if load_LN.numel() else []

    def router_entropy(self) -> list[float]:
        """Entropy of each MoE layer's load, divided by log N: 0 is a collapsed router, 1 perfect balance."""
        load_LN = self._shares()
        if not load_LN.numel() or self._num_experts == 1:
            return [0.0] * len(load_LN)
        entropy_L = torch.special.entr(load_LN).sum(dim=1) / torch.log(torch.tensor(float(self._num_experts)))
        return [round(value, 4) for value in entropy_L.tolist()]

    def _shares(self) -> Tensor:
        load_LN = self._sums["load"]
        return load_LN / load_LN.sum(dim=1, keepdim=True).clamp_min(1.0)

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's sums."""
        for name, value in self._sums.items():
            value.copy_(state[name])
