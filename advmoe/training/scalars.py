"""Writes figures for TensorBoard immediately, so that a full disk is an error of the write that meets it.

TensorBoard's own writer passes events to a thread. An error in that thread is a traceback that no
caller can catch.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class ScalarLog:
    """An event file in a folder, created with the first record.

    Args:
        folder: Folder that TensorBoard reads.
        first_step: First step of the file. Records of other files from this step on are void,
            because the run went back.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._first_step = first_step
        self._started = False
        # TensorBoard reads files in the order of their names, so later files need later names, in microseconds
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append a record's numbers. Numbers in a list get their position as part of their name."""
        scalars: dict[str, float] = {}
        for name, value in figures.items():
            if isinstance(value, int | float):
                scalars[name] = value
            elif isinstance(value, list):
                scalars |= {f"{name}/{index}": element for index, element in enumerate(value)}
        events = [
            Event(
                step=step,
                summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]),
            )
        ]
        if not self._started:
            start = SessionLog(status=SessionLog.START)
            events = [Event(file_version="brain.Event:2"), Event(step=self._first_step, session_log=start), *events]
        with self._path.open("ab") as file:
            writer = RecordWriter(file)
            for event in events:
                event.wall_time = time.time()
                writer.write(event.SerializeToString())
        self._started = True
