"""`scaling-jax export`."""

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.verbs.common import Verb
from scaling_jax.verbs.interrupt import ended_by_interrupt


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "work directory of the run; it is only read, and may still be training", flag_values=values)
    flags.DEFINE_string("out", None, "safetensors file to write; one that is there is replaced", flag_values=values)
    flags.DEFINE_integer("at_tokens", None, "the checkpoint to write, a token count; the newest if not given", flag_values=values)
    flags.DEFINE_bool(
        "fold_multipliers", False, "multiply weights with what μP's forward pass multiplies with; docs/interop.md", flag_values=values
    )


def _run(values: flags.FlagValues) -> int:
    if not values.run:
        raise UserError("--run=DIR is missing: the work directory of the run whose parameters to write")
    if not values.out:
        raise UserError("--out=FILE.safetensors is missing: the file to write")
    if not values.out.endswith(".safetensors"):
        raise UserError(f"--out={values.out}: must be the name of a .safetensors file")
    with ended_by_interrupt("export"):
        from scaling_jax.interop.opening import export

    tensors, tokens = export(values.run, values.out, values.at_tokens, values.fold_multipliers)
    numbers = sum(tensor.size for tensor in tensors.values())
    print(f"{values.out}: {len(tensors)} tensors, {numbers:,} parameters, float32, of the checkpoint at {tokens:,} tokens")
    return 0


EXPORT = Verb(
    "write a run's parameters to a safetensors file",
    "scaling-jax export --run=runs/demo --out=demo.safetensors",
    _define,
    _run,
)
