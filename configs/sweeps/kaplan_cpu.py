"""Four studies after Kaplan et al. 2020, Scaling Laws for Neural Language Models (arXiv 2001.08361), on two CPU cores.

    scaling-jax sweep --config=configs/sweeps/kaplan_cpu.py:nd --workdir=runs/kaplan_nd
    scaling-jax sweep --config=configs/sweeps/kaplan_cpu.py:steps --workdir=runs/kaplan_steps
    scaling-jax sweep --config=configs/sweeps/kaplan_cpu.py:shape --workdir=runs/kaplan_shape
    scaling-jax sweep --config=configs/sweeps/kaplan_cpu.py:transfer --workdir=runs/kaplan_transfer

The first argument says which; ',small' after it makes a copy of some seconds, as in nd,small. ',prose' takes the first study's text
(configs/sweeps/prose.py), evaluates on fewer held-out tokens, and has twice that learning rate, which for models so small is nearer the
best; its `transfer` has once, twice and four times that, up to width 64 eight times too, and three other domains, tokenized likewise
with --holdout_every=0:
data/licenses_legal, data/linux_doc and data/code.

    scaling-jax sweep --config=configs/sweeps/kaplan_cpu.py:nd,prose --workdir=runs/first/kaplan_nd
    scaling-jax sweep --config=configs/sweeps/kaplan_cpu.py:transfer,prose --workdir=runs/first/kaplan_transfer
    scaling-jax sweep --config=configs/sweeps/kaplan_cpu.py:shape,prose --workdir=runs/first/kaplan_shape

Without it all use the model of their recipe
(configs/kaplan.py), its learning rate for every size, 0.003239 − 0.0001395·ln N, and the standard parametrization, on the State of the
Union messages, byte by byte, in batches of 2^10 tokens. Not theirs: a constant lr, so that one run serves all horizons.

nd: L(N, D). Four sizes on 2^14 … 2^20 tokens of the data, scattered over them, and on all 11 million, over and over, dropout 0.1, evaluated at horizons
in steps of √2 and stopped once the held-out loss has risen at two of them in a row. The loss of a point is the least over its horizons.
Cost: 32 points, at most 1.3e8 tokens and 1.2e14 FLOPs; at most 40 minutes on two CPU cores, estimated from the time of a step.
Expect, as they have it: L = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D, whose exponents here need not be theirs (0.076, 0.103); data below about N^0.74 hurt.

steps: L(N, S). Five sizes on new data all the time, at horizons 2^15 … 2^22 in steps of √2: 15 of them, 32 to 4,096 steps.
Cost: 5 points, 2.1e7 tokens, 3.6e13 FLOPs; about 14 minutes on two CPU cores, estimated from the time of a step.
Expect, as they have it: L = (N_c/N)^α_N + (S_c/S_min)^α_S; theirs are 0.077 and 0.76. What N alone gives is not reached by the largest here.

shape: N at 98,000, to 2%, in three series: depth 1 to 32 at widths 90 to 16, MLPs of 1 to 10 widths with the depth that keeps N,
and heads of 8 to 64. Two seeds.
Cost: 18 points, 3.8e7 tokens, 2.8e13 FLOPs; about 13 minutes on two CPU cores, estimated from the time of a step.
Expect, as they have it: a few percent of loss over most of it; at the ends of the series, depth 1 and 32, more.

transfer: the sizes and horizons of `steps`, with the loss on another domain, the source code of Python's standard library, beside that on
the held-out messages. Made once by

    python -c "import json, pathlib, sysconfig; [print(json.dumps({'text': p.read_text(errors='replace')})) for p in sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py'))]" > code.jsonl
    scaling-jax tokenize --input=code.jsonl --out=data/code --holdout_every=0

Cost: 5 points, 2.1e7 tokens, 3.6e13 FLOPs; about 15 minutes on two CPU cores, estimated from the time of a step.
Expect, as they have it: the loss on code is that on the messages and a nearly constant offset, whatever the size and however long it has
trained. Their domains were all English text, and code is further away: the offset may well grow instead.
"""  # noqa: E501 (a command)

import dataclasses
import runpy
from pathlib import Path

from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

