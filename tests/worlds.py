"""A planted world: the results table of a study whose laws are known.

    world = World()                       # a design like that of configs/sweeps/time_transfer_cpu.py: 216 points, 6 horizons
    table = world.table(seed=0)           # a DataFrame with the columns of results.COLUMNS
    world.best_lr(batch, tokens, width)   # and the truth
    World(form="plateau", batches=(2048.0,)).table()

    L = (E + A/N^α + D/T^β) · exp(κ·(ln B/B*(T))² + ½·s(T)·(ln η/η*(B, T))²)

with η*(B, T) of one of three forms; a run that is above its lr of divergence stays diverged from that horizon on. A run's horizons share
most of its noise, as those of a constant lr do.
"""

import dataclasses

import numpy as np
import pandas

TOKENS = 2.0**19.5  # T0 of every power law here
PARAMS = 5e4  # N0


@dataclasses.dataclass(frozen=True)
class World:
    """The design of a study and the laws behind it. Batch sizes, horizons and critical batch sizes in tokens."""

    widths: tuple[int, ...] = (32, 64)
    depth: int = 2
    batches: tuple[float, ...] = tuple(2.0**k for k in range(8, 14))
    horizons: tuple[float, ...] = tuple(2.0**k for k in range(17, 23))
    seeds: int = 2
    lrs: tuple[float, ...] | None = None  # the same for every batch; else `lrs_each` in steps of √2 around the best one at T0
    lrs_each: int = 9
    grid_off: float = 1.0  # the middle of that grid over the best lr; far from 1 puts minima at the edge
    parametrization: str = "mup"
    schedule: str = "constant"
    vocab_size: int = 256

    floor: float = 1.0  # E, nats per token
    params_term: float = 22.0  # A
    params_exponent: float = 0.34
    tokens_term: float = 45.0
    tokens_exponent: float = 0.28

    form: str = "surge"  # of η*(B): surge, plateau or power
    lr_crit: float = 0.012  # at T0 (and N0); of "power": η* at B = 2048
    lr_tokens_exponent: float = -0.15
    lr_params_exponent: float = 0.0  # used under standard parametrization only
    batch_crit: float = 2048.0  # B_crit at T0
    batch_tokens_exponent: float = 0.6
    batch_exponent: float = 0.4  # of "power" only

    batch_best: float = 1400.0  # B* at T0
    best_tokens_exponent: float = 0.45
    batch_curvature: float = 0.004  # κ

    sensitivity: float = 0.06  # s at T0: ∂² ln L / ∂(ln η)²
    sensitivity_exponent: float = -0.15
    diverge: float = 5.0  # times η*, beyond which a run diverges

    noise_scale: float = 3000.0  # at T0, or at a loss of 3
    noise_law: str = "tokens"  # T^noise_exponent, or "loss": (L/3)^-noise_exponent
    noise_exponent: float = 0.5
    noise_sd: float = 0.05  # of its logarithm

    run_sd: float = 1e-3  # relative, of a run's losses together
    row_sd: float = 3e-4  # of each row by itself

    def params(self, width: float) -> float:
        return 12.0 * self.depth * width**2

    def critical_batch(self, tokens):
        return self.batch_crit * (np.asarray(tokens, float) / TOKENS) ** self.batch_tokens_exponent

    def best_lr(self, batch, tokens, width=None):
        """η*(B, T), and of N under standard parametrization."""
        batch, tokens = np.asarray(batch, float), np.asarray(tokens, float)
        top = self.lr_crit * (tokens / TOKENS) ** self.lr_tokens_exponent
        if self.parametrization == "standard" and width is not None:
            top = top * (self.params(width) / PARAMS) ** self.lr_params_exponent
        ratio = batch / self.critical_batch(tokens)
        if self.form == "surge":
            return top * 2 / (np.sqrt(ratio) + 1 / np.sqrt(ratio))
        if self.form == "plateau":
            return top / np.sqrt(1 + 1 / ratio)
        return top * (batch / 2048.0) ** self.batch_exponent

    def best_batch(self, tokens):
        return self.batch_best * (np.asarray(tokens, float) / TOKENS) ** self.best_tokens_exponent

    def curvature(self, tokens):
        """s(T), of ln L in ln η."""
        return self.sensitivity * (np.asarray(tokens, float) / TOKENS) ** self.sensitivity_exponent

    def least_loss(self, tokens, params):
        """L at the best lr and batch size."""
        return (
            self.floor
            + self.params_term / np.asarray(params, float) ** self.params_exponent
            + self.tokens_term / np.asarray(tokens, float) ** self.tokens_exponent
        )

    def loss(self, batch, tokens, lr, width):
        off_batch = np.log(np.asarray(batch, float) / self.best_batch(tokens))
        off_lr = np.log(np.asarray(lr, float) / self.best_lr(batch, tokens, width))
        penalty = self.batch_curvature * off_batch**2 + 0.5 * self.curvature(tokens) * off_lr**2
        return self.least_loss(tokens, self.params(width)) * np.exp(penalty)

    def true_noise_scale(self, tokens, loss):
        """tr Σ / |G|², tokens."""
        if self.noise_law == "tokens":
            return self.noise_scale * (np.asarray(tokens, float) / TOKENS) ** self.noise_exponent
        return self.noise_scale * (np.asarray(loss, float) / 3.0) ** -self.noise_exponent

    def grid(self, batch: float, width: int) -> np.ndarray:
        """Learning rates that are tried."""
        if self.lrs is not None:
            return np.asarray(self.lrs, float)
        nearest = np.round(2 * np.log2(self.grid_off * self.best_lr(batch, TOKENS, width)))
        return 2.0 ** ((nearest + np.arange(self.lrs_each) - self.lrs_each // 2) / 2)

    def table(self, seed: int = 0) -> pandas.DataFrame:
        """A row for each point and horizon, as results.load gives them."""
        rng, rows = np.random.default_rng(seed), []
        tokens_T = np.sort(np.asarray(self.horizons, float))
        for width in self.widths:
            for batch in self.batches:
                for member in range(self.seeds):
                    for lr in self.grid(batch, width):
                        rows += self._run(rng, width, batch, member, float(lr), tokens_T)
        table = pandas.DataFrame(rows)
        for name in ("horizon_tokens", "tokens", "params", "total_params", "width", "depth", "seed", "vocab_size"):
            table[name] = table[name].astype("int64")
        return table

    def _run(self, rng, width, batch, member, lr, tokens_T):
        params = self.params(width)
        true_T = self.loss(batch, tokens_T, lr, width)
        loss_T = true_T * np.exp(self.run_sd * rng.normal() + self.row_sd * rng.normal(size=len(tokens_T)))
        noise_T = self.true_noise_scale(tokens_T, true_T) * np.exp(self.noise_sd * rng.normal(size=len(tokens_T)))
        diverged_T = np.cumsum(lr > self.diverge * self.best_lr(batch, tokens_T, width)) > 0
        name = f"w{width}-b{batch:g}-s{member}-lr{lr:.4g}"
        shared = {
            "point": name, "group": f"w{width}-b{batch:g}", "params": params, "total_params": params + self.vocab_size * width,
            "width": width, "depth": self.depth, "head_dim": 16, "context": 64, "vocab_size": self.vocab_size, "batch_tokens": batch,
            "lr": lr, "weight_decay": 0.0, "seed": member, "parametrization": self.parametrization, "schedule": self.schedule,
            "warmup_tokens": 2**14, "data_tokens": 0, "data": "planted",
        }  # fmt: skip
        rows = []
        for tokens, loss, noise, diverged in zip(tokens_T, loss_T, noise_T, diverged_T, strict=True):
            own = {"horizon_tokens": tokens, "tokens": tokens, "flops": 6 * params * tokens, "seconds": tokens / 1e5}
            if diverged:
                own |= {"status": "diverged", "reason": "loss is not finite", "loss": np.nan, "loss_stderr": np.nan}
                own |= {f"noise_scale_tokens{end}": np.nan for end in ("", "_low", "_high")}
            else:
                half = np.exp(1.96 * self.noise_sd)
                own |= {"status": "finished", "reason": None, "loss": loss, "loss_stderr": self.row_sd * loss, "train_loss": loss}
                own |= {"bits_per_byte": loss / np.log(2), "noise_scale_tokens": noise}
                own |= {"noise_scale_tokens_low": noise / half, "noise_scale_tokens_high": noise * half}
            rows.append(shared | own)
        return rows
