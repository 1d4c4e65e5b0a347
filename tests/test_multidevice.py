"""Runs tests/multidevice in a process of its own, with 8 devices made of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parent / "multidevice"


@pytest.mark.skipif(jax.device_count() >= 8, reason="here are 8 devices: tests/multidevice is collected as it is")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which: str):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # 8 devices may share one core with other work: a device that waits long for its neighbours is not stuck.
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "-m", which, str(FOLDER)]
    result = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=FOLDER.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-20_000:]}"
