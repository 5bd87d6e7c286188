"""What makes a CPU faster: huge pages for the arrays of a process, and a layout that fits the processor.

Linux may give huge pages only to those who ask. On a CPU, XLA takes fresh memory for every program it runs.
With pages of 4 KiB, a step of 124M parameters has half a million page faults, and the weights of a matrix
product miss the TLB. With pages of 2 MiB it takes three quarters of the time (`benchmarks/README.md`). This
is the one file that looks at the machine.
"""

import ctypes
import functools
import os
import sys
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE = 14
# Parameters of glibc's mallopt, and the values that keep all large arrays in one heap, which never shrinks.
_ONE_HEAP = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
_PAGE = 2**21


@functools.cache
def use_huge_pages(share: float = 0.75) -> bool:
    """Makes malloc serve from a heap that the kernel may back with huge pages.

    Call it before any array exists. The heap is address space. Memory is used when it is written to, and it
    is kept from then on. Beyond the share, pages are small again. GRPO_JAX_HUGE_PAGES=0 leaves malloc alone.

    Args:
        share: part of the machine's memory that the heap may take, in (0, 1].

    Returns:
        True if malloc does so now. That is on Linux with glibc alone, and only where the kernel gives huge
        pages to those who ask (`madvise`), not where it gives them to all (`always`) or to none (`never`).
    """
    if sys.platform != "linux" or os.environ.get("GRPO_JAX_HUGE_PAGES") == "0":
        return False
    if not _SETTING.exists() or "[madvise]" not in _SETTING.read_text():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mallopt"):
        return False
    size = int(share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for parameter, value in _ONE_HEAP.values():
        libc.mallopt(parameter, value)
    block = libc.malloc(size)
    if not block:
        return False
    start = -(-block // _PAGE) * _PAGE
    failed = libc.madvise(start, size - (start - block), _MADV_HUGEPAGE)
    libc.free(block)  # the heap keeps the addresses, since it does not shrink
    return not failed


@functools.cache
def cpu_vendor() -> str:
    """Returns the name that the processor gives its maker, such as `AuthenticAMD`, or "" if it is unknown.

    A layout may follow from the kind of machine, but never from a measurement: a resumed run must choose the
    same one.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    vendors = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return vendors[0] if vendors else ""
