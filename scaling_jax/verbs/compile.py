"""`scaling-jax compile`."""

import sys
from pathlib import Path

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.pods.chips import parse_topology
from scaling_jax.verbs.common import Verb, config_of, define_config


def _define(values: flags.FlagValues) -> None:
    define_config(values)
    flags.DEFINE_string(
        "topology", "", "chip and shape of a slice, such as v5p:8x8x8; by default what the config was made for", flag_values=values
    )
    flags.DEFINE_integer("slices", 1, "slices of that shape, joined by the data-centre network", flag_values=values)
    flags.DEFINE_bool("find", False, "search mesh, sequences per device, remat and accumulation for the best that fits", flag_values=values)
    flags.DEFINE_string("json", "", "file to write everything to", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    config = config_of(values)
    if not values.topology:
        raise UserError("--topology is missing, for example --topology=v5p:4x4x4")
    topology = parse_topology(values.topology, values.slices)
    if values.json and not Path(values.json).absolute().parent.is_dir():
        raise UserError(f"--json={values.json}: no such directory: {Path(values.json).absolute().parent}")
    from scaling_jax.pods.compile import DoesNotFit, compile_step, prepare

    prepare()
    from scaling_jax.report.pods import pod_json, pod_table
    from scaling_jax.train.workdir import write_json

    try:
        step = compile_step(config, topology)
    except DoesNotFit as error:
        print(f"scaling-jax compile: does not fit: {error}; --find searches for what does", file=sys.stderr)
        return 1
    print(pod_table(step))
    if values.json:
        write_json(Path(values.json), pod_json(step))
    return 0 if step.memory.share <= 1 else 1


COMPILE = Verb(
    "check a pod run without a pod: memory, collectives, FLOPs and least times, by XLA's TPU compiler",
    "scaling-jax compile --config=configs/pods/dense.py:7b --topology=v5p:4x4x4",
    _define,
    _run,
)
