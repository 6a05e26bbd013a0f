"""Helpers that start a real server for tests and send requests to it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx


@contextlib.contextmanager
def server(model: Path, *options: str, before: str = "") -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server process on a free port, and a client for it. `before` is Python code that the process runs first."""
    program = f"{before}\nimport sys\nfrom advmoe_export.serve.command import main\nsys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(model), "--port", "0", "--threads", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("serving "), line + process.stderr.read()
        with httpx.Client(base_url=line.split()[-1], timeout=30, trust_env=False) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
