"""Metrics of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from advmoe_export.metadata import ModelMetadata
from advmoe_export.monitor import LayerDrift

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Metrics of one server, in a registry of its own."""

    def __init__(self, metadata: ModelMetadata) -> None:
        self.registry = CollectorRegistry()
        self._layers = metadata.layers
        common: dict[str, Any] = {"namespace": "advmoe", "registry": self.registry}
        self._requests = Counter("requests", "Requests, by endpoint and HTTP status.", ["endpoint", "status"], **common)
        self._latency = Histogram(
            "request_seconds", "From a request's arrival to its response.", ["endpoint"], buckets=SECONDS, **common
        )
        self._images = Counter("images", "Images that were classified.", **common)
        self._batch = Histogram("batch_images", "Images in a batch.", buckets=BATCHES, **common)
        self._model = Histogram("model_seconds", "Time of a batch in onnxruntime.", buckets=SECONDS, **common)
        self._expert = Counter("expert_images", "Images by MoE layer and expert.", ["layer", "expert"], **common)
        self._distance = Gauge(
            "route_drift", "Share of the load that moved between experts since export, 0 to 1.", ["layer"], **common
        )
        self._noise = Gauge(
            "route_drift_noise",
            "Drift to be expected by chance for the number of images compared.",
            ["layer"],
            **common,
        )
        self.waiting = Gauge("waiting_images", "Images that wait for a worker.", **common)
        self.requests = Gauge("open_requests", "Requests that are being read, wait or run.", **common)
        for layer, count in zip(metadata.layers, metadata.num_experts, strict=True):
            for expert in range(count):
                self._expert.labels(layer, expert)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(endpoint, status).inc()
        self._latency.labels(endpoint).observe(seconds)

    def batch(self, images: int, seconds: float, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Count a batch and its experts."""
        self._images.inc(images)
        self._batch.observe(images)
        self._model.observe(seconds)
        pathway = outputs.get("expert_index")
        if pathway is not None:
            for layer, column in zip(self._layers, pathway.T, strict=True):
                for expert, count in zip(*np.unique(column, return_counts=True), strict=True):
                    self._expert.labels(layer, int(expert)).inc(int(count))

    def text(self, drifts: Sequence[LayerDrift]) -> bytes:
        """All metrics in the text format of Prometheus."""
        for drift in drifts:
            self._distance.labels(drift.layer).set(drift.distance)
            self._noise.labels(drift.layer).set(drift.noise)
        return generate_latest(self.registry)
