"""What a process is told before it computes, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

# Programs with temporaries of 16 MB each; the products keep XLA from fusing them into one.
FAULTS = """
import resource, sys
from scaling_jax import process
if sys.argv[1] == "keep":
    process.keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def f(x, w):
    for _ in range(8):
        x = jnp.sin(x @ w)
    return x.sum()

x, w = jnp.ones((65536, 64)), jnp.ones((64, 64)) / 64
for _ in range(5):
    f(x, w).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    f(x, w).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10, jax.config.values["jax_cpu_enable_async_dispatch"])
"""


def run(script: str, *args: str, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"} | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to keep")
def test_a_program_gets_its_memory_from_the_kernel_once():
    faults, asynchronous = run(FAULTS, "keep")
    assert float(faults) < 100 and asynchronous == "False"
    faults, asynchronous = run(FAULTS, "not")
    assert float(faults) > 1000 and asynchronous == "True"


def test_memory_that_is_kept_is_no_memory_that_is_used():
    """The heap's gigabyte is addresses only."""
    script = """
import resource
from scaling_jax.process import keep_freed_memory
import jax
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
keep_freed_memory()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(run(script)[0]) < 64


def test_where_there_is_no_glibc_programs_run_all_the_same():
    script = """
import ctypes
from scaling_jax import process

class NotGlibc:
    def __init__(self, name):
        pass

ctypes.CDLL = NotGlibc
process.keep_freed_memory()
import jax
print(float(jax.jit(lambda x: x + 1)(1.0)), jax.config.values["jax_cpu_enable_async_dispatch"])
"""
    assert run(script) == ["2.0", "False"]
