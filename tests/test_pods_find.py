"""The search for a layout: which there are, how they are ranked, what is predicted of them, and when a search ends."""

import dataclasses
import importlib.util
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from scaling_jax import cli
from scaling_jax.config import default_config, validate
from scaling_jax.errors import UserError
from scaling_jax.model import Transformer, TransformerConfig
from scaling_jax.pods import find as find_lib
from scaling_jax.pods.chips import parse_topology
from scaling_jax.pods.compile import DoesNotFit, Memory
from scaling_jax.pods.find import FLAGS, SLACK, Tried, find, layouts
from scaling_jax.pods.flops import jaxpr_dot_flops
from scaling_jax.pods.predict import predicted_bytes, predicted_flops, state_bytes
from scaling_jax.pods.roofline import Roofline
from scaling_jax.report.pods import best_line, find_json, find_table, tried_line
from scaling_jax.train.step import Trainer

SEQUENCES = 32


def a_config(**fields):
    config = default_config()
    config.model.update(width=256, depth=4, head_dim=64, context=128, vocab_size=1024, kv_heads=2, compute_dtype="bfloat16")
    config.parametrization.base_width, config.parametrization.base_head_dim = 128, 64
    config.train.batch_tokens, config.train.tokens = SEQUENCES * 128, 100 * SEQUENCES * 128
    for name, value in fields.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


class Device(SimpleNamespace):
    __hash__ = object.__hash__


def devices_of(topology):
    """As libtpu would give them, for `make_mesh` to lie in order; it arranges only TPUs."""
    places = itertools.product(range(topology.slices), *map(range, (*topology.shape, 1)[:3]), range(topology.chip.devices_per_chip))
    return [Device(slice_index=s, coords=[x, y, z], core_on_chip=c, platform="cpu", id=i) for i, (s, x, y, z, c) in enumerate(places)]


@pytest.fixture(autouse=True)
def _without_libtpu(monkeypatch):
    monkeypatch.setattr(find_lib, "topology_devices", devices_of)

    def plain_mesh(*shape, devices):
        return jax.sharding.Mesh(np.array(devices, object).reshape(shape), ("replica", "fsdp", "tensor", "member"))

    monkeypatch.setattr(find_lib, "make_mesh", plain_mesh)


def found(topology="v5e:2x4", slices=1, **fields):
    return layouts(a_config(**fields), parse_topology(topology, slices))


def test_every_valid_layout_and_no_other():
    """4 heads, 2 of keys and values: tensor is 1 or 2. 32 sequences, of which a microbatch leaves each device one at least."""
    expected = set()
    for replica, fsdp, tensor in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2)):
        if replica * fsdp * tensor == 8:
            accumulations = [1 << k for k in range(6) if (replica * fsdp << k) <= SEQUENCES]
            expected |= {(replica, fsdp, tensor, r, a) for r in ("none", "dots", "attention", "full") for a in accumulations}
    ranked = found()
    assert {tuple(layout.flags.values()) for layout in ranked} == expected and len(ranked) == len(expected)
    for layout in ranked:
        validate(layout.config, 8)
        assert list(layout.flags) == list(FLAGS)
        assert layout.config.train.batch_tokens == SEQUENCES * 128  # the run is the same


def test_slices_lie_along_replica():
    assert {layout.flags["mesh.replica"] for layout in found("v5p:2x2x1", 2)} == {2, 4, 8}
    assert all(layout.roofline.network_s > 0 for layout in found("v5p:2x2x1", 2))


def test_none_at_all_is_said():
    with pytest.raises(
        UserError, match="no mesh of the 8 devices of --topology=v5e:2x4 divides the config: heads 4, width 256.*3 sequences"
    ):
        found(train__batch_tokens=3 * 128, mesh__fsdp=1)


def test_the_ranking():
    ranked = found(model__width=1024, train__batch_tokens=16 * SEQUENCES * 128)
    assert [layout.order for layout in ranked] == sorted(layout.order for layout in ranked)
    best = ranked[0]
    assert best.config.model.remat == "none" and best.config.train.accumulation == 1  # nothing twice, everything fits
    by_remat = {remat: next(layout for layout in ranked if layout.flags["model.remat"] == remat) for remat in ("none", "dots", "full")}
    assert by_remat["none"].roofline.compute_s < by_remat["dots"].roofline.compute_s < by_remat["full"].roofline.compute_s
    assert by_remat["none"].roofline.mfu > by_remat["full"].roofline.mfu


