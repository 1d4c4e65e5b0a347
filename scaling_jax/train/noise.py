"""What a run measures of its gradient noise: for which groups of parameters, in which metrics, and how it is read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from scaling_jax import noise_scale
from scaling_jax.errors import UserError
from scaling_jax.model import KINDS, Probe, parameter_kind
from scaling_jax.noise_scale import NoiseScale, NoiseScaleState

PLAIN, PRECONDITIONED = "noise", "preconditioned"


class Measured(NamedTuple):
    """One step's own unbiased estimates, of all parameters; nan where it has none."""

    grad_sq: Array  # |G|²
    grad_trace: Array  # tr Σ, per sequence


class NoiseMeter:
    """Noise of the groups that a model's probe tells apart: a kind of parameters, or a kind in one block.

    Everything is a dict by metric: `noise` is tr Σ/|G|², `preconditioned` tr(PΣ)/(GᵀPG).

    Args:
      config: its section noise_scale, train.tokens, model.context, model.tied_embeddings.
      probe: as `new_probe` of the model makes it, of any batch and without a metric.
      params: of the model, abstract.

    Raises:
      UserError: the probe has no entry for some parameter, or not one for each of its blocks.
    """

    def __init__(self, config: ConfigDict, probe: Probe, params: nnx.State):
        section = config.noise_scale
        self.metrics = (PLAIN, PRECONDITIONED) if section.preconditioned else (PLAIN,)
        self.window_tokens = float(section.window_tokens or config.train.tokens / 8)
        self.decay_tokens = float(section.decay_tokens) or None
        self.context = config.model.context
        self.kinds = tuple(kind for kind in KINDS if kind in probe)
        self.blocks = {kind: probe[kind].shape[0] if probe[kind].ndim == 2 else 0 for kind in self.kinds}  # 0: of the whole model
        self.groups = [(kind, block) for kind in self.kinds for block in (range(self.blocks[kind]) or [None])]
        self.tied = config.model.tied_embeddings
        _check_fit(self.blocks, params, self.tied)
        self.depth = max(self.blocks.values())
        self._read = jax.jit(self.read)

    def init(self) -> dict[str, NoiseScaleState]:
        return {metric: noise_scale.estimator.init(len(self.groups)) for metric in self.metrics}

    def of_sequences(self, cotangent: Probe) -> Array:
        """The probe's cotangent as [B, G], or [B, G, 2] with a metric."""
        columns = [cotangent[kind].swapaxes(0, 1) if self.blocks[kind] else cotangent[kind][:, None] for kind in self.kinds]
        return jnp.concatenate(columns, axis=1)

    def of_gradient(self, grads: nnx.State, metric: nnx.State | None = None) -> Array:
        """‖G‖² of each group [G]; in a metric Σ P·G²."""
        sums = {kind: jnp.zeros(blocks or 1, jnp.float32) for kind, blocks in self.blocks.items()}
        weights = dict(nnx.to_flat_state(metric)) if metric is not None else {}
        for path, grad in nnx.to_flat_state(grads):
            kind = parameter_kind(path, self.tied)
            grad_N = grad[...] if self.blocks[kind] else grad[...][None]  # not flattened: that would gather what is sharded
            other_N = grad_N if metric is None else weights[path][...].astype(jnp.float32).reshape(grad_N.shape) * grad_N
            # Products, not squares: those are in the norm that clips already, and XLA's CPU backend would write them down for both.
            axes = "nabcdefgh"[: grad_N.ndim]
            sums[kind] += jnp.einsum(f"{axes},{axes}->n", grad_N, other_N, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate(list(sums.values()))

    def update(
        self, states: dict[str, NoiseScaleState], sq_norms_BxGxM: Array, grad_sq_GxM: Array, tokens: float, first: Array
    ) -> tuple[dict[str, NoiseScaleState], dict[str, Measured]]:
        """Adds one step, M metrics, with the weight of its tokens; the `first` of a run has no moments and so no metric."""
        new, measured = {}, {}
        for i, metric in enumerate(self.metrics):
            estimates = noise_scale.estimates(sq_norms_BxGxM[:, :, i], grad_sq_GxM[:, i])
            state = noise_scale.estimator.update(states[metric], tokens, *estimates, self.window_tokens)
            total = [x_G.sum() for x_G in estimates]
            if metric == PRECONDITIONED:
                state = jax.tree.map(lambda old, new: jnp.where(first, old, new), states[metric], state)
                total = [jnp.where(first, jnp.nan, x) for x in total]
            new[metric], measured[metric] = state, Measured(*total)
        return new, measured

    def read(self, states: dict[str, NoiseScaleState]) -> dict[str, NoiseScale]:
        """Over the window: each kind, in the order of `kinds`; each block, its kinds together; last all."""
        by_kind = [[kind == k for kind, _ in self.groups] for k in self.kinds]
        by_block = [[block == b for _, block in self.groups] for b in range(self.depth)]
        sums_RxG = np.array([*by_kind, *by_block, [True] * len(self.groups)], float)
        return {
            metric: noise_scale.estimator.read(state, self.window_tokens, sums_RxG, decay_tokens=self.decay_tokens)
            for metric, state in states.items()
        }

    def read_tokens(self, states: dict[str, NoiseScaleState]) -> dict[str, tuple[float | None, float | None, float | None]]:
        """Of all parameters, (value, low, high) in tokens; None where unknown or, for high, unbounded."""
        return self.in_tokens(jax.device_get(self._read(states)))

    def in_tokens(self, readings: dict[str, NoiseScale]) -> dict[str, tuple[float | None, float | None, float | None]]:
        """The same of what `read` gave."""
        found = {}
        for metric, reading in readings.items():
            ends = (float(x[-1]) * self.context for x in (reading.sequences, reading.low, reading.high))
            found[metric] = tuple(end if np.isfinite(end) else None for end in ends)
        return found


def _check_fit(blocks: dict[str, int], params: nnx.State, tied: bool) -> None:
    for path, param in nnx.to_flat_state(params):
        kind, name = parameter_kind(path, tied), ".".join(map(str, path))
        if kind not in blocks:
            raise UserError(f"the model's new_probe has no entry {kind!r}, where parameter {name} belongs; it has {', '.join(blocks)}")
        if blocks[kind] and (param.ndim < 2 or param.shape[0] != blocks[kind]):
            raise UserError(
                f"parameter {name} {param.shape} belongs to {kind!r}, for which the model's new_probe has {blocks[kind]} blocks: "
                "must have as many along its first axis, or be of a kind that is not measured by block"
            )
