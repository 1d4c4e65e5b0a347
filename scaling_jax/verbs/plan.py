"""`scaling-jax plan`."""

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from scaling_jax import storage
from scaling_jax.console import LiveLine
from scaling_jax.errors import UserError
from scaling_jax.verbs.common import Verb, define_config


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("laws", None, "laws.json, which scaling-jax fit wrote; the flag's name may be left out", flag_values=values)
    flags.DEFINE_float("params", None, "N, parameters without embeddings", flag_values=values)
    flags.DEFINE_float("tokens", None, "T, tokens to train on", flag_values=values)
    flags.DEFINE_float("flops", None, "budget to split between N and T, FLOP, instead of 6·N·T", flag_values=values)
    flags.DEFINE_float("batch_tokens", None, "a batch that is decided already, tokens, instead of B*", flag_values=values)
    flags.DEFINE_string("topology", "", "chip and shape of a slice, such as v5p:8x8x8: chip-hours, by compiling for it", flag_values=values)
    flags.DEFINE_integer("slices", 1, "slices of that shape", flag_values=values)
    define_config(values)
    flags.DEFINE_string("config_out", "", "file to write a ready config to, from --config or the study's own", flag_values=values)
    flags.DEFINE_bool("json", False, "print it as JSON", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    from scaling_jax.laws import store
    from scaling_jax.laws.advice import LR, Advice, Question, advise
    from scaling_jax.pods.chips import parse_topology
    from scaling_jax.report.plan import plan_json, plan_text

    if not values.laws:
        raise UserError("LAWS is missing: scaling-jax plan laws.json --params=7e9 --tokens=1.4e11")
    for name in ("params", "tokens"):
        if values[name].value is None:
            raise UserError(f"--{name} is missing, for example --params=7e9 --tokens=1.4e11")
    if values.slices != 1 and not values.topology:
        raise UserError(f"--slices={values.slices} needs --topology, the shape of a slice, for example --topology=v5p:8x8x8")
    out = _new_file(values.config_out) if values.config_out else None
    topology = parse_topology(values.topology, values.slices) if values.topology else None
    laws = store.read(values.laws)
    question = Question(values.params, values.tokens, values.flops, values.batch_tokens)
    advice = advise(laws, question)
    rows = list(advice.rows)
    if topology is not None:
        rows += _pod_rows(values.config, laws, advice, topology)
    ready = _ready(values.config, laws, advice, topology) if out is not None else None
    if ready is not None and ready.remark:
        rows = [row._replace(notes=(*row.notes, ready.remark)) if row.name == LR else row for row in rows]
    advice = Advice(question, tuple(rows))
    text = json.dumps(plan_json(advice, laws), indent=1) if values.json else plan_text(advice, laws)
    if ready is not None:
        storage.write_bytes(out, _file_text(ready, advice, laws, str(out)).encode())
        text += "" if values.json else f"\n\nconfig  {out}"
    print(text)
    if not advice.told:
        raise UserError(f"{values.laws}: tells neither the learning rate and batch nor the loss of this run; what is missing is said above")
    return 0


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".py":
        raise UserError(f"--config_out={text}: must be a Python file, for example runs/7b.py")
    if not path.parent.is_dir():
        raise UserError(f"--config_out={text}: no such directory: {path.parent}")
    if path.exists():
        raise UserError(f"--config_out={text}: is there already; nothing is overwritten: delete it, or give another name")
    return path


class _Ready(NamedTuple):
    """The run as a config, the row of its lr, and what is not known of whether that lr is one for it."""

    config: ConfigDict
    lr: Any
    remark: str


def _ready(given: ConfigDict | None, laws: Any, advice: Any, topology: Any) -> _Ready:
    """The run as a config, with the lr at the batch that a step can take.

    Raises:
      UserError: learning rate or batch is unknown, there is nothing to start from, it comes nowhere near the run that was asked for, or
        the lr is not one for it.
    """
    from scaling_jax import config as config_lib
    from scaling_jax.laws.advice import BATCH, LR, advise
    from scaling_jax.verbs.plan_config import base_config, batch_near, check_transfer, ready_config

    def known(row):
        if row.value is None:
            raise UserError(f"no config can be made: {row.name} is unknown: {row.why}")
        return row

    batch, lr = known(advice.row(BATCH)), known(advice.row(LR))
    base = base_config(laws.base, laws.path) if given is None else given
    config_lib.validate(base)
    remark = check_transfer(base, laws.study, laws.base, laws.path)
    if topology is not None and (base.mesh.replica, base.mesh.fsdp, base.mesh.tensor) == (1, 1, 1):
        base.mesh.fsdp = -1  # of a single device; on a slice it takes them all
    question, chips = advice.question, 1 if topology is None else topology.devices
    batch_tokens = batch_near(base, batch.value, question.tokens, chips)
    if batch_tokens != batch.value:
        lr = known(advise(laws, question._replace(batch_tokens=float(batch_tokens))).row(LR))
    return _Ready(ready_config(base, question.params, question.tokens, batch_tokens, lr.value, chips), lr, remark)


def _pod_rows(given: ConfigDict | None, laws: Any, advice: Any, topology: Any) -> list[Any]:
    """Chip-hours and wall time at least, by compiling a step for the topology; or why they are unknown."""
    from scaling_jax.laws.advice import Row

    names = ("least wall time", "least chip-hours")
    try:
        config = _ready(given, laws, advice, topology).config
        step = _compiled(config, topology)
    except UserError as error:
        return [Row(name, why=str(error)) for name in names]
    from scaling_jax.verbs.plan_config import config_params

    said = (
        f"one step compiled for {topology.slices} x {topology.name}, not run: {step.roofline.bound} bounds, at most "
        f"{step.roofline.mfu:.0%} of the chips' FLOP/s",
        f"width {config.model.width}, depth {config.model.depth}, N {config_params(config):.4g}; batch {config.train.batch_tokens} tokens; "
        f"{step.memory.share:.0%} of a device's memory",
    )
    hours = step.seconds / 3600
    return [Row(names[0], "hours", hours, law="pod check", notes=said), Row(names[1], "hours", hours * topology.chips, law="pod check")]


def _compiled(config: ConfigDict, topology: Any) -> Any:
    """UserError where there is no compiler, the config does not fit the slice, or the compiler fails."""
    from scaling_jax.pods.compile import DoesNotFit, compile_step, prepare
    from scaling_jax.verbs.compile import heeding_interrupt

    prepare()
    import jax

    try:
        step = heeding_interrupt(lambda: compile_step(config, topology), LiveLine(20, at_once=False), f"compiling for {topology.name}")
    except DoesNotFit as error:
        raise UserError(f"does not fit {topology.name}: {error}; {_search(topology)}") from None
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"the compiler fails, or its program is not understood: {str(error).splitlines()[0]}") from None
    if step.memory.share > 1:
        raise UserError(f"does not fit {topology.name}: it takes {step.memory.share:.0%} of a device's memory; {_search(topology)}")
    return step


