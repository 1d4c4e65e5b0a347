"""These tests need 8 devices, which have to be asked for before JAX starts; tests/test_multidevice.py does so, in one process.

XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/multidevice
"""

import jax

DEVICES = 8

if jax.device_count() < DEVICES:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    """Shown where this directory is asked for by name."""
    if jax.device_count() < DEVICES:
        return (
            f"tests/multidevice: left out, since there are {jax.device_count()} devices and not {DEVICES}: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES} pytest tests/multidevice"
        )
    return None
