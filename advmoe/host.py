"""Settings of the process that make training on a CPU faster. The command line makes them; a library must not.

A program that trains with this library calls `prepare_process()` once, before its first convolution. Whoever has set
the variables named below in the environment keeps their own choice.
"""

from __future__ import annotations

import ctypes
import os

PRIMITIVES = 8192
"""Convolutions oneDNN remembers. Every size of sub-batch is one of its own, and its default of 1024 is soon full."""
KEPT = 2**30
"""Freed bytes that are kept for the next tensor. Memory that was returned costs a page fault per 4 KiB."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, <malloc.h>
_OLD_LIMIT = 2**25  # older versions of glibc accept no larger threshold for mmap


def compute_deterministically() -> None:
    """Let a GPU give the same bits in every run, for some of its speed; a CPU does without being asked.

    Raises:
        RuntimeError: later, if an operation of the network has no deterministic form.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def prepare_process() -> None:
    """Let oneDNN remember more convolutions (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`) and glibc keep freed memory.

    The latter is left alone if `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_` or `GLIBC_TUNABLES` is set, and on
    systems without glibc.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and mallopt(_TRIM_THRESHOLD, KEPT):
        _ = mallopt(_MMAP_THRESHOLD, KEPT) or mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)
