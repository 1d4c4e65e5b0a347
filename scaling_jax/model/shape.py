"""The shape of a model, and what follows from it."""

import dataclasses

from scaling_jax.config import mlp_width
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of the model. Units and meanings as in `scaling_jax.fields.FIELDS`, section model.

    With `for_cpu` the same function is written as XLA's CPU backend runs it fast (`scaling_jax.model.cpu`, `scaling_jax.model.stack`); it
    has no forward-mode derivatives then, and of products only the operands are in compute_dtype.
    """

    vocab_size: int
    width: int
    depth: int
    head_dim: int
    context: int
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    tied_embeddings: bool = False
    biases: bool = False
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    kv_heads: int = 0
    norm_gains: bool = False
    qk_norm: bool = False
    shared_depth: bool = False
    dropout: float = 0.0
    compute_dtype: str = "float32"
    attention: str = "einsum"
    remat: str = "none"
    loss_chunk_tokens: int = 0
    for_cpu: bool = False

    def __post_init__(self):
        if self.width % self.head_dim:
            raise UserError(f"head_dim is {self.head_dim}: must divide width, {self.width}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: must be even, for rotary positions")
        if self.kv_heads and self.heads % self.kv_heads:
            raise UserError(f"kv_heads is {self.kv_heads}: must divide the {self.heads} heads, width / head_dim")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: must be at least 0 and less than 1")
        if self.attention != "einsum" and (self.context % 128 or self.dropout):
            raise UserError(f"attention is {self.attention!r}: needs a context that is a multiple of 128 ({self.context}), and no dropout")
        kernels = ("einsum", "splash", "splash_interpreted")
        for name in ("mlp", "positions", "remat", "attention"):
            value, choices = getattr(self, name), kernels if name == "attention" else FIELDS[f"model.{name}"].choices
            if value not in choices:
                raise UserError(f"{name} is {value!r}: must be one of {', '.join(choices)}")

    @property
    def activation_dtype(self) -> str:
        """Of what lies between products. On CPU only their operands are rounded: each rounding takes as long as the arithmetic does."""
        return "float32" if self.for_cpu else self.compute_dtype

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def mlp_width(self) -> int:
        return mlp_width(self.width, self.mlp_ratio)

    @property
    def blocks(self) -> int:
        """Blocks that have parameters of their own."""
        return 1 if self.shared_depth else self.depth

    @property
    def flops_per_token(self) -> int:
        """Forward and backward: 6·N, a shared block's at every use, plus 12·depth·context·width of attention without the causal saving."""
        return 6 * self.params * (self.depth // self.blocks) + 12 * self.depth * self.context * self.width

    @property
    def causal_flops_per_token(self) -> int:
        """As `flops_per_token`, but of attention only what causality leaves: (context + 1) / 2 keys a token."""
        return self.flops_per_token - 6 * self.depth * (self.context - 1) * self.width

    @property
    def params(self) -> int:
        """N, non-embedding parameters (Kaplan et al. 2020), biases and gains not counted; a shared block counts once."""
        mlp_matrices = 3 if self.mlp == "swiglu" else 2
        return self.blocks * (2 * self.width * (self.width + self.kv_width) + mlp_matrices * self.width * self.mlp_width)
