"""`scaling-jax branch`."""

import errno
import math
import sys

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.process import keep_freed_memory, use_compilation_cache
from scaling_jax.verbs.common import Verb, integers


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "work directory of the run; its branches go to DIR/branches", flag_values=values)
    flags.DEFINE_string("at_tokens", None, "checkpoints to branch off, token counts, comma-separated", flag_values=values)
    flags.DEFINE_string("factors", "1,2,4,8", "factors on the batch that the run has there, ascending from 1", flag_values=values)
    flags.DEFINE_integer(
        "span_tokens", None, "tokens of every branch, up to whole batches; an eighth of at_tokens if not given", flag_values=values
    )
    flags.DEFINE_string("lr_rule", "sqrt", "what the lr is times at factor k: sqrt, the root of k; linear, k; none, 1", flag_values=values)
    flags.DEFINE_float("tolerance", 0.01, "held-out loss that counts as none, nats per token", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "delete the branches of these checkpoints, and start again", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    if not values.run:
        raise UserError("--run=DIR is missing: the work directory of the run to branch off")
    if not values.at_tokens:
        raise UserError("--at_tokens=… is missing: token counts of checkpoints of the run, comma-separated")
    if not (values.tolerance >= 0 and math.isfinite(values.tolerance)):
        raise UserError(f"--tolerance={values.tolerance}: must be a number of nats per token, 0 or more")
    at_tokens, factors = integers("at_tokens", values.at_tokens, "400000,800000"), integers("factors", values.factors, "1,2,4,8")
    use_compilation_cache()
    keep_freed_memory()
    from scaling_jax.branch.plan import Asked
    from scaling_jax.branch.run import Stopped, branch
    from scaling_jax.report.branch import report_branches
    from scaling_jax.report.run import draw_critical_batch

    try:
        branch(values.run, Asked(at_tokens, factors, values.span_tokens, values.lr_rule), values.overwrite)
        text, all_known = report_branches(values.run, at_tokens, values.tolerance)
        print(text)
        if (figure := draw_critical_batch(values.run)) is not None:
            print(f"\nfigure {figure}")
    except Stopped as stopped:
        print("interrupted, saved; the same command continues", file=sys.stderr)
        return 128 + stopped.args[0]
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"--run={values.run}: no space left on the disk; free some and run the same command again") from error
        where, why = error.filename or "its files", error.strerror or error
        raise UserError(f"--run={values.run}: {where} cannot be read or written: {why}") from error
    return 0 if all_known else 1


BRANCH = Verb(
    "continue a run from a checkpoint with larger batches, and find the largest that loses nothing",
    "scaling-jax branch --run=runs/long --at_tokens=400384,800768 --factors=1,2,4,8 --span_tokens=100000",
    _define,
    _run,
    continues=True,
)
