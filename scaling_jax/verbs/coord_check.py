"""`scaling-jax coord-check`."""

from absl import flags

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.process import use_compilation_cache
from scaling_jax.verbs.common import Verb, config_of, define_config, define_model, integers


def _define(values: flags.FlagValues) -> None:
    define_config(values)
    flags.DEFINE_string("widths", None, "widths to compare at config.model.depth, comma-separated, at least 3", flag_values=values)
    flags.DEFINE_string("depths", None, "depths to compare at config.model.width, comma-separated, at least 3", flag_values=values)
    flags.DEFINE_string("out", None, "directory of the result; a check that was stopped there is continued", flag_values=values)
    flags.DEFINE_integer("seeds", 4, "initial parameters to average over", flag_values=values)
    flags.DEFINE_integer("steps", 10, "optimizer steps on the one batch", flag_values=values)
    flags.DEFINE_float(
        "lr", None, "learning rate, large but no more than 4 times the best; config.optimizer.lr if not given", flag_values=values
    )
    flags.DEFINE_integer("batch_tokens", 1024, "tokens of the one batch", flag_values=values)
    flags.DEFINE_integer(
        "heads", 0, "keep so many heads and let head_dim grow with width; 0 keeps config.model.head_dim", flag_values=values
    )
    define_model(values)
    flags.DEFINE_bool("overwrite", False, "delete the check that is in out, and start again", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    config = config_of(values)
    config_lib.settle_compute_dtype(config, "float32")  # in which every check is computed
    sizes = {axis: integers(f"{axis}s", text, "64,128,256") for axis, text in (("width", values.widths), ("depth", values.depths)) if text}
    if not values.out:
        raise UserError("--out=DIR is missing: where the table, the figures and the verdict go")
    if "://" in values.out:
        raise UserError(f"--out={values.out}: must be a directory of a file system; mount the bucket")
    use_compilation_cache()
    from scaling_jax.coord_check.run import Check, coord_check, expected
    from scaling_jax.report.coord_check import report_check

    check = Check(sizes, values.seeds, values.steps, values.lr, values.batch_tokens, values.heads, values.model)
    text, passed = report_check(coord_check(config, check, values.out, values.overwrite), expected(config, check), values.out)
    print(text)
    return 0 if passed else 1


COORD_CHECK = Verb(
    "measure whether activations, updates and weight decay keep their sizes across width or depth",
    "scaling-jax coord-check --config=configs/cpu_demo.py --widths=64,128,256,512,1024 --config.model.depth=2 --out=runs/widths",
    _define,
    _run,
    continues=True,
)
