"""Writes figures, settings and images for TensorBoard immediately, so that a full disk is an error
of the write that meets it.

TensorBoard's own writer passes events to a thread. An error in that thread is a traceback that no
caller can catch.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

GROUPS = {"train": "train", "val": "val", "routers": "router", "router": "router"}
"""First word of a figure's name -> its group of charts. All other figures belong to the group `train`."""
SMALLEST = 96
"""Size in pixels to which a picture is enlarged, as far as whole multiples of its size allow."""


class EventLog:
    """An event file in a folder, created with the first record.

    Args:
        folder: Folder that TensorBoard reads.
        first_step: First step of the file. Records of other files from this step on are void,
            because the run went back.
        settings: Nested settings of the run, for TensorBoard's table of runs.
    """

    def __init__(self, folder: Path, *, first_step: int, settings: Mapping[str, Any]) -> None:
        self._first_step = first_step
        self._settings = settings
        self._started = False
        # TensorBoard reads files in the order of their names, so names contain the time in
        # microseconds
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"

    def add(self, step: int, figures: Mapping[str, Any], pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Append the record of a step.

        Args:
            step: The step of the training.
            figures: Numbers by name, and lists with a number per layer. Other values are left out.
            pictures: Images by name, uint8 [n, H, W, 3]; the n images are shown side by side.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _charts(figures)]
        values += [Summary.Value(tag=name, image=_strip(images)) for name, images in pictures.items()]
        events = [Event(step=step, summary=Summary(value=values))]
        if not self._started:
            start = SessionLog(status=SessionLog.START)
            events = [
                Event(file_version="brain.Event:2"),
                Event(step=self._first_step, session_log=start),
                Event(summary=hparams_pb(dict(_flat(self._settings)))),
                *events,
            ]
        with self._path.open("ab") as file:
            writer = RecordWriter(file)
            for event in events:
                event.wall_time = time.time()
                writer.write(event.SerializeToString())
        self._started = True


def _charts(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by the name of their chart, such as `val/sa` and `router/load/07`."""
    for name, value in figures.items():
        word, _, rest = name.partition("_")
        tag = f"{GROUPS[word]}/{rest}" if word in GROUPS and rest else f"train/{name}"
        if isinstance(value, int | float):
            yield tag, value
        elif isinstance(value, list):
            yield from ((f"{tag}/{layer:02}", element) for layer, element in enumerate(value))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by names such as `train.attack.eps`. Values of types that TensorBoard lacks become text."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)


def _strip(images: NDArray[np.uint8]) -> Summary.Image:
    """Images side by side as one PNG."""
    _, height, width, _ = images.shape
    factor = max(1, SMALLEST // max(height, width))
    row = np.concatenate(list(images.repeat(factor, axis=1).repeat(factor, axis=2)), axis=1)
    content = io.BytesIO()
    Image.fromarray(row).save(content, "PNG")
    return Summary.Image(height=row.shape[0], width=row.shape[1], colorspace=3, encoded_image_string=content.getvalue())
