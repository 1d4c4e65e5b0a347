"""`scaling-jax compile`."""

import concurrent.futures
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.console import LiveLine
from scaling_jax.errors import UserError
from scaling_jax.pods.chips import Topology, parse_topology
from scaling_jax.verbs.common import Verb, config_of, define_config
from scaling_jax.verbs.interrupt import ended_by_interrupt

Result = TypeVar("Result")


def _define(values: flags.FlagValues) -> None:
    define_config(values)
    flags.DEFINE_string("topology", "", "chip and shape of a slice, such as v5p:8x8x8", flag_values=values)
    flags.DEFINE_integer("slices", 1, "slices of that shape, joined by the data-centre network", flag_values=values)
    flags.DEFINE_bool("find", False, "search mesh, remat and accumulation for the best that fits, the batch as it is", flag_values=values)
    flags.DEFINE_integer("find_compiled", 3, "layouts that are to be compiled and fit, with --find", flag_values=values)
    flags.DEFINE_string("json", "", "file to write everything to", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    config = config_of(values)
    config_lib.settle_compute_dtype(config, "bfloat16")  # as a TPU would be given it
    if not values.topology:
        raise UserError("--topology is missing, for example --topology=v5p:4x4x4")
    topology = parse_topology(values.topology, values.slices)
    if values.find_compiled < 1:
        raise UserError(f"--find_compiled={values.find_compiled}: must be at least 1")
    path = Path(values.json).absolute() if values.json else None
    if path and not path.parent.is_dir():
        raise UserError(f"--json={values.json}: no such directory: {path.parent}")
    if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UserError(f"--json={values.json}: {'is a directory; must be a file' if path.is_dir() else 'no permission to write there'}")
    with ended_by_interrupt("compile"):
        from scaling_jax.pods.compile import prepare

        prepare()
    return _find(config, topology, values.find_compiled, path) if values.find else _compile(config, topology, path)


def _compile(config: ConfigDict, topology: Topology, path: Path | None) -> int:
    import jax

    from scaling_jax.pods.compile import DoesNotFit, compile_step
    from scaling_jax.report.pods import pod_json, pod_table

    try:
        step = heeding_interrupt(lambda: compile_step(config, topology), LiveLine(20, at_once=False), f"compiling for {topology.name}")
    except DoesNotFit as error:
        print(f"scaling-jax compile: does not fit: {error}; --find searches for what does", file=sys.stderr)
        found = {"topology": topology.name, "slices": topology.slices, "fits": False, "reason": str(error)}
        _write(path, lambda: found)
        return 1
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        print(f"scaling-jax compile: the compiler fails, or its program is not understood: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    print(pod_table(step))
    _write(path, lambda: pod_json(step))
    return 0 if step.memory.share <= 1 else 1


def _find(config: ConfigDict, topology: Topology, wanted: int, path: Path | None) -> int:
    from scaling_jax.pods.compile import compile_step
    from scaling_jax.pods.find import Tried, find, layouts
    from scaling_jax.report.pods import find_json, find_table, tried_line

    line = LiveLine(20, at_once=False)
    ranked = heeding_interrupt(lambda: layouts(config, topology), line, "predicting")
    tried: list[Tried] = []
    line.say(f"{len(ranked)} layouts; the best are compiled until {wanted} fit, which takes a minute or two each")

    def compiled(config: ConfigDict, topology: Topology) -> Any:
        return heeding_interrupt(lambda: compile_step(config, topology), line, f"compiling, {len(tried)} done")

    try:
        for one in find(config, topology, wanted, ranked, compiled):
            tried.append(one)
            line.say(tried_line(one))
    finally:  # after Ctrl-C too
        line.end()
        print(find_table(tried, ranked), flush=True)
        _write(path, lambda: find_json(tried, ranked))
    return 0 if any(one.fits for one in tried) else 1


def heeding_interrupt(function: Callable[[], Result], line: LiveLine, what: str) -> Result:
    """function(), in a thread of its own: the compiler is not Python, and Ctrl-C would be heard only after it."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    started = time.monotonic()
    while not concurrent.futures.wait([future], timeout=0.2).done:
        line.show(f"{what}: {time.monotonic() - started:.0f} s")
    line.end()
    return future.result()


def _write(path: Path | None, values: Callable[[], dict[str, Any]]) -> None:
    if path is None:
        return
    from scaling_jax.train.workdir import write_json

    try:
        write_json(path, values())
    except OSError as error:
        raise UserError(f"--json={path}: cannot write: {error.strerror}") from None


COMPILE = Verb(
    "check a pod run without a pod: memory, collectives, FLOPs and least times, by XLA's TPU compiler",
    "scaling-jax compile --config=configs/pods/dense.py:7b --topology=v5p:4x4x4",
    _define,
    _run,
)
