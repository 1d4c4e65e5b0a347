"""The study of Time Transfer (arXiv 2410.05838): its three models over learning rate, batch size and token budget, on a TPU slice for each group.

    scaling-jax sweep --config=configs/sweeps/time_transfer.py --workdir=gs://BUCKET/time_transfer --engine=ray --config.data.path=DATA --config.data.tokenizer=FILE
    scaling-jax sweep --config=configs/sweeps/time_transfer.py --dry_run --topology=v5e:2x4

The argument chooses models: 32m, 101m, 354m, or several, as in 32m,101m; without it all three. The recipe is that of configs/time_transfer.py,
which says what of it is known. DATA is what `scaling-jax tokenize` made of C4 with GPT-2's tokenizer, whose vocabulary files FILE names; one
pass takes 8.6e9 tokens of it.

Theirs: learning rates 2^-12 … 2^-7 in steps of √2 (11), six batch sizes, eight token budgets, three sizes under μP. Not known, and chosen
here: the batches, 2^14 … 2^24 tokens in steps of 4, since the best ones that reviews report are 2^18 and 2^20 and nothing between; the
budgets, 2^26 … 2^33; one seed. The lr is constant after 10M tokens of warmup, whatever batch and budget, so that one run serves all eight.
At the largest batch the first budgets are 4 and 8 steps away and say little: reviews have theirs lost at some batches too.

A group is four members on 8 chips, two chips a member: of eleven learning rates 4, 4 and 3. A microbatch is 2^14 tokens of every member.
Compute in bfloat16. Any slice of 8 chips with 16 GB each will do; v5e:2x4 was compiled for.

Cost: 198 points, 1.7e12 tokens, 1.7e21 FLOPs, in 54 groups of 8 chips: 6,300 v5e chip-hours were the model-FLOPs utilisation 40%, empty
places of groups of three counted; 3,700 at the very least, by the compiled steps (16, 42 and 148 for a group of each size, with 1.7, 4.3 and
8.6 GB of a chip's 16.9 GB). Nothing of it was ever run.
Expect: unknown; that is the question. Its first version found η* ∝ √T, 1 and 1/√T in turn, by B against a B_crit ∝ T, its second withdrew
the three regimes and kept B_crit ∝ T; later papers find B* and B_crit ∝ T^0.4 … T^0.6, and some of them no turn at large batches at all.
"""  # noqa: E501 (commands)

import runpy
from pathlib import Path

from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

RECIPE = runpy.run_path(str(Path(__file__).parents[1] / "time_transfer.py"))
LRS = grid.geometric(2**-12, 2**-7, 2**0.5)
BATCHES = tuple(1 << k for k in range(14, 25, 2))
HORIZONS = tuple(1 << k for k in range(26, 34))
MICROBATCH_TOKENS = 1 << 14
MEMBERS, CHIPS = 4, 8


def get_study(argument: str = "") -> Study:
    sizes = argument.split(",") if argument else [*RECIPE["WIDTHS"]]
    if not set(sizes) <= set(RECIPE["WIDTHS"]) or len(set(sizes)) < len(sizes):
        raise UserError(f"the argument is {argument!r}: must be one or several of {', '.join(RECIPE['WIDTHS'])}, each once")
    models = grid.zip(
        grid.over("model.width", [RECIPE["WIDTHS"][size] for size in sizes]),
        grid.over("model.remat", ["full" if size == "354m" else "dots" for size in sizes]),
    )
    batches = grid.zip(
        grid.over("train.batch_tokens", BATCHES),
        grid.over("train.accumulation", [batch // MICROBATCH_TOKENS for batch in BATCHES]),
    )
    config = RECIPE["get_config"](sizes[0])
    config.model.compute_dtype = "bfloat16"
    config.mesh.replica, config.mesh.fsdp = CHIPS // MEMBERS, 1
    config.noise_scale.window_tokens = 0  # the later half of what was seen
    config.data.verify = False  # reads all of it
    points = grid.product(models, batches, grid.over("optimizer.lr", LRS))
    return Study(config, points, horizons=HORIZONS, tpus=CHIPS, max_members=MEMBERS)