RECIPE = runpy.run_path(str(Path(__file__).parents[1] / "kaplan.py"))
SIZES = ((16, 2), (32, 2), (64, 2), (128, 2), (128, 4))  # width, depth
SUBSETS = (*(1 << k for k in range(14, 21)), 0)
N = 12 * 2 * 64**2
SHAPES = (
    *((width, depth, 4.0, head_dim) for width, depth, head_dim in ((90, 1, 18), (64, 2, 16), (32, 8, 16), (16, 32, 16))),
    *((64, depth, float(ratio), 16) for ratio, depth in ((1, 4), (2, 3), (10, 1))),  # 2·depth·(2 + ratio) is 24
    *((64, 2, 4.0, head_dim) for head_dim in (8, 64)),
)  # width, depth, mlp_ratio, head_dim


def get_study(argument: str = "steps") -> Study:
    which, *others = argument.split(",")
    if which not in STUDIES or others not in ([], ["small"], ["prose"]):
        raise UserError(f"the argument is {argument!r}: must be one of {', '.join(STUDIES)}, and after it ',small', ',prose' or nothing")
    study = STUDIES[which](others == ["small"])
    return on_prose(which, study) if others == ["prose"] else study


def on_prose(which: str, study: Study) -> Study:
    config = runpy.run_path(str(Path(__file__).parent / "prose.py"))["on_prose"](study.base)
    config.eval.tokens = 1 << 15
    config.noise_scale.every = 4
    if which == "transfer":
        config.data.eval_domains = tuple(f"{name}=data/{name}" for name in ("licenses_legal", "linux_doc", "code"))
        points = grid.chain(*(sizes(SIZES, faster) for faster in (1, 2, 4)), sizes(SIZES[:3], 8))
    elif which == "shape":
        config.optimizer.lr *= 2
        points = study.grid
    else:
        points = grid.product(sizes(SIZES[:4] if which == "nd" else SIZES, 2), *subsets(which))
    return dataclasses.replace(study, grid=points)


def nd(small: bool) -> Study:
    config = base(small)
    config.model.dropout = 0.1
    config.data.repeat = True
    points = grid.product(sizes(SIZES[:1] if small else SIZES[:4]), *subsets("nd", small))
    horizons = (1 << 12, 1 << 13, 1 << 14) if small else halves_of_octaves(15, 22)
    return Study(config, points, horizons=horizons, stop_after_rises=2)


def subsets(which: str, small: bool = False) -> list[grid.Grid]:
    return [grid.over("data.train_tokens", (1 << 12, 1 << 13) if small else SUBSETS)] if which == "nd" else []


def steps(small: bool) -> Study:
    return Study(base(small), sizes(SIZES[:2] if small else SIZES), horizons=(1 << 12, 1 << 13) if small else halves_of_octaves(15, 22))


def shape(small: bool) -> Study:
    names = ("model.width", "model.depth", "model.mlp_ratio", "model.head_dim")
    shapes = ((64, 2, 4.0, 16), (64, 1, 10.0, 16)) if small else SHAPES
    points = grid.zip(*(grid.over(name, values) for name, values in zip(names, zip(*shapes, strict=True), strict=True)))
    config = base(small)
    config.optimizer.lr = RECIPE["learning_rate"](N)
    config.train.tokens = 1 << (12 if small else 21)
    return Study(config, grid.product(points, grid.over("train.seed", (0, 1))))


def transfer(small: bool) -> Study:
    study = steps(small)
    study.base.data.eval_domains = ("code=data/code",)
    return study


STUDIES = {"nd": nd, "steps": steps, "shape": shape, "transfer": transfer}


def sizes(of: tuple[tuple[int, int], ...], faster: float = 1.0) -> grid.Grid:
    """Each with the paper's learning rate for it, or so many times that."""
    return grid.zip(
        grid.over("model.width", [width for width, _ in of]),
        grid.over("model.depth", [depth for _, depth in of]),
        grid.over("optimizer.lr", [faster * RECIPE["learning_rate"](12 * depth * width**2) for width, depth in of]),
    )


def halves_of_octaves(first: int, last: int) -> tuple[int, ...]:
    """2^first … 2^last tokens in steps of √2."""
    return tuple(round(tokens) for tokens in grid.geometric(2.0**first, 2.0**last, 2**0.5))


def base(small: bool):
    config = default_config()
    config.model.head_dim = 16
    config.model.context = 64
    config.model.vocab_size = 256
    config.model.positions = "learned"
    config.model.biases = True
    config.model.norm_gains = True
    config.parametrization.name = "standard"
    config.parametrization.embedding_std = 0.02
    config.optimizer.b2 = 0.999
    config.schedule.name = "constant"
    config.schedule.warmup_tokens = 1 << (10 if small else 14)
    config.train.batch_tokens = 1 << (9 if small else 10)
    config.eval.tokens = 1 << (12 if small else 16)
    return config
