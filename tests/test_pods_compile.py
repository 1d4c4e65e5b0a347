"""Steps of small models compiled for real topologies: what is read from them, against what can be counted by hand.

Skipped, saying so, where libtpu is not installed (pip install -e '.[tpu]'); no TPU is needed.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from functools import cache

import jax
import pytest

from scaling_jax import cli
from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.pods import compile as compile_lib
from scaling_jax.pods.chips import parse_topology
from scaling_jax.pods.collectives import summary
from scaling_jax.pods.compile import CompiledStep, DoesNotFit, Memory, attention_flops, compile_step, human_bytes, prepare
from scaling_jax.pods.faults import grown
from scaling_jax.train.step import Trainer

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, XLA's compiler for TPUs, is not installed")
SEQUENCES = 16


def small(**fields):
    """Width 256, depth 4, 2 heads of 128, SwiGLU, bfloat16."""
    config = default_config()
    config.model.update(
        width=256, depth=4, head_dim=128, context=256, vocab_size=2048, mlp="swiglu", compute_dtype="bfloat16", remat="full"
    )
    config.parametrization.base_width = config.parametrization.base_head_dim = 128
    config.train.batch_tokens, config.train.tokens = SEQUENCES * 256, 100 * SEQUENCES * 256
    for name, value in fields.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


@cache
def compiled(topology: str, slices: int = 1, measure: bool = True, **fields) -> CompiledStep:
    prepare()
    return compile_step(small(**fields), parse_topology(topology, slices), measure)


TENSOR, REPLICA = {"mesh__fsdp": 2, "mesh__tensor": 2}, {"mesh__replica": 2, "mesh__fsdp": 2}
STEPS = [("v5e:2x2", TENSOR), ("v5p:2x2x1", REPLICA)]


def params_of(config) -> dict[tuple[str, ...], int]:
    from flax import nnx

    return {path: param.size for path, param in nnx.to_flat_state(Trainer(config).abstract_state.params)}


@needs_libtpu
@pytest.mark.parametrize("topology, mesh", STEPS)
def test_memory_of_the_state(topology, mesh):
    """Every matrix is divided by fsdp, and by tensor where there is one; three float32 numbers a parameter; and the tokens."""
    step = compiled(topology, **mesh)
    divided = mesh["mesh__fsdp"] * mesh.get("mesh__tensor", 1)
    tokens = SEQUENCES // (step.mesh.shape["replica"] * step.mesh.shape["fsdp"]) * 257 * 4
    total = sum(params_of(step.config).values())
    assert step.total_params == total
    state = 12 * total / divided
    assert state + tokens <= step.memory.arguments < 1.01 * state + 3 * tokens  # padding, and the noise scale's few numbers
    memory = step.memory
    assert memory.arguments < memory.peak < 1.1 * (memory.arguments + memory.outputs + memory.temporaries + memory.code)
    assert memory.peak / memory.capacity < memory.share < 1
    assert step.memory.capacity == parse_topology(topology).chip.compiler_hbm_bytes


@needs_libtpu
@pytest.mark.parametrize("topology, mesh", STEPS)
def test_products_are_those_of_the_traced_program_and_of_the_model(topology, mesh):
    step = compiled(topology, **mesh)
    assert step.product_flops == pytest.approx(step.traced_flops, rel=0.01)
    # Forwards 2, backwards 4, and 2 again but for a block's last product, which nobody reads again.
    block, last, readout = 2 * 256 * 256 * 2 + 3 * 256 * 1024, 256 * 1024, 256 * 2048
    by_hand = (4 * (8 * block - 2 * last) + 6 * readout + 2 * 256 * 256) * SEQUENCES * 256 / 4
    assert step.product_flops == pytest.approx(by_hand, rel=0.02)


@needs_libtpu
@pytest.mark.parametrize("topology, mesh", STEPS)
def test_traffic_is_near_the_least_and_there_are_no_faults(topology, mesh):
    step = compiled(topology, **mesh)
    assert 0.9 < step.wire_bytes / step.least.total < 1.3
    assert step.faults == []


@needs_libtpu
@pytest.mark.parametrize("topology, mesh", STEPS)
def test_attention_is_a_kernel_and_is_counted_by_hand(topology, mesh):
    """Forwards and again backwards 2 products of [L, L] each, 4 and 3 for the gradients; L is one block, of which all is multiplied."""
    step = compiled(topology, **mesh)
    products = 2 + 2 + 4 + 3
    assert step.kernel_flops == 4 * products * 2 * 256 * 256 * 128 * 2 * SEQUENCES / 4
    assert step.roofline.compute_s == pytest.approx((step.product_flops + step.kernel_flops) / step.topology.chip.flops_bf16, rel=1e-12)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology, mesh", STEPS)
def test_measuring_the_noise_costs_little(topology, mesh):
    """Of more and wider blocks than elsewhere here, as what it adds is as large as one matrix and the activations of one block."""
    large = mesh | {"model__width": 512, "model__depth": 16}
    plain, measured = (compiled(topology, measure=measure, **large) for measure in (False, True))
    assert 0 < measured.product_flops / plain.product_flops - 1 < 0.03
    assert measured.memory.peak / plain.memory.peak < 1.1
    assert measured.wire_bytes / plain.wire_bytes < 1.02


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology, mesh", STEPS)
def test_with_the_batch_only_activations_grow(topology, mesh):
    once, twice = compiled(topology, **mesh), compiled(topology, **mesh, train__batch_tokens=2 * SEQUENCES * 256)
    more = grown(once.collectives, twice.collectives)
    assert {(row.kind, row.axes) for row in more if row.axes != ("tensor",)} == {("all-to-all", ("fsdp",))}
    assert any(row.axes == ("tensor",) for row in more) == ("mesh__tensor" in mesh)
    for row in more:
        assert row.wire_bytes == pytest.approx(twice.least.embedding / 2 if row.axes == ("fsdp",) else row.wire_bytes, rel=0.01)
    assert grown(twice.collectives, twice.collectives) == []


@needs_libtpu
@pytest.mark.slow
def test_slices_lie_along_replica_and_exchange_gradients_over_the_network():
    step = compiled("v5p:2x2x1", 2, **{"mesh__replica": 2, "mesh__fsdp": 4})
    between = [row for row in summary(step.collectives) if row.dcn]
    assert {row.axes for row in between} == {("replica",)}
    assert sum(row.wire_bytes for row in between) == pytest.approx(step.least.replicas, rel=0.15)
    assert step.roofline.network_s > 0 and step.devices == 8


@needs_libtpu
def test_what_does_not_fit_is_said_in_one_line(config_file, capsys, tmp_path):
    """128 sequences of 256 tokens on each of 4 chips, with logits for a vocabulary of 2^19: 68 GB of 16."""
    large = "--config.train.batch_tokens=131072", "--config.model.vocab_size=524288", "--config.mesh.fsdp=4"
    prepare()
    with pytest.raises(DoesNotFit, match=r"^(Used|HLO temporaries)[^\n]*15\.75G"):
        compile_step(small(train__batch_tokens=131072, model__vocab_size=524288, mesh__fsdp=4), parse_topology("v5e:2x2"))
    out = tmp_path / "out.json"
    assert cli.main(["compile", f"--config={config_file}", "--topology=v5e:2x2", *large, f"--json={out}"]) == 1
    said = capsys.readouterr()
    assert "does not fit: " in said.err and "--find searches" in said.err and "Traceback" not in said.err
    assert said.out == "" and json.loads(out.read_text())["fits"] is False


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "from scaling_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    for name, value in {small().model.to_dict()!r}.items():\n"
        "        config.model[name] = value\n"
        "    config.parametrization.base_width = config.parametrization.base_head_dim = 128\n"
        f"    config.train.batch_tokens, config.train.tokens = {SEQUENCES * 256}, {100 * SEQUENCES * 256}\n"
        "    config.mesh.fsdp = -1\n"
        "    return config\n"
    )
    return path


BAD_INPUT = {
    "--topology is missing": [],
    "topology is 'v9:2x2': must be a chip and a shape, such as v5p:4x4x4; chips are v4, v5e": ["--topology=v9:2x2"],
    "topology is 'v5e:3x3': v5e has 1x1, 2x2, 2x4, 4x4": ["--topology=v5e:3x3"],
    "slices is 0: must be at least 1": ["--topology=v5e:2x2", "--slices=0"],
    "--find_compiled=0: must be at least 1": ["--topology=v5e:2x2", "--find", "--find_compiled=0"],
    "no such directory": ["--topology=v5e:2x2", "--json=/nowhere/out.json"],
    "is a directory; must be a file": ["--topology=v5e:2x2", "--json=/tmp"],
}


@pytest.mark.parametrize("message, flags", BAD_INPUT.items())
def test_bad_flags(message, flags, config_file, capsys):
    assert cli.main(["compile", f"--config={config_file}", *flags]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


BAD_MESH = {
    "config.mesh is replica 1 x fsdp 2 x tensor 1 x member 1 = 2 devices: must equal the 4": ["--config.mesh.fsdp=2"],
    "config.mesh.tensor is 4: must divide the heads (2, width / head_dim)": ["--config.mesh.tensor=4", "--config.mesh.fsdp=1"],
    "config.train.batch_tokens is 512: must be a multiple of 1024 (context 256 x replica·fsdp 4": ["--config.train.batch_tokens=512"],
    "config.mesh.replica is 1: must be a multiple of the slices, --slices=2": ["--slices=2"],
}


@needs_libtpu
@pytest.mark.parametrize("message, flags", BAD_MESH.items())
def test_a_config_that_is_not_for_the_topology(message, flags, config_file, capsys):
    assert cli.main(["compile", f"--config={config_file}", "--topology=v5e:2x2", *flags]) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and said.out == ""


def test_without_libtpu_it_is_said_what_to_install(monkeypatch, config_file, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest))
    monkeypatch.setattr(compile_lib, "topology_devices", lambda topology: pytest.fail("went on"))
    for more in ([], ["--find"]):
        assert cli.main(["compile", f"--config={config_file}", "--topology=v5e:2x2", *more]) == 2
        assert "pip install 'scaling_jax[tpu]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="libtpu"):
        prepare()


@needs_libtpu
@pytest.mark.slow
def test_the_command(config_file, capfd, tmp_path):
    """All of it, in this process; the devices of the tests' own are as they were."""
    out = tmp_path / "out.json"
    assert cli.main(["compile", f"--config={config_file}", "--topology=v5e:2x2", f"--json={out}"]) == 0
    said, values = capfd.readouterr(), json.loads(out.read_text())
    for row in ("topology ", "memory ", "collectives ", "least times ", "utilisation ", "speed ", "the run ", "rates from "):
        assert f"\n{row}" in "\n" + said.out
    assert "v5e:2x2, 4 chips on 1 hosts" in said.out and "fits" in said.out
    assert values["memory_share"] < 1 and values["faults"] == [] and values["mesh"] == {"replica": 1, "fsdp": 4, "tensor": 1}
    assert "Failed to find host bounds" not in said.err
    assert jax.devices()[0].platform == "cpu" and float(jax.numpy.ones(3).sum()) == 3


