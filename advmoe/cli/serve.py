"""`advmoe serve`."""

from __future__ import annotations

import typer

from advmoe.cli.exporter import export_errors, exporter


def serve(context: typer.Context) -> None:
    """Serve an exported model over HTTP: Open Inference Protocol, a page to try it, Prometheus metrics.

    The options are those of the command `advmoe-serve`: see `advmoe serve --help`.
    """
    exporter()
    from advmoe_export.serve.command import run

    with export_errors():
        run(context.args, program="advmoe serve")
