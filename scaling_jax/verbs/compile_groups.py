"""Of `scaling-jax sweep --dry_run --topology=…`: the groups of a study compiled for a slice, as `scaling-jax compile` does a run."""

import functools
import sys

from scaling_jax.console import LiveLine
from scaling_jax.errors import UserError
from scaling_jax.pods.chips import parse_topology
from scaling_jax.sweep.study import Study
from scaling_jax.verbs.compile import heeding_interrupt
from scaling_jax.verbs.interrupt import ended_by_interrupt


def compile_groups(study: Study, topology_name: str, most: int = 0) -> int:
    """Prints memory, collectives and least times of one group, the largest, of every class of a study; its data are not looked at.

    Args:
      study: its mesh is that of one member, and the devices that it leaves share the members.
      topology_name: chip and shape of the slice that a group trains on, 'v5e:2x4'.
      most: classes that are compiled, those with the most FLOPs a member first; 0 is all.

    Returns:
      The exit code: 0, 1 where a group does not fit, 3 where the compiler fails.

    Raises:
      UserError: the topology is none, or has not as many chips as a group is given; or the study is at fault.
    """
    topology = parse_topology(topology_name, 1)
    if study.tpus and study.tpus != topology.chips:
        raise UserError(f"--topology={topology_name}: has {topology.chips} chips; must have the study's tpus, {study.tpus}, for a group")
    with ended_by_interrupt("sweep"):
        import jax

        from scaling_jax.pods.compile import DoesNotFit, prepare
        from scaling_jax.pods.population import compile_group
        from scaling_jax.report.pods import pod_table
        from scaling_jax.sweep.plan import balanced, model_size
        from scaling_jax.sweep.population import Population
        from scaling_jax.sweep.status import common_fields
        from scaling_jax.sweep.study import config_of, describe, resolve, trajectories

        prepare()
    classes: dict[str, list] = {}
    for trajectory in trajectories(resolve(study)):
        classes.setdefault(trajectory.class_key, []).append(trajectory)

    def flops(members: list) -> int:
        return members[0].horizons[-1] * model_size(members[0].point.values)["flops_per_token"]

    chosen = sorted(classes.values(), key=flops, reverse=True)[: most or None]
    line, code = LiveLine(20, at_once=False), 0
    for i, members in enumerate(chosen):
        group = max(balanced(members, study.max_members), key=len)
        config, common = config_of(group[0].point.values), common_fields([trajectory.point.fields for trajectory in members])
        print(f"{describe(common)}: {len(members)} to train, {len(group)} at a time", flush=True)
        compiled = functools.partial(compile_group, config, len(group), topology, Population)
        try:
            step = heeding_interrupt(compiled, line, f"compiling for {topology.name}, {i} of {len(chosen)} done")
        except DoesNotFit as error:
            print(f"does not fit: {error}\n", flush=True)
            code = max(code, 1)
            continue
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            said = str(error).splitlines()[0]
            print(f"scaling-jax sweep: the compiler fails, or its program is not understood: {said}", file=sys.stderr)
            return 3
        print(f"{pod_table(step)}\n", flush=True)
        code = max(code, int(step.memory.share > 1 or bool(step.faults)))
    return code