def test_of_equal_bounds_fsdp_along_one_dimension_of_the_torus_is_better(monkeypatch):
    ranked = found("v5p:4x4x4", train__batch_tokens=64 * 128 * 64)
    spans = {layout.flags["mesh.fsdp"]: layout.fsdp_dimensions for layout in ranked if layout.flags["mesh.tensor"] == 1}
    assert spans == {1: 0, 2: 1, 4: 1, 8: 2, 16: 2, 32: 3, 64: 3}
    equal = [layout for layout in ranked if layout.order[0] == ranked[0].order[0]]
    assert [layout.fsdp_dimensions > 1 for layout in equal] == sorted(layout.fsdp_dimensions > 1 for layout in equal)
    # Two whole dimensions: gradients twice. One and a half: not.
    whole, part = (next(x for x in ranked if list(x.flags.values()) == [64 // f, f, 1, "none", 1]) for f in (16, 8))
    once = {f: find_lib.least_traffic(x.config, Trainer(x.config).abstract_state.params) for f, x in ((16, whole), (8, part))}
    assert whole.wire_bytes == once[16].total + once[16].gradients and part.wire_bytes == once[8].total


# predictions


CHUNKED = {"model__mlp": "swiglu", "model__vocab_size": 8192, "model__loss_chunk_tokens": 64, "noise_scale__every": 0}


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
@pytest.mark.parametrize("fields", [{"model__kv_heads": 0}, CHUNKED])
def test_products_are_those_of_the_traced_step(remat, fields):
    """The traced step has two products with [L, L] forwards and four backwards, which on a TPU are a kernel."""
    config = a_config(model__remat=remat, model__attention="einsum", model__width=512, model__compute_dtype="float32", **fields)

    def portable(shape: TransformerConfig, *args: Any, **kwargs: Any) -> Transformer:
        return Transformer(dataclasses.replace(shape, for_cpu=False), *args, **kwargs)  # on CPU causality leaves products out

    traced = jaxpr_dot_flops(Trainer(config, model=portable).trace_step(SEQUENCES, bool(config.noise_scale.every)).jaxpr)
    assert predicted_flops(config) == pytest.approx(traced, rel=0.02)


def test_a_device_has_its_part_of_the_products():
    whole = predicted_flops(a_config(noise_scale__every=0))
    for mesh in (
        {"mesh__fsdp": 4},
        {"mesh__replica": 2, "mesh__tensor": 2},
        {"mesh__tensor": 2, "mesh__fsdp": 2, "train__accumulation": 4},
    ):
        assert predicted_flops(a_config(noise_scale__every=0, **mesh)) == pytest.approx(whole / 4, rel=1e-12)


def test_bytes_of_the_state():
    params = Trainer(a_config()).abstract_state.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert state_bytes(a_config(), params) == state_bytes(a_config(mesh__replica=4), params) == 12 * count
    assert state_bytes(a_config(mesh__fsdp=4, mesh__tensor=2), params) == 12 * count / 8
    gains = Trainer(a_config(model__norm_gains=True)).abstract_state.params
    assert state_bytes(a_config(model__norm_gains=True, mesh__fsdp=4), gains) == 12 * (count / 4 + (2 * 4 + 1) * 256)  # on every device


# Peak bytes of one device as libtpu 0.0.42.1 planned them, of SwiGLU blocks of width 2048, context 2048, vocabulary 32000, 8 deep, with
# 32 sequences on v5e:4x4.
COMPILED = [
    ({"mesh__fsdp": 16, "model__remat": "full"}, 2_140_286_464),
    ({"mesh__fsdp": 16, "model__remat": "full", "noise_scale__every": 0}, 1_686_888_960),
    ({"mesh__fsdp": 16, "model__remat": "attention"}, 2_258_775_552),
    ({"mesh__fsdp": 16, "model__remat": "none"}, 6_992_562_688),
    ({"mesh__fsdp": 4, "mesh__tensor": 4, "model__remat": "full"}, 2_037_275_648),
    ({"mesh__fsdp": 16, "model__remat": "dots"}, 3_503_441_920),
    ({"mesh__replica": 4, "mesh__fsdp": 4, "model__remat": "full"}, 4_213_100_032),
    ({"mesh__fsdp": 16, "model__loss_chunk_tokens": 1024, "model__remat": "full"}, 2_140_320_768),
]


@pytest.mark.parametrize("fields, peak", COMPILED)
def test_bytes_are_near_the_compilers(fields, peak):
    config = a_config(model__depth=8, model__width=2048, model__head_dim=128, model__kv_heads=0, model__context=2048, **fields)
    config.model.mlp, config.model.vocab_size, config.train.batch_tokens = "swiglu", 32_000, 32 * 2048
    params = Trainer(config).abstract_state.params
    assert predicted_bytes(config, params) == pytest.approx(peak, rel=0.2)


def test_logits_are_counted_as_many_as_there_are_at_once():
    """4 bytes and 2 for their cotangent; and of the readout 12 of state, 4 of gradient, 2 as it is gathered, 8 for its sums."""

    def of(vocab, **fields):
        config = a_config(model__vocab_size=vocab, train__batch_tokens=64 * 128, mesh__tensor=2, **fields)
        return predicted_bytes(config, Trainer(config).abstract_state.params)

    more = 1 << 17
    table = (12 + 4) * 256 * more / 2
    whole = of(2 * more) - of(more)
    assert whole == pytest.approx((4 + 2) * 64 * 128 * more / 2 + table + (12 + 4 + 2 + 8) * 256 * more / 2, rel=1e-6)
    assert whole - (of(2 * more, model__loss_chunk_tokens=128) - of(more, model__loss_chunk_tokens=128)) == pytest.approx(
        (4 + 2) * 63 * 128 * more / 2, rel=1e-6
    )


# the search


def a_layout(name: str, seconds: float, share: float, remat: str = "none"):
    config = a_config(model__remat=remat)
    config.logging.wandb = name
    times = Roofline(seconds, 0.0, 0.0, 0.0, {}, 0.5)
    return find_lib.Layout(config, share * 16e9, share, 1e9, times, 1)


def compiler(shares: dict[str, float], asked: list[str]):
    """A compiler to which programs are as large as given, and twice as slow as predicted; 'x' breaks it."""

    def compile(config, topology):
        name = config.logging.wandb
        asked.append(name)
        if name == "x":
            raise jax.errors.JaxRuntimeError("INTERNAL: no such tiling\nand more")
        if shares[name] > 1.5:
            raise DoesNotFit(f"Used {shares[name] * 16:.0f}G of 16G hbm")
        peak = int(shares[name] * 16e9)
        memory = Memory(arguments=1, outputs=1, temporaries=1, code=0, peak=peak, capacity=int(16e9))
        times = Roofline(2 * float(name[1:]), 0.0, 0.0, 0.0, {}, 0.25)
        return SimpleNamespace(memory=memory, roofline=times, wire_bytes=3e9, least=SimpleNamespace(total=2e9), faults=["one"])

    return compile


def search(ranked, shares, wanted):
    asked = []
    tried = list(find(None, None, wanted, ranked, compiler(shares, asked)))
    assert [one.layout.config.logging.wandb for one in tried] == asked
    return tried, asked


def test_the_best_are_compiled_until_enough_fit():
    ranked = [a_layout(f"a{k}", k, 0.5) for k in range(1, 6)]
    tried, asked = search(ranked, {"a1": 0.6, "a2": 1.6, "a3": 0.4, "a4": 0.5}, 2)
    assert asked == ["a1", "a2"] and [one.fits for one in tried] == [True, False]  # a2 does not fit: no smaller one of its remat is left


def test_after_one_that_does_not_fit_only_smaller_ones_of_its_remat_and_others_are_tried():
    ranked = [
        a_layout("a1", 1, 0.9),
        a_layout("a2", 2, 1.0),  # larger
        a_layout("a3", 3, 0.8),  # smaller
        a_layout("b4", 4, 1.1, "full"),
        a_layout("a5", 5, 0.85),  # larger than a3, which is just too large as compiled
        a_layout("b6", 6, 0.7, "full"),
    ]
    tried, asked = search(ranked, {"a1": 2.0, "a3": 1.2, "b4": 0.9, "b6": 0.5}, 2)
    assert asked == ["a1", "a3", "b4", "b6"]
    assert [one.fits for one in tried] == [False, False, True, True]
    assert tried[0].reason == "does not fit: Used 32G of 16G hbm" and tried[1].step is not None


def test_what_is_predicted_to_be_much_too_large_is_not_tried():
    ranked = [a_layout("a1", 1, SLACK + 0.01), a_layout("a2", 2, SLACK), a_layout("a3", 3, 3.0)]
    assert search(ranked, {"a2": 0.9}, 3)[1] == ["a2"]
    assert search(ranked[:1] + ranked[2:], {"a1": 0.9}, 3)[1] == ["a1"]  # but something is


def test_a_compiler_that_fails_is_no_end():
    tried, _ = search([a_layout("x", 1, 0.5), a_layout("a2", 2, 0.6)], {"a2": 0.5}, 1)
    assert tried[0].reason == "the compiler fails, or its program is not understood: INTERNAL: no such tiling" and tried[1].fits


def test_the_report():
    ranked = [
        a_layout("a1", 1, 0.9),
        a_layout("a2", 2, 0.8),
        a_layout("a3", 0.5, 0.5, "full"),
        *(a_layout(f"c{k}", k, 0.1) for k in range(7, 14)),
    ]
    ranked[1].config.mesh.fsdp = ranked[0].config.mesh.tensor = 8
    tried, _ = search(ranked[:3], {"a1": 2.0, "a2": 0.6, "a3": 0.7}, 2)
    table = find_table(tried, ranked)
    rows = [line.split() for line in table.splitlines()]
    assert [row[0] for row in rows[:1]] == ["replica"] and rows[1][:5] == ["1", "8", "1", "none", "1"]
    assert " ".join(rows[1][5:]) == "9.6 GB 12.8 GB 4 s 2 s 25% 1.50 1"
    assert rows[2][3] == "full" and rows[3][2] == "8" and " ".join(rows[3][5:]) == "- 14.4 GB - 1 s 50% - -"
    assert " ".join(rows[4][5:]) == "- 1.6 GB - 7 s 50% - -"
    assert "and 2 more layouts" in table
    assert table.splitlines()[-1] == best_line(tried)
    assert best_line(tried) == (
        "best: --config.mesh.replica=1 --config.mesh.fsdp=8 --config.mesh.tensor=1 --config.model.remat=none --config.train.accumulation=1"
    )
    assert tried_line(tried[0]) == "replica 1 x fsdp 1 x tensor 8, remat none, accumulation 1: does not fit: Used 32G of 16G hbm"
    assert tried_line(tried[1]).endswith("accumulation 1: fits, 9.6 GB, at least 4 s a step")
    assert best_line(tried[:1]) == "none fits"
    assert find_table([], ranked).endswith("none was compiled")


def test_everything_as_plain_values(monkeypatch):
    ranked = [a_layout("a1", 1, 0.9), a_layout("a2", 2, 0.8), a_layout("c3", 3, 0.5)]
    tried, _ = search(ranked[:2], {"a1": 2.0, "a2": 0.6}, 1)
    monkeypatch.setattr("scaling_jax.report.pods.pod_json", lambda step: {"peak": step.memory.peak})
    values = find_json(tried, ranked)["ranking"]
    assert [row["fits"] for row in values] == [True, False, None]
    assert [row["compiled"] for row in values] == [{"peak": 9_600_000_000}, None, None]
    assert [row["predicted"]["times_s"]["compute"] for row in values] == [2, 1, 3]
    assert values[0]["layout"] == ranked[1].flags and values[1]["reason"].startswith("does not fit")


def test_order_of_what_was_compiled():
    small = a_layout("a1", 1, 0.5)
    step = SimpleNamespace(memory=SimpleNamespace(share=0.9), roofline=Roofline(1.0, 0.5, 0.1, 0.0, {}, 0.5))
    waits = SimpleNamespace(memory=SimpleNamespace(share=0.9), roofline=Roofline(1.0004, 0.5, 0.4, 0.0, {}, 0.5))
    too_large = SimpleNamespace(memory=SimpleNamespace(share=1.1), roofline=Roofline(0.1, 0.1, 0.1, 0.0, {}, 0.5))
    best, second, third, last = (Tried(small, s) for s in (step, waits, too_large, None))
    assert best.order < second.order < third.order < last.order


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, XLA's compiler for TPUs, is not installed")
@pytest.mark.slow
def test_the_command_finds_a_layout_that_fits(monkeypatch, tmp_path, capsys):
    """One whose logits alone are 17 GB for each of 4 devices without a tensor axis or several microbatches."""
    monkeypatch.undo()
    config = tmp_path / "large.py"
    config.write_text(
        "from scaling_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.model.width, config.model.head_dim, config.model.context, config.model.vocab_size = 256, 128, 256, 131072\n"
        "    config.parametrization.base_head_dim = 128\n"
        "    config.model.depth, config.model.compute_dtype = 2, 'bfloat16'\n"
        "    config.train.batch_tokens = 1024 * 256\n"
        "    config.train.tokens = 100 * config.train.batch_tokens\n"
        "    return config\n"
    )
    out = tmp_path / "out.json"
    assert cli.main(["compile", f"--config={config}", "--topology=v5e:2x2", "--find", "--find_compiled=1", f"--json={out}"]) == 0
    said = capsys.readouterr()
    assert "best: --config.mesh.replica=" in said.out.splitlines()[-1]
    assert "layouts; the best are compiled until 1 fit" in said.err
    import json

    ranking = json.loads(out.read_text())["ranking"]
    assert ranking[0]["fits"] and ranking[0]["compiled"]["memory_share"] <= 1
    flags = ranking[0]["layout"]
    assert flags["mesh.tensor"] > 1 or flags["train.accumulation"] > 1
