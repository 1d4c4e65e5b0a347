"""Every field of a run: its default, its unit, and whether it is part of what the run *is*.

A field is *identity* when changing it makes another run (width, lr, seed, …), and *execution* when it only changes how the
same run is carried out (mesh, accumulation, prefetch, logging, paths). A work directory belongs to one identity and may be
continued under any execution.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field: its default (which fixes its type), its meaning with unit, and its allowed values."""

    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None  # smallest allowed value
    above: float | None = None  # or: every allowed value is greater than this
    below: float | None = None  # every allowed value is smaller than this
    execution: bool = False


def _execution(default: Any, doc: str, **limits: Any) -> Field:
    return Field(default, doc, execution=True, **limits)


FIELDS: dict[str, Field] = {
    "model.width": Field(128, "width of the residual stream; a multiple of head_dim", minimum=1),
    "model.depth": Field(3, "number of blocks", minimum=1),
    "model.head_dim": Field(32, "width of one attention head; even for rotary positions", minimum=2),
    "model.context": Field(64, "tokens in a sequence", minimum=1),
    "model.vocab_size": Field(256, "rows of the embedding; at least the tokenizer's vocabulary", minimum=2),
    "model.mlp": Field("gelu", "kind of MLP", choices=("gelu", "relu2", "swiglu")),
    "model.mlp_ratio": Field(4.0, "hidden width of the MLP over width", above=0),
    "model.tied_embeddings": Field(False, "one matrix for embedding and unembedding"),
    "model.biases": Field(False, "a bias after every projection of the blocks"),
    "model.positions": Field("rotary", "how a token's place is told", choices=("rotary", "learned")),
    "model.rope_theta": Field(10_000.0, "base of the rotary wavelengths", above=1),
    "model.kv_heads": Field(0, "key/value heads, each of which equally many query heads share; 0 is one for each", minimum=0),
    "model.norm_gains": Field(False, "a learned gain in every norm; gains break the transfer of μP's lr"),
    "model.qk_norm": Field(False, "RMSNorm of each head's queries and keys"),
    "model.shared_depth": Field(False, "one block applied depth times, as in a universal transformer"),
    "model.dropout": Field(0.0, "dropout of the embedding, the attention weights and every branch's output", minimum=0, below=1),
    "model.compute_dtype": Field(
        "float32",
        "dtype of activations and products; fastest is measured as a run begins, and is the run's from then on",
        choices=("float32", "bfloat16", "fastest"),
    ),
    "model.attention": _execution(
        "auto",
        "two products, or a kernel for TPUs that holds no logits; auto is the kernel where it can be",
        choices=("auto", "einsum", "splash"),
    ),
    "model.remat": _execution(
        "none",
        "what a block's backward pass computes again: nothing, all but the projections, all but the attention, all",
        choices=("none", "dots", "attention", "full"),
    ),
    "model.loss_chunk_tokens": _execution(
        0, "a device holds the logits of so many tokens, of one sequence, at a time; 0 holds all", minimum=0
    ),
    "parametrization.name": Field("mup", "row table", choices=("standard", "mup", "completep")),
    "parametrization.base_width": Field(128, "width at which every multiplier is 1", minimum=1),
    "parametrization.base_depth": Field(0, "depth at which every multiplier is 1; completep must be given it", minimum=0),
    "parametrization.base_head_dim": Field(32, "head_dim at which logits agree with 1/sqrt(head_dim)", minimum=1),
    "parametrization.depth_exponent": Field(1.0, "alpha of the residual branch, depth^-alpha (completep)", minimum=0),
    "parametrization.embedding_std": Field(1.0, "init standard deviation of the embedding; if tied, times sqrt(base_width)", above=0),
    "parametrization.hidden_std": Field(1.0, "init std of hidden matrices times sqrt(fan_in)", above=0),
    "parametrization.output_init": Field("normal", "init of an untied unembedding", choices=("zero", "normal")),
    "parametrization.query_init": Field("normal", "init of the matrices that make queries", choices=("zero", "normal")),
    "optimizer.lr": Field(2.0**-8, "peak learning rate at the base sizes", above=0),
    "optimizer.b1": Field(0.9, "AdamW's decay of the first moment, per step", minimum=0, below=1),
    "optimizer.b2": Field(0.95, "AdamW's decay of the second moment, per step", minimum=0, below=1),
    "optimizer.eps": Field(1e-8, "AdamW's epsilon at the base sizes", above=0),
    "optimizer.weight_decay": Field(0.0, "shrinkage per step over lr, at the base sizes", minimum=0),
    "optimizer.decay_mode": Field(
        "independent",
        "independent: shrinkage per step does not depend on width; coupled: it follows each parameter's lr",
        choices=("independent", "coupled"),
    ),
    "optimizer.clip_norm": Field(1.0, "global gradient norm above which gradients are scaled down; 0 is off", minimum=0),
    "schedule.name": Field("cosine", "course of the lr after warmup", choices=("constant", "linear", "cosine", "wsd")),
    "schedule.warmup_tokens": Field(0, "tokens of linear warmup from zero", minimum=0),
    "schedule.decay_tokens": Field(0, "tokens of linear decay at the end (wsd)", minimum=0),
    "schedule.final_lr_fraction": Field(0.0, "lr at the end over the peak", minimum=0),
    "train.tokens": Field(1 << 20, "token budget T of the run", minimum=1),
    "train.batch_tokens": Field(2048, "tokens per optimizer step", minimum=1),
    "train.seed": Field(0, "seed of the initial parameters and of the data order; JAX keys take 32 bits", minimum=0, below=1 << 32),
    "train.accumulation": _execution(1, "microbatches per optimizer step", minimum=1),
    "train.stop_at_tokens": _execution(
        0, "stop, saved, at the first step that reaches so many tokens; a larger value continues", minimum=0
    ),
    "batch.schedule": Field("constant", "course of the batch size", choices=("constant", "stages", "follow")),
    "batch.stages": Field((), "stages: from so many tokens on the batch is that, each 'tokens=batch_tokens'; train.batch_tokens before"),
    "batch.lr_rule": Field(
        "none", "power of batch / train.batch_tokens that the lr is times: 0, 1/2, 1", choices=("none", "sqrt", "linear")
    ),
    "batch.follow": Field("noise", "follow: what is followed, 'noise', 'preconditioned' (noise), or the path of a law file"),
    "batch.multiple": Field(1.0, "follow: the batch doubles once the followed's lower 95% bound is this many times it", above=0),
    "batch.look_tokens": Field(0, "follow: tokens between two looks at what is followed; 0 is train.tokens / 64", minimum=0),
    "batch.hold": Field(2, "follow: looks in a row, since the last doubling, at which the bound must be passed", minimum=1),
    "batch.max_tokens": Field(0, "follow: the batch does not grow beyond this; 0 is 8 times train.batch_tokens", minimum=0),
    "mesh.replica": _execution(1, "devices along the axis that only copies parameters", minimum=1),
    "mesh.fsdp": _execution(1, "devices that shard parameters and batch; -1 takes all that are left", minimum=-1),
    "mesh.tensor": _execution(1, "devices that shard heads, MLP and vocabulary", minimum=1),
    "mesh.member": _execution(1, "devices that shard the members of a sweep; 1 for a single run", minimum=1),
    "data.path": _execution("sotu", "'sotu' (built in), or a directory that `scaling-jax tokenize` wrote"),
    "data.tokenizer": _execution("bytes", "'bytes' or a tokenizer.json; what the tokens must have been made with"),
    "data.eval_domains": _execution((), "more held-out domains, each 'name=directory'"),
    "data.train_tokens": Field(0, "train on this many tokens of the data; 0 is all of it", minimum=0),
    "data.repeat": Field(False, "allow more than one pass over the data"),
    "data.cache": _execution("", "directory for the built-in corpus's tokens; empty is the user's cache directory"),
    "data.verify": _execution(True, "compare every shard of the data with its checksum at the start; reads them all"),
    "data.prefetch": _execution(2, "batches read ahead", minimum=1),
    "noise_scale.every": Field(1, "measure at every n-th step; 0 is off", minimum=0),
    "noise_scale.window_tokens": Field(0, "tokens of the run that the running means look back at most; 0 is train.tokens / 8", minimum=0),
    "noise_scale.decay_tokens": Field(0, "tokens over which the weights within the window fall by e; 0 weighs all alike", minimum=0),
    "noise_scale.preconditioned": Field(False, "measure in AdamW's own metric too, tr(PΣ)/(GᵀPG)"),
    "eval.every_tokens": _execution(0, "tokens between evaluations; 0 evaluates at the end only", minimum=0),
    "eval.tokens": Field(1 << 17, "held-out tokens of each domain, evenly spread; 0 is all", minimum=0),
    "eval.batch_sequences": _execution(128, "sequences per evaluation step", minimum=1),
    "checkpoint.every_tokens": _execution(0, "tokens between checkpoints; 0 saves at the end only", minimum=0),
    "checkpoint.keep_latest": _execution(2, "newest checkpoints kept", minimum=1),
    "checkpoint.keep_at_tokens": _execution((), "token counts whose checkpoints are saved and kept for good"),
    "logging.every_tokens": _execution(0, "tokens between records in metrics.jsonl; 0 records every step", minimum=0),
    "logging.console_seconds": _execution(10.0, "seconds between progress lines where there is no terminal", above=0),
    "logging.tensorboard": _execution(True, "write TensorBoard events"),
    "logging.wandb": _execution("", "project of Weights & Biases to log to as well, as WANDB_MODE says; '' is off"),
}