def _search(topology: Any) -> str:
    return f"write the config with --config_out=FILE, and scaling-jax compile --config=FILE --topology={topology.name} --find searches"


def _file_text(ready: _Ready, advice: Any, laws: Any, path: str) -> str:
    from scaling_jax.laws.advice import BATCH, LOSS
    from scaling_jax.report.laws import interval, number
    from scaling_jax.train.step import transformer_config
    from scaling_jax.verbs.plan_config import config_params, config_text

    def told(row: Any) -> str:
        if row.value is None:
            return f"{row.name}: unknown"
        ends = f" ({interval(row.low, row.high)})" if row.low != row.high else ""
        where = {True: ", inside the measured range", False: ", outside the measured range", None: ""}[row.inside]
        return f"{row.name} {number(row.value)}{f' {row.unit}' if row.unit else ''}{ends}, {row.law}{where}"

    config = ready.config
    model, question, batch = config.model, advice.question, config.train.batch_tokens
    reached = config_params(config)
    flops = transformer_config(config).causal_flops_per_token * config.train.tokens
    title = f"N {number(reached)} on {number(config.train.tokens)} tokens, as planned by {laws.path}."
    cost = [f"{flops:.3g} FLOP, {config.train.tokens // batch:,} steps"]
    cost += [f"{row.name} {number(row.value)} {row.unit}" for row in advice.rows if row.law == "pod check" and row.value is not None]
    study = laws.study.get("schedule")
    remarks = [
        f"From {laws.data['finished']} finished rows of {laws.data['path']} (fingerprint {laws.data['fingerprint']}): "
        f"{'; '.join(told(row) for row in (advice.row(BATCH), ready.lr, advice.row(LOSS)))}.",
        ready.remark,
        f"Width {model.width} and depth {model.depth} make N {number(reached)} of the {number(question.params)} asked for; width / depth "
        "and head_dim are the base's. The batch is a multiple of what a step needs, and the lr is that at this batch. Warmup, and whatever "
        f"else is counted in tokens, keeps the base's share of the budget: {config.schedule.warmup_tokens} tokens of warmup.",
        f"The laws were measured under the schedule {study}, this is {config.schedule.name}."
        if study and study != config.schedule.name
        else "",
        "Nothing of this size or budget was trained to make these numbers.",
        f"Cost: {'; '.join(cost)}.",
    ]
    wrapped = [textwrap.fill(remark, 118, break_on_hyphens=False, break_long_words=False) for remark in remarks if remark]
    return config_text(config, title, f"scaling-jax train --config={path} --workdir=DIR", "\n\n".join(wrapped).split("\n"))


PLAN = Verb(
    "what fitted laws say of a run: lr, batch, loss, cost of being wrong, split of a budget, with intervals",
    "scaling-jax plan laws.json --params=7e9 --tokens=1.4e11 --topology=v5p:8x8x8",
    _define,
    _run,
    positional="laws",
)
