"""What a process is told before it computes."""

import ctypes
import glob
import importlib.util
import os
from pathlib import Path


def has_accelerator() -> bool:
    """Whether the machine has one, by its device files; JAX is not started."""
    return any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*"))


def leave_out_absent_tpu() -> None:
    """Before JAX starts: where libtpu is installed and there is no TPU, as on a machine that only compiles for one, JAX would look for it
    for seconds and complain."""
    if not has_accelerator() and importlib.util.find_spec("libtpu") is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def keep_freed_memory() -> None:
    """Before JAX has devices: freed memory is kept, in large pages.

    XLA's CPU backend frees a step's temporaries when it ends. What a thread of its own frees glibc gives back to the kernel, which then
    maps it anew page by page: 60,000 faults a step of a small model, up to a third of its time. So programs run in the thread that calls
    them, where glibc can be told to keep what is freed.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        libc = ctypes.CDLL(None)
        mallopt, madvise = libc.mallopt, libc.madvise
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 28)
    # The heap's next gigabyte in pages of 2 MB: addresses only, what is not touched takes no memory.
    size, page, huge_pages = (1 << 30) - (1 << 22), 1 << 21, 14  # MADV_HUGEPAGE of mman.h
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if start := libc.malloc(size):
        madvise(-(-start // page) * page, size - page, huge_pages)
        libc.free(start)


def compute_on_cpu() -> None:
    """Before JAX starts: for work in double precision, which leaves a TPU or GPU to whoever is training on it."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, so that a second start is quick."""
    import hashlib
    import platform

    import jax

    # CPU programs are compiled for the very processor; another machine with the same home directory gets its own.
    cpu = platform.machine() + platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        cpu += next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaling_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(root / hashlib.sha256(cpu.encode()).hexdigest()[:12]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
