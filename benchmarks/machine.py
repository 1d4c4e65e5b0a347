"""What a figure of speed was measured on; the process that measures, prepared as the command line's is; numpy's peak beside it."""

import importlib.util
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_UNITS = {"amx_bf16": "AMX bfloat16", "avx512_bf16": "AVX-512 bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}  # of /proc/cpuinfo
_PREPARATIONS = ("leave_out_absent_tpu", "keep_freed_memory", "prepare_cpu")  # of scaling_jax.process; an older checkout may lack some
_PACKAGES = ("jax", "numpy", "torch", "transformers")


def prepare_process() -> None:
    """What `scaling-jax train` does before JAX starts; to be called before JAX is imported."""
    from scaling_jax import process

    for name in _PREPARATIONS:
        if hasattr(process, name):
            getattr(process, name)()


def describe_machine() -> dict[str, Any]:
    """CPU, cores this process may use, memory in GB, units for vectors and matrices, operating system, versions."""
    cpu, flags = platform.processor() or platform.machine(), set()
    if os.path.exists("/proc/cpuinfo"):
        fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        fields = {name.strip(): value.strip() for name, _, value in reversed(fields)}  # of the first core
        cpu, flags = fields.get("model name", cpu), set(fields.get("flags", "").split())
    return {
        "cpu": cpu,
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "units": [name for flag, name in _UNITS.items() if flag in flags],
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The description in one line."""
    units = f" ({', '.join(machine['units'])})" if machine["units"] else ""
    versions = "".join(f", {name} {version}" for name, version in machine["packages"].items())
    where = f"{machine['cpu']}{units}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['os']}"
    return f"{where}; Python {machine['python']}{versions}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# OpenBLAS's threads wait for more work by spinning for some 100 ms after a product, on the cores of whatever is timed next: told not to.
# It is read when numpy is imported, so that it is part of a process's environment.
QUIET_BLAS = {"OPENBLAS_THREAD_TIMEOUT": "4"}


class Peak:
    """The float32 matrix-multiply peak: products of 1024 x 1024 matrices by numpy's BLAS, on all its threads.

    It moves with the machine's clock and its neighbours, so it is to be measured again beside everything that is held against it.
    """

    SIZE = 1024

    def __init__(self):
        import numpy as np

        rng = np.random.default_rng(0)
        self._a, self._b = (rng.standard_normal((self.SIZE, self.SIZE), np.float32) for _ in range(2))
        self._product, self._matmul = np.empty_like(self._a), np.matmul
        self.flops_per_s()  # starts the threads

    def flops_per_s(self, products: int = 5) -> float:
        """Of the fastest of so many products, each timed by itself: threads that slept lose time at the first."""
        seconds = []
        for _ in range(products):
            started = time.perf_counter()
            self._matmul(self._a, self._b, out=self._product)
            seconds.append(time.perf_counter() - started)
        return 2 * self.SIZE**3 / min(seconds)