@needs_libtpu
@pytest.mark.slow
def test_a_search_heeds_interrupts(config_file):
    """While the compiler runs, which is not Python; what there is of the ranking is printed."""
    command = [sys.executable, "-m", "scaling_jax", "compile", f"--config={config_file}", "--topology=v5e:2x2", "--find"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "layouts" in line:
            break
    time.sleep(4)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - asked < 8
    assert "interrupted" in error and "Traceback" not in error
    assert "microbatches" in out and "none was compiled" in out


def test_attention_flops():
    """Splash cuts the square of the context into blocks of 512, or 256, or 128, and multiplies those on and below the diagonal."""
    for context, share in ((128, 1), (512, 1), (384, 2 / 3), (768, 2 / 3), (2048, 5 / 8)):
        config = small(model__context=context, train__batch_tokens=SEQUENCES * context, mesh__replica=2, train__accumulation=4)
        once = 2 * 2 * context**2 * 128 * share * 2 * SEQUENCES / 2 / 4
        assert attention_flops(config, {"splash_mha_fwd_residuals": 3}) == pytest.approx(3 * once, rel=1e-12)
        assert attention_flops(config, {"dkv": 1, "dq": 2}) == pytest.approx((4 + 2 * 3) / 2 * once, rel=1e-12)
    with pytest.raises(ValueError, match="no rule for the FLOPs of kernel 'paged'"):
        attention_flops(config, {"paged": 1})


def test_share_of_memory_and_its_words():
    assert Memory(arguments=1, outputs=1, temporaries=1, code=5, peak=70, capacity=100).share == 0.75
    assert [human_bytes(n) for n in (0, 999, 1000, 12_340_000_000, 5e16)] == ["0 B", "999 B", "1 kB", "12.3 GB", "5e+04 TB"]
