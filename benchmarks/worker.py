"""Builds one program and runs steps of it on command, in a process of its own: `benchmarks/alternate.py` starts it.

It is given the program as JSON, says in a line of JSON that it is built (or what the error is), and answers each line with a number of
steps by their time. "program" is "ours", a train step of this package (of whichever checkout comes first on PYTHONPATH), or "gpt2".
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import Peak, prepare_process

Steps = Callable[[int], Any]  # carries out so many, and waits for them


def ours(program: dict[str, Any]) -> tuple[Steps, dict[str, Any]]:
    """The step of `scaling_jax.train.step.Trainer`, with the fields "model.width" etc. of the program; "measure": the noise too."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from scaling_jax.config import default_config
    from scaling_jax.train.step import Trainer

    config = default_config()
    for name, value in program["fields"].items():
        section, key = name.split(".")
        config[section][key] = value
    config.train.batch_tokens = program["sequences"] * config.model.context
    config.noise_scale.every = int(program["measure"])
    trainer = Trainer(config)
    state = trainer.init(0)
    shape = (1, program["sequences"], config.model.context + 1)
    tokens_AxBxL = jnp.asarray(np.random.default_rng(0).integers(0, config.model.vocab_size, shape), jnp.int32)

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = trainer.step(state, tokens_AxBxL, program["measure"])
        jax.block_until_ready(state)

    return steps, {"platform": jax.default_backend()}


def build(program: dict[str, Any]) -> tuple[Steps, dict[str, Any]]:
    if program["program"] == "ours":
        return ours(program)
    from gpt2 import gpt2

    return gpt2(program)


def seconds_per_step(steps: Steps, count: int) -> float:
    started = time.perf_counter()
    steps(count)
    return (time.perf_counter() - started) / count


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    prepare_process()
    from scaling_jax import config, errors

    program = json.loads(sys.argv[1])
    home = Path(config.__file__).resolve().parent
    if "checkout" in program and home.parent != Path(program["checkout"]).resolve():
        answer(error=f"{program['checkout']}: is no checkout of this project; the code that would run is that of {home.parent}")
        return
    try:
        steps, said = build(program)
        steps(2)  # compiles, and touches its memory
        seconds = seconds_per_step(steps, 2)
    except errors.UserError as error:
        answer(error=str(error))
        return
    except Exception as error:  # a compiler that is not there, memory that is not enough
        lines = str(error).strip().splitlines() or [""]
        answer(error=f"{type(error).__name__}: {lines[0]}")
        return
    peak = Peak()
    answer(seconds=seconds, **said)
    for line in sys.stdin:
        flops_per_s = peak.flops_per_s()
        answer(seconds=seconds_per_step(steps, int(line)), peak=flops_per_s)


if __name__ == "__main__":
    main()
