"""Least times of a step, by hand, from the published figures of a chip."""

import pytest

from scaling_jax.model.shape import TransformerConfig
from scaling_jax.pods.chips import parse_topology
from scaling_jax.pods.collectives import Collective
from scaling_jax.pods.roofline import least_hbm_bytes, roofline

V5P = parse_topology("v5p:4x4x4", slices=2)  # 128 chips: 459 TFLOP/s, 2765 GB/s, 6 links of 100 GB/s, 200 Gbit/s for 4 chips


def sends(wire_bytes: float, *axes: str, dcn: bool = False) -> Collective:
    return Collective("all-gather", axes, 4, 1, wire_bytes, "", (), "bf16", dcn, "g")


SECOND = {"flops": 459e12, "hbm_bytes": 2765e9, "collectives": [sends(600e9, "fsdp"), sends(200e9 / 8 / 4, "replica", dcn=True)]}


def test_work_at_the_published_rates_takes_a_second():
    found = roofline(V5P, 128, **SECOND, model_flops=1.0)
    assert found[:4] == pytest.approx((1, 1, 1, 1), rel=1e-12)


@pytest.mark.parametrize("bound", ["compute", "memory", "interconnect", "network"])
def test_the_longest_is_the_bound(bound):
    work = {
        "flops": 459e12 * (3 if bound == "compute" else 1),
        "hbm_bytes": 2765e9 * (3 if bound == "memory" else 1),
        "collectives": [
            sends(600e9 * (3 if bound == "interconnect" else 1), "fsdp"),
            sends(6.25e9 * (3 if bound == "network" else 1), "replica", dcn=True),
        ],
    }
    found = roofline(V5P, 128, **work, model_flops=459e12 * 128)
    assert found.bound == bound
    assert (found.step_s, found.mfu) == pytest.approx((3, 1 / 3), rel=1e-12)


def test_interconnect_by_axes():
    work = [sends(120e9, "fsdp"), sends(60e9, "fsdp", "tensor"), sends(30e9, "fsdp"), sends(5e9, "replica", dcn=True), sends(0)]
    found = roofline(V5P, 128, 1.0, 1.0, work, 1.0)
    assert found.interconnect_s_by_axes == pytest.approx({("fsdp",): 0.25, ("fsdp", "tensor"): 0.1}, rel=1e-12)
    assert found.interconnect_s == pytest.approx(0.35, rel=1e-12)
    assert found.network_s == pytest.approx(0.8, rel=1e-12)


def test_two_devices_of_a_chip_share_it():
    ironwood = parse_topology("tpu7x:4x4x4")
    half = roofline(ironwood, 128, 1e12, 1e9, [sends(1e9, "fsdp"), sends(1e9, "replica", dcn=True)], 1e15)
    whole = roofline(ironwood, 64, 2e12, 2e9, [sends(2e9, "fsdp"), sends(2e9, "replica", dcn=True)], 1e15)
    assert half == whole
    for devices in (0, 32, 96):
        with pytest.raises(ValueError, match=f"{devices} devices .* 64 chips of tpu7x:4x4x4"):
            roofline(ironwood, devices, 1.0, 1.0, [], 1.0)


def test_utilisation_of_a_transformer_with_full_remat():
    """A forward pass computed twice is 8 FLOPs where the model needs 6: three quarters, without attention."""
    model = TransformerConfig(vocab_size=256, width=4096, depth=32, head_dim=128, context=1)
    tokens, attention = 2**20, 12 * model.depth * model.context * model.width
    flops = 8 * model.params * tokens / 128
    found = roofline(V5P, 128, flops, 0.0, [], (model.flops_per_token - attention) * tokens)
    assert (found.bound, found.mfu) == ("compute", pytest.approx(6 / 8, rel=1e-12))


def test_least_hbm_bytes():
    assert least_hbm_bytes(argument_bytes=5, output_bytes=3, temp_bytes=7) == 5 + 3 + 7 + 7
