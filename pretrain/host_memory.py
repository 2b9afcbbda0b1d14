"""Keep memory that a step has freed for the next step, on ranks that compute on the CPU.

A step allocates and frees the same activations and gradients as the one before. glibc gives large blocks back to the
system at once, and the next step gets them page by page, each fault some microseconds on a virtual machine: 16 MB of
fresh output cost a grouped product a fifth of its time. Blocks up to :data:`REUSED_BYTES` now stay with the process,
and so does up to :data:`KEPT_BYTES` at the end of its heap; larger ones come and go as before.

What lies free between blocks in use stays as well, and on a machine that the run nearly fills that is what is missing:
:func:`give_back_when_short` returns it then.
"""

from __future__ import annotations

import ctypes

import psutil

REUSED_BYTES = 2**28
KEPT_BYTES = 2**30
SHORT_SHARE = 0.2  # of the machine's memory
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed_memory() -> bool:
    """Set it for this process; False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, REUSED_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def give_back_when_short(short_share: float = SHORT_SHARE) -> bool:
    """Return what this process has freed to the system when less than ``short_share`` of its memory is available.

    Whether anything was returned; where the C library is not glibc nothing is.
    """
    memory = psutil.virtual_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and memory.available < short_share * memory.total and bool(trim(0))
