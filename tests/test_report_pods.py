"""The table and the plain values of a compiled step, of one that is made up."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import Mesh

from scaling_jax import cli
from scaling_jax.config import default_config
from scaling_jax.pods import compile as compile_module
from scaling_jax.pods.chips import parse_topology
from scaling_jax.pods.collectives import Collective
from scaling_jax.pods.compile import CompiledStep, Memory
from scaling_jax.pods.roofline import Roofline
from scaling_jax.pods.traffic import Least
from scaling_jax.report.pods import pod_json, pod_table

DAY = 86400


def sent(kind, axes, wire_bytes, count=1, dcn=False):
    return Collective(kind, tuple(axes.split("+")), 4, count, wire_bytes, "op", (), "bf16", dcn, "name")


def a_step(**changes) -> CompiledStep:
    """8 chips, 2^20 tokens in 2 s, 10 days of them."""
    config = default_config()
    config.model.update(width=512, depth=4, head_dim=64, context=1024, vocab_size=32_000, remat="full")
    config.mesh.update(replica=2, fsdp=4)
    config.train.batch_tokens, config.train.tokens = 1 << 20, (1 << 20) * 10 * DAY // 2
    topology = parse_topology("v5e:2x4")
    return dataclasses.replace(
        CompiledStep(
            config=config,
            total_params=45_350_912,
            topology=topology,
            mesh=Mesh(np.array([SimpleDevice(i) for i in range(8)], object).reshape(2, 4, 1, 1), ("replica", "fsdp", "tensor", "member")),
            measured=True,
            compile_s=41.6,
            memory=Memory(
                arguments=4_000_000_000, outputs=1, temporaries=8_000_000_000, code=50_000_000, peak=11_950_000_000, capacity=16_000_000_000
            ),
            product_flops=1_004_000_000_000,
            traced_flops=1e12,
            kernel_flops=2.5e11,
            collectives=[
                sent("all-gather", "fsdp", 3e9, 8),
                sent("all-gather", "fsdp", 1e9, 2),
                sent("all-reduce", "replica", 2e9),
                sent("all-reduce", "replica+fsdp", 1e5),
            ],
            least=Least(3e9, 1.2e9, 0.8e9, 0, 0),
            roofline=Roofline(2.0, 0.25, 0.0125, 0.0, {}, 0.416),
        ),
        **changes,
    )


class SimpleDevice(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, i):
        super().__init__(id=i, platform="tpu")


def rows_of(text: str) -> dict[str, str]:
    """By name; what follows under no name belongs to the one before."""
    rows, name = {}, ""
    for line in text.splitlines():
        name = line[:16].strip() or name
        rows[name] = (rows.get(name, "") + " " + " ".join(line[16:].split())).strip()
    return rows


def test_every_row():
    rows = rows_of(pod_table(a_step()))
    assert rows == {
        "topology": "v5e:2x4, 8 chips on 1 hosts, 8 devices",
        "mesh": "replica 2 x fsdp 4 x tensor 1",
        "model": "N 12.6M, 45.4M parameters in all",
        "step": "1,048,576 tokens, 128 sequences of 1,024 for each of replica x fsdp remat full, accumulation 1, noise measured",
        "compiled in": "42 s",
        "memory": "12 GB at the peak of 16 GB a chip, 75%: fits arguments 4 GB, temporaries 8 GB, code 50 MB",
        "FLOPs a device": "1.0040e+12 in products (1.0040 of the traced program's share), 2.500e+11 in attention kernels (by arithmetic)",
        "collectives": (
            "all-gather fsdp 10 x 4 GB all-reduce replica 1 x 2 GB "
            "in all 6 GB sent by a device, 1.20 of the mesh's least; 1 kinds below a thousandth of it not listed"
        ),
        "least times": "compute 2 s, memory 250 ms, interconnect 12.5 ms, data-centre network 0 ms; compute bounds",
        "utilisation": "at most 42% of v5e's 197 TFLOP/s, in the model's FLOPs (attention counted causally)",
        "speed": "at most 524k tokens/s",
        "the run": "453B tokens: at least 10.0 days, 1,920 chip-hours",
        "rates from": "Cloud TPU page 'TPU v5e'; interconnect 400 GB/s both ways; network 6.4 Tbit/s for 256 chips",
    }


def test_what_does_not_fit_and_faults_are_told():
    memory = dataclasses.replace(a_step().memory, peak=16_000_000_001 - 50_000_000)
    wide = [sent("all-gather", "replica+fsdp", 2e9)]
    rows = rows_of(pod_table(a_step(memory=memory, collectives=wide, least=Least(4e9, 0, 0, 0, 0))))
    assert "100%: DOES NOT FIT" in rows["memory"]
    assert rows["fault"].startswith("wider than one axis: all-gather over replica+fsdp, 1 times, 2 GB, bf16")


def test_a_batch_that_grows_is_not_all_compiled():
    step = a_step()
    step.config.batch.schedule, step.config.batch.stages = "stages", ("2097152=4194304",)
    assert "this is its first batch; one of 4,194,304 tokens takes 4 microbatches" in rows_of(pod_table(step))["step"]


@pytest.mark.parametrize(("peak", "code"), [(15_000_000_000, 0), (16_000_000_001, 1)])
def test_exit_code_says_whether_it_fits(monkeypatch, tmp_path, capsys, peak, code):
    step = a_step(memory=dataclasses.replace(a_step().memory, peak=peak - 50_000_000))
    monkeypatch.setattr(compile_module, "prepare", lambda: None)
    monkeypatch.setattr(compile_module, "compile_step", lambda config, topology: step)
    config, out = Path(__file__).parents[1] / "configs" / "cpu_demo.py", tmp_path / "out.json"
    assert cli.main(["compile", f"--config={config}", "--topology=v5e:2x4", f"--json={out}"]) == code
    assert json.loads(out.read_text())["fits"] is (code == 0)


def test_slices_and_halves_of_a_chip():
    topology = parse_topology("tpu7x:2x2x1", slices=2)
    between = [sent("all-reduce", "replica", 1.0, dcn=True), sent("all-gather", "fsdp", 4e9)]
    rows = rows_of(pod_table(a_step(topology=topology, collectives=between)))
    assert rows["topology"].startswith("2 slices of tpu7x:2x2x1, 8 chips on 2 hosts, 8 devices")
    assert "a device, two to a chip" in rows["memory"]
    assert "all-reduce replica, between slices 1 x 1 B" in rows["collectives"]  # few bytes, but over the network


@pytest.mark.parametrize("steps, words", [(3 * DAY / 2, "3.0 days"), (3600, "2.0 hours"), (45, "1.5 minutes")])
def test_lengths_of_a_run(steps, words):
    step = a_step()
    step.config.train.tokens = int(steps) * step.config.train.batch_tokens
    assert f"at least {words}, " in rows_of(pod_table(step))["the run"]


def test_plain_values():
    values = json.loads(json.dumps(pod_json(a_step())))
    assert values["memory"] == {
        "arguments": 4_000_000_000, "outputs": 1, "temporaries": 8_000_000_000, "code": 50_000_000, "peak": 11_950_000_000,
        "capacity": 16_000_000_000,
    }  # fmt: skip
    assert values["memory_share"] == 0.75
    assert values["least_bytes"] == {"weights": 3e9, "gradients": 1.2e9, "replicas": 0.8e9, "tensor": 0, "embedding": 0, "total": 5e9}
    assert values["times_s"] == {"compute": 2.0, "memory": 0.25, "interconnect": 0.0125, "network": 0.0}
    assert values["collectives"][0] == {"kind": "all-gather", "axes": ["fsdp"], "dcn": False, "count": 10, "wire_bytes": 4e9}
    assert (values["days_bound"], values["chip_hours_bound"], values["bound"]) == (10, 1920, "compute")
    assert values["mesh"] == {"replica": 2, "fsdp": 4, "tensor": 1} and values["wire_bytes"] == 6e9 + 1e5 and values["faults"] == []
