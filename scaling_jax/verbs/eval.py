"""`scaling-jax eval`."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.process import keep_freed_memory, use_compilation_cache
from scaling_jax.verbs.common import Verb
from scaling_jax.verbs.interrupt import ended_by_interrupt


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "work directory of the run; it is only read, and may still be training", flag_values=values)
    flags.DEFINE_list(
        "data",
        None,
        "what to evaluate on, each DIR or NAME=DIR: tokens, or a folder whose heldout/ is taken; 'sotu' is built in; "
        "the run's own held-out domains if not given",
        flag_values=values,
    )
    flags.DEFINE_integer("at_tokens", None, "the checkpoint to evaluate, a token count; the newest if not given", flag_values=values)
    flags.DEFINE_integer(
        "eval_tokens", None, "tokens of each domain, evenly spread; 0 is all; the run's config.eval.tokens if not given", flag_values=values
    )
    flags.DEFINE_string(
        "out", None, "JSON file to write, and a PNG beside it; RUN/evaluations/TOKENS.json if not given", flag_values=values
    )


def _run(values: flags.FlagValues) -> int:
    if not values.run:
        raise UserError("--run=DIR is missing: the work directory of the run to evaluate")
    if values.out is not None and not values.out.endswith(".json"):
        raise UserError(f"--out={values.out}: must be the name of a .json file; the figure goes beside it")
    with ended_by_interrupt("eval"):
        use_compilation_cache()
        keep_freed_memory()
    try:
        return _evaluate(values, Path(values.run))
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as error:
        raise UserError(f"{error.filename or f'--run={values.run}'}: cannot be read: {error.strerror or error}") from error


def _evaluate(values: flags.FlagValues, workdir: Path) -> int:
    with ended_by_interrupt("eval"):
        from scaling_jax.console import LiveLine
        from scaling_jax.data.domains import held_out_named, held_out_of_run
        from scaling_jax.report.evaluation import evaluation_record, evaluation_table, position_figure, store_evaluation
        from scaling_jax.train.evaluate import HeldOut, batch_sequences, evaluate
        from scaling_jax.train.opened import open_run, read_config
        from scaling_jax.train.workdir import EVALUATIONS, digest

    config, identity = read_config(workdir)
    context = config.model.context
    eval_tokens = config.eval.tokens if values.eval_tokens is None else values.eval_tokens
    if eval_tokens < 0 or 0 < eval_tokens < context:
        raise UserError(f"--eval_tokens={eval_tokens}: must be 0, which is all, or at least {context}, the context of the run's model")
    if values.data is None:
        streams, bytes_V = held_out_of_run(workdir, config, identity.get("data.fingerprint"))
    else:
        streams, bytes_V = held_out_named(workdir, config, values.data or [""])
    domains = {name: HeldOut(stream, context, eval_tokens, bytes_V) for name, stream in streams.items()}
    run = open_run(workdir, values.at_tokens)
    out = Path(values.out) if values.out else workdir / EVALUATIONS / f"{run.tokens}.json"
    with _writing(out):  # before the work, not after it
        _require_writable(out)

    checkpoint = {"run": digest(identity), "tokens": run.tokens, "context": context}
    found, line = {}, LiveLine(seconds=10, at_once=False)
    line.say(f"{workdir}: checkpoint at {run.tokens:,} tokens")
    for name, held_out in domains.items():
        line.say(f"{name}: {held_out.tokens:,} tokens of {held_out.stream.directory}")
        of = f"{held_out.tokens:,} tokens of {name}"
        try:
            result = evaluate(
                run.trainer, run.params, held_out, batch_sequences(run.config), True, lambda done, of=of: line.show(f"{done:,} of {of}")
            )
        finally:
            line.end()
        found[name] = evaluation_record(held_out.stream, result)
        with _writing(out):
            stored = store_evaluation(out, checkpoint, found)
    figure = out.with_suffix(".png")
    with _writing(figure, f"the losses are in {out}; "):
        position_figure(stored["domains"], figure, f"{workdir.resolve().name}, {run.tokens:,} tokens")
    print(f"{evaluation_table(found)}\n\nevaluation  {out}\nfigure      {figure}")
    spoilt = [name for name, one in found.items() if one["loss"] is None]
    if spoilt:
        line.say(f"the loss is not finite on {', '.join(spoilt)}: the run had diverged; --at_tokens can name another checkpoint")
    return 1 if spoilt else 0


@contextlib.contextmanager
def _writing(path: Path, besides: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "no space left on the disk" if full else f"cannot be written: {error.strerror or error}"
        raise UserError(f"{path}: {why}; {besides}--out=FILE.json can name another place") from error


def _require_writable(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise UserError(f"--out={out}: is a directory, must be the name of a .json file")
    tried = out.with_name(out.name + ".tmp")
    tried.touch()
    tried.unlink()


EVAL = Verb(
    "evaluate any checkpoint of a run: held-out loss per domain and by position, bits per byte, with standard errors",
    "scaling-jax eval --run=runs/demo --data=sotu,books=data/books --at_tokens=400384",
    _define,
    _run,
)
