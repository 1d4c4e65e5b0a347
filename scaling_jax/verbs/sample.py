"""`scaling-jax sample`."""

import math
import os
import sys

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.process import keep_freed_memory, use_compilation_cache
from scaling_jax.verbs.common import Verb
from scaling_jax.verbs.interrupt import ended_by_interrupt


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "work directory of the run; it is only read, and may still be training", flag_values=values)
    flags.DEFINE_string("prompt", None, "text to go on from; '' begins a document", flag_values=values)
    flags.DEFINE_integer("tokens", 200, "largest number of tokens to write; the end of the document ends it too", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "what logits are divided by; 0 takes the most likely token", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw from the smallest set of tokens with so much probability", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of what is drawn: the same gives the same text", flag_values=values)
    flags.DEFINE_integer("samples", 1, "texts to write, one after the other", flag_values=values)
    flags.DEFINE_integer("at_tokens", None, "the checkpoint to take, a token count; the newest if not given", flag_values=values)
    flags.DEFINE_string(
        "params",
        None,
        "safetensors file with the parameters, instead of a checkpoint; the run's config says the shape",
        flag_values=values,
    )
    flags.DEFINE_string("tokenizer", None, "'bytes' or a tokenizer.json; config.data.tokenizer of the run if not given", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    _check_flags(values)
    with ended_by_interrupt("sample"):
        use_compilation_cache()
        keep_freed_memory()
        import jax

        from scaling_jax.interop.opening import open_model, open_tokenizer
        from scaling_jax.interop.sample import Reader, Sampling, TextStream, sample_tokens

    tokenizer = open_tokenizer(values.run, values.tokenizer)
    prompt = tokenizer.encode(values.prompt).tolist() or [tokenizer.end_token]
    reader = Reader(open_model(values.run, values.at_tokens, values.params))
    if len(prompt) > reader.context:
        left_out = f"the last {reader.context}, the model's context, are read"
        print(f"--prompt has {len(prompt)} tokens, of which {left_out}", file=sys.stderr)
    sampling, key = Sampling(values.temperature, values.top_p), jax.random.key(values.seed)
    for n in range(values.samples):
        if values.samples > 1:
            print(f"--- {n + 1} of {values.samples}")
        _show(values.prompt)
        stream = TextStream(tokenizer, prompt)
        tokens = sample_tokens(reader, prompt, tokenizer, jax.random.fold_in(key, n), sampling)
        for _, token in zip(range(values.tokens), tokens, strict=False):
            if token == tokenizer.end_token:
                break
            _show(stream.add(token))
        _show(stream.end() + "\n")
    return 0


def _show(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)  # a terminal may know fewer characters than a model
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes, as Python ends
        raise UserError(f"the text cannot be written: {error.strerror}") from error


def _check_flags(values: flags.FlagValues) -> None:
    if not values.run:
        raise UserError("--run=DIR is missing: the work directory of the run to sample from")
    if values.prompt is None:
        raise UserError("--prompt=TEXT is missing: the text to go on from; --prompt= begins a document")
    try:
        values.prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt={ascii(values.prompt)}: must be UTF-8") from None
    if not (values.temperature >= 0 and math.isfinite(values.temperature)):
        raise UserError(f"--temperature={values.temperature}: must be a number, 0 or more; 0 takes the most likely token")
    if not 0 < values.top_p <= 1:
        raise UserError(f"--top_p={values.top_p}: must be greater than 0, and at most 1, which is all tokens")
    for name in ("tokens", "samples"):
        if values[name].value < 1:
            raise UserError(f"--{name}={values[name].value}: must be at least 1")
    if not 0 <= values.seed < 1 << 32:
        raise UserError(f"--seed={values.seed}: must be from 0 to {(1 << 32) - 1}; JAX keys take 32 bits")
    for name, what in (("params", "a safetensors file"), ("tokenizer", "'bytes', a tokenizer.json, or what else can be tokenized with")):
        if values[name].value == "":
            raise UserError(f"--{name}=: must be {what}")
    if values.params is not None and values.at_tokens is not None:
        raise UserError(f"--at_tokens={values.at_tokens}: names a checkpoint, but the parameters come from --params={values.params}")


SAMPLE = Verb(
    "write text with a run's model",
    "scaling-jax sample --run=runs/demo --prompt='The state of the Union' --temperature=0.8 --top_p=0.95",
    _define,
    _run,
)
