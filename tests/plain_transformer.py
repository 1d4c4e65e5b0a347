"""What the model is compared with: the transformer for one sequence in plain JAX, without scan, probe or any module of the package."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict


def plain_loss(params, multipliers, config: ConfigDict, tokens_L, key=None):
    """Mean cross-entropy of one sequence of context + 1 tokens.

    Args:
      params: arrays by name; those of the blocks with a leading axis.
      multipliers: of attention logits, residual branches and logits.
      config: section `model`.
      tokens_L: the sequence.
      key: of its dropout; None drops nothing.
    """
    attention_scale, branch, logit = multipliers
    length, heads = len(tokens_L) - 1, config.width // config.head_dim
    groups = config.kv_heads or heads

    def normed(x_LxD, gain=None):
        x_LxD = x_LxD / jnp.sqrt(jnp.mean(x_LxD**2, axis=-1, keepdims=True) + 1e-6)
        return x_LxD if gain is None else x_LxD * jnp.broadcast_to(gain, x_LxD.shape)

    def dropped(x, block, site):
        if key is None:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, block), site), 1 - config.dropout, x.shape)
        return x * kept.astype(x.dtype) / (1 - config.dropout)

    def turned(x_LxK):
        """Pairs (i, i + K/2) as complex numbers, times exp(i·position/theta^(2i/K))."""
        half = config.head_dim // 2
        angle_LxK = np.outer(np.arange(length), config.rope_theta ** -(np.arange(half) / half))
        z_LxK = jax.lax.complex(x_LxK[:, :half], x_LxK[:, half:]) * np.exp(1j * angle_LxK).astype(np.complex64)
        return jnp.concatenate([z_LxK.real, z_LxK.imag], axis=1)

    x_LxD = params["embedding"][tokens_L[:-1]]
    if config.positions == "learned":
        x_LxD = x_LxD + params["position_embedding"][:length]
    x_LxD = dropped(x_LxD, config.depth, 0)
    for block in range(config.depth):
        w = {name: x[0 if config.shared_depth else block] for name, x in params.items() if name not in OUTSIDE}

        def linear(name, x_LxI, w=w):
            y_LxO = x_LxI @ w[name]
            return y_LxO + w[f"{name}_bias"][None] if f"{name}_bias" in w else y_LxO

        h_LxD = normed(x_LxD, w.get("attention_gain"))
        q_LxHK, k_LxGK, v_LxGK = (linear(name, h_LxD) for name in ("query", "key", "value"))
        outputs, weights = [], []
        for head in range(heads):
            of_group = head // (heads // groups)
            q_LxK = q_LxHK[:, head * config.head_dim : (head + 1) * config.head_dim]
            k_LxK = k_LxGK[:, of_group * config.head_dim : (of_group + 1) * config.head_dim]
            if config.qk_norm:
                q_LxK, k_LxK = normed(q_LxK, w.get("query_gain")), normed(k_LxK, w.get("key_gain"))
            if config.positions == "rotary":
                q_LxK, k_LxK = turned(q_LxK), turned(k_LxK)
            logits_LxM = jnp.where(jnp.tri(length, dtype=bool), attention_scale * q_LxK @ k_LxK.T, -jnp.inf)
            weights.append(jax.nn.softmax(logits_LxM))
        for head, weights_LxM in enumerate(dropped(jnp.stack(weights), block, 0)):
            of_group = head // (heads // groups)
            outputs.append(weights_LxM @ v_LxGK[:, of_group * config.head_dim : (of_group + 1) * config.head_dim])
        x_LxD = x_LxD + branch * dropped(linear("attention_out", jnp.concatenate(outputs, axis=1)), block, 1)

        h_LxD = normed(x_LxD, w.get("mlp_gain"))
        inner_LxF = linear("mlp_in", h_LxD)
        if config.mlp == "swiglu":
            gate_LxF = linear("mlp_gate", h_LxD)
            inner_LxF = inner_LxF * gate_LxF / (1 + jnp.exp(-gate_LxF))
        elif config.mlp == "relu2":
            inner_LxF = jnp.maximum(inner_LxF, 0) ** 2
        else:
            inner_LxF = inner_LxF * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (inner_LxF + 0.044715 * inner_LxF**3))) / 2
        x_LxD = x_LxD + branch * dropped(linear("mlp_out", inner_LxF), block, 2)

    read_out = params["embedding"].T if config.tied_embeddings else params["unembedding"]
    logits_LxV = logit * normed(x_LxD, params.get("final_gain")) @ read_out
    return jnp.mean(jax.nn.logsumexp(logits_LxV, axis=1) - logits_LxV[jnp.arange(length), tokens_L[1:]])


OUTSIDE = ("embedding", "position_embedding", "unembedding", "final_gain")
