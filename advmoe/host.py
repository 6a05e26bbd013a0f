"""Process settings that make training on a CPU faster. The command line applies them; a library must not.

A program that trains with this library calls `prepare_process()` once, before its first
convolution. The environment variables named below take precedence.
"""

from __future__ import annotations

import ctypes
import os

PRIMITIVES = 8192
"""Number of convolutions that oneDNN caches. Each size of a sub-batch is one, so its default of 1024 fills up soon."""
KEPT = 2**30
"""Freed bytes that the process keeps for later tensors. Returned memory costs a page fault per 4 KiB."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, <malloc.h>
_OLD_LIMIT = 2**25  # older versions of glibc accept no larger threshold for mmap


def compute_deterministically() -> None:
    """Make a GPU compute the same bits in every run, at some cost in speed. A CPU does so by default.

    Raises:
        RuntimeError: Later, if an operation of the network has no deterministic form.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def prepare_process() -> None:
    """Make oneDNN cache more convolutions (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`) and glibc keep freed memory.

    glibc is not changed if `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_` or `GLIBC_TUNABLES`
    is set. Systems without glibc are not changed either.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and mallopt(_TRIM_THRESHOLD, KEPT):
        _ = mallopt(_MMAP_THRESHOLD, KEPT) or mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)
