"""`advmoe bench-onnx`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from advmoe.cli import console
from advmoe.cli.exporter import export_errors, exporter, open_session
from advmoe.cli.options import Json
from advmoe.config import check


def bench_onnx(
    model: Annotated[Path, typer.Argument(help="An exported model (.onnx).")],
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size, may be given several times. Default: 1, 8 and 64.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one operator. Default: onnxruntime's choice.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure each batch size.")] = 2.0,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="onnxruntime provider: cpu, cuda or tensorrt. May be given several times, in order of preference. "
            "Default: cpu."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Time an exported model on synthetic images: latency per batch, images per second."""
    check(0 < seconds < math.inf, f"--seconds must be positive and finite, got {seconds:g}")
    session = open_session(model, provider or ["cpu"], threads=threads)
    fixed = session.metadata.batch_size
    sizes = batch or ([1, 8, 64] if fixed is None else [fixed])
    with console.err.status("timing"), export_errors():
        timings = exporter().time_session(session, sizes, seconds=seconds)
    if json:
        console.emit_json(
            {
                "model": str(model),
                "provider": session.provider,
                "threads": threads,
                "timings": [dataclasses.asdict(t) for t in timings],
            }
        )
        return
    rows = [
        (t.batch, f"{t.median_ms:.2f} ms", f"{t.p95_ms:.2f} ms", f"{t.images_per_second:.0f}", t.runs) for t in timings
    ]
    console.show_table(f"{model}, {session.provider}", ("batch", "median", "95 %", "images / s", "runs"), rows)
