"""The demo: a 0.6M-parameter μP transformer on the State of the Union messages, byte by byte.

    scaling-jax train --config=configs/cpu_demo.py --workdir=runs/demo

Cost: little over a minute on two CPU cores. Expect a held-out loss below 2.0 bits per byte, and a noise
scale that rises from about a hundred tokens to above ten thousand, past the batch size, while the model learns.
"""

from scaling_jax.config import default_config


def get_config():
    config = default_config()
    config.model.width = 128
    config.model.depth = 3
    config.model.head_dim = 32
    config.model.context = 64
    config.model.vocab_size = 256
    config.model.mlp = "swiglu"
    config.model.mlp_ratio = 8 / 3
    config.parametrization.base_width = 128
    config.parametrization.base_depth = 3
    config.optimizer.lr = 4e-3
    config.schedule.name = "cosine"
    config.schedule.warmup_tokens = 50_000
    config.schedule.final_lr_fraction = 0.1
    config.train.tokens = 1_600_000
    config.train.batch_tokens = 16 * 64
    config.noise_scale.window_tokens = 100_000
    config.eval.every_tokens = 800_000
    config.eval.tokens = 24 * 1024
    config.eval.batch_sequences = 32
    config.checkpoint.every_tokens = 800_000
    return config
