"""What a machine decides about a study, by measuring: how many members train together, in which dtype, and how long it may take."""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.sweep.group import device_mesh
from scaling_jax.sweep.plan import model_size
from scaling_jax.sweep.population import Population, stack_values
from scaling_jax.sweep.study import config_of
from scaling_jax.train.compute_dtype import Choice, fastest
from scaling_jax.train.step import Trainer, transformer_config

TIMED_SECONDS, TIMED_STEPS = 1.0, 50  # of one timing, at most
FORWARD_FLOPS = 2e10  # that a forward pass of the estimate has, at most
MEMORY_SHARE = 0.8  # of what there is that a group may fill
FORWARD_SHARE = (
    0.28  # of a training step that evaluating its tokens takes: a third of the products, and the optimizer's and the noise's part
)


class Timing(NamedTuple):
    """Of one program: seconds of a step of all members, and bytes of one device at its peak."""

    seconds: float
    peak_bytes: int


def decide_class(values: Mapping[str, Any], count: int, max_members: int, cpus: int = 1) -> dict[str, Any]:
    """How many of `count` trajectories of one class train together on this machine.

    Members share every step's overhead and the program, but may not fit into caches or memory together: one alone is timed, and as many as
    may be; where these are slower for each, a quarter of them too. What takes the least time a member is chosen.

    Args:
      values: every field of one of them.
      count: how many there are.
      max_members: the most that may be together.
      cpus: threads of a group on a CPU; groups share its memory.

    Returns:
      A class of the plan: members, seconds_per_step by size, bytes_per_member, params, total_params, flops_per_token, why.
    """
    config = config_of(values)
    along = device_mesh(config)[1]
    alone = Population(config, along, device_mesh(config)[0])
    params = sum(x.size for x in jax.tree.leaves(alone.trainer.abstract_state.params))
    decided = {"total_params": params, "seconds_per_step": {}, "bytes_per_member": None, **model_size(values)}
    if min(count, max_members) <= along:
        return decided | {"members": along, "why": "one for each device" if along > 1 else "no other of its kind"}
    timed = {along: time_steps(alone)}
    per_member = timed[along].peak_bytes
    fit = max(1, int(MEMORY_SHARE * memory_bytes(cpus) / per_member)) * along
    most = min(max_members, count, fit) // along * along
    for size in (most, most // 4 // along * along):
        if size > along and size not in timed:
            timed[size] = time_steps(Population(config, size, device_mesh(config)[0]))
            if timed[size].seconds / size <= timed[along].seconds / along:
                break
    members = min(timed, key=lambda size: (timed[size].seconds / size, -size))
    speeds = ", ".join(f"{size}: {timed[size].seconds / size * 1e3:.3g} ms" for size in sorted(timed))
    why = f"a step of one member takes, together with as many as {speeds}"
    if fit < min(max_members, count):
        why += f"; memory has room for {fit}"
    seconds = {str(size): timed[size].seconds for size in sorted(timed)}
    return decided | {"members": members, "seconds_per_step": seconds, "bytes_per_member": per_member, "why": why}


def decide_dtype(values: Mapping[str, Any]) -> Choice:
    """The compute dtype in which one member's step takes the least time."""
    config = config_of(values)
    mesh, _ = device_mesh(config)
    return fastest(config, mesh)


def time_steps(population: Population) -> Timing:
    """Compiles a population's step and times it, on made-up parameters and tokens."""
    config = population.config
    sequences, rng = config_lib.sequences_per_batch(config), np.random.default_rng(0)
    with jax.set_mesh(population.mesh) if population.mesh is not None else contextlib.nullcontext():
        compiled = population.trace_step(sequences, bool(config.noise_scale.every)).lower().compile()

    def made_up(x: jax.ShapeDtypeStruct) -> Any:
        value = rng.uniform(0.0, 0.02, x.shape) if np.issubdtype(x.dtype, np.floating) else np.zeros(x.shape)
        return jax.device_put(value.astype(x.dtype), x.sharding)

    state = jax.tree.map(made_up, population.abstract_state)
    values = stack_values([config] * population.members)
    shape = population.members, sequences, config.model.context + 1
    taken, started = [], time.monotonic()
    while len(taken) < 4 or (len(taken) < TIMED_STEPS and time.monotonic() - started < TIMED_SECONDS):
        before = time.monotonic()
        tokens = population.place(rng.integers(0, config.model.vocab_size, shape, np.int32))
        state, metrics = compiled(state, values, tokens)
        jax.device_get(metrics.loss)
        taken.append(time.monotonic() - before)
    planned = compiled.memory_analysis()
    peak = getattr(planned, "peak_memory_in_bytes", 0) or planned.argument_size_in_bytes + planned.temp_size_in_bytes
    return Timing(min(taken), int(peak))  # what other processes take from it is not its own


def memory_bytes(cpus: int) -> int:
    """That a group may have: a device's; on CPUs what is free, shared by as many groups as there are processors for."""
    stats = jax.devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit)
    groups = max(1, len(os.sched_getaffinity(0)) // cpus)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // groups


def estimate(classes: Mapping[str, tuple[Mapping[str, Any], int]], budget_seconds: float = 1.5) -> dict[str, float]:
    """Seconds that each class may take on this machine, one member after the other, from a forward pass at its shape and batch.

    As many classes are measured as the budget allows, those with most work first; the others are as slow, FLOP for FLOP, as the one
    measured whose step is nearest to theirs. Good to a factor of two; a study's plan has steps that were timed.

    Args:
      classes: by key the values of a member and the tokens that all members train on.
      budget_seconds: after which no other measurement is begun.
    """
    work = {key: model_size(values)["flops_per_token"] for key, (values, _) in classes.items()}
    step = {key: work[key] * values["train.batch_tokens"] for key, (values, _) in classes.items()}
    rates: dict[str, float] = {}  # seconds a FLOP
    started = time.monotonic()
    for key in sorted(classes, key=lambda key: -work[key] * classes[key][1]):
        if rates and time.monotonic() - started > budget_seconds:
            break
        rates[key] = _forward_seconds(config_of(classes[key][0])) / FORWARD_SHARE / step[key]
    nearest = {key: min(rates, key=lambda known, key=key: abs(np.log(step[known] / step[key]))) for key in classes}
    return {key: rates[nearest[key]] * work[key] * tokens for key, (_, tokens) in classes.items()}


def _forward_seconds(config: ConfigDict) -> float:
    """Of evaluating one batch, on made-up parameters; of a large model's, from a part of the batch, or of the depth."""
    config, of_all = config.copy_and_resolve_references(), 1.0
    sequences, flops = config_lib.sequences_per_batch(config), transformer_config(config).flops_per_token * config.model.context / 3
    if flops > FORWARD_FLOPS:
        model, of_all = config.model, flops
        config.parametrization.name, model.depth, model.kv_heads, model.vocab_size = "standard", 1, 0, min(model.vocab_size, 1 << 13)
        while (flops := transformer_config(config).flops_per_token * model.context / 3) > 4 * FORWARD_FLOPS:
            if model.width == model.head_dim:
                break
            model.width = max(1, model.width // 2 // model.head_dim) * model.head_dim
        of_all /= flops
    measured = max(1, min(sequences, int(FORWARD_FLOPS / flops)))
    trainer, rng = Trainer(config), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.uniform(0.0, 0.02, x.shape).astype(x.dtype), trainer.abstract_state.params)
    shape = measured, config.model.context + 1
    tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
    trainer.eval(params, tokens).block_until_ready()
    taken = []
    for _ in range(3):
        before = time.monotonic()
        trainer.eval(params, tokens).block_until_ready()
        taken.append(time.monotonic() - before)
    return min(taken) * of_all * sequences / measured
