"""How init, learning rate, weight decay, epsilon and forward multipliers move with width and depth: one table each.

Every parameter carries a role, its fan-in and its fan-in at the base sizes; the table says the rest, in terms of

    m = fan_in / base_fan_in          n = width / base_width          k = depth / base_depth

and everything is 1 at the base sizes, where `mup` and `completep` equal `standard`. A parameter without a role is an error.

`mup`: Tensor Programs V (arXiv 2203.03466), Table 8, with the readout as microsoft/mup has it (constant variance, multiplier 1/m),
attention logits q·k/head_dim, and Adam's epsilon in proportion to the gradient's entries, which shrink as 1/n.
`completep`: arXiv 2505.01618, residual branches times k^-α; its repository's factors for hidden lr, weight decay and epsilon.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from scaling_jax.errors import UserError

ROLES = ("embedding", "hidden", "output", "vector")


class Sizes(NamedTuple):
    """What a rule may depend on."""

    fan_in: int
    m: float  # fan_in / base_fan_in
    n: float  # width / base_width
    k: float  # depth / base_depth
    alpha: float  # depth_exponent


class Rule(NamedTuple):
    """One row as it applies to one parameter: init_std absolute, the others relative to the config's value."""

    init_std: float
    lr: float = 1.0
    weight_decay: float = 1.0  # on top of lr: shrinkage per step is lr·weight_decay
    eps: float = 1.0
    multiplier: float = 1.0  # of the layer's output, in the forward pass


def _flat(_: Sizes) -> float:
    return 1.0


class _Row(NamedTuple):
    init: Callable[[Sizes], float]  # over the role's configured std
    lr: Callable[[Sizes], float] = _flat
    eps: Callable[[Sizes], float] = _flat
    multiplier: Callable[[Sizes], float] = _flat


def _root_fan_in(s: Sizes) -> float:
    return s.fan_in**-0.5


def _root_base_fan_in(s: Sizes) -> float:
    return (s.fan_in / s.m) ** -0.5


def _per_width(s: Sizes) -> float:
    return 1 / s.n


_TABLES: dict[str, dict[str, _Row]] = {
    "standard": {
        "embedding": _Row(_flat),
        "hidden": _Row(_root_fan_in),
        "output": _Row(_root_fan_in),
        "vector": _Row(_flat),
    },
    "mup": {
        "embedding": _Row(_flat, eps=_per_width),
        "hidden": _Row(_root_fan_in, lr=lambda s: 1 / s.m, eps=_per_width),
        "output": _Row(_root_base_fan_in, multiplier=lambda s: 1 / s.m, eps=_per_width),
        "vector": _Row(_flat, eps=_per_width),
    },
    "completep": {
        "embedding": _Row(_flat, eps=_per_width),
        "hidden": _Row(_root_fan_in, lr=lambda s: s.k ** (s.alpha - 1) / s.m, eps=lambda s: s.k**-s.alpha / s.n),
        "output": _Row(_root_base_fan_in, multiplier=lambda s: 1 / s.m, eps=_per_width),
        "vector": _Row(_flat, lr=lambda s: s.k ** (s.alpha - 1), eps=lambda s: s.k**-s.alpha / s.n),
    },
}


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """A table together with the base sizes that it is measured against.

    Attributes:
      name: 'standard', 'mup' or 'completep'.
      base_width, base_depth, base_head_dim: sizes at which every multiplier is 1.
      depth_exponent: α of the residual branch's multiplier (depth / base_depth)^-α; completep only.
      embedding_std: init std of embeddings.
      hidden_std: init std of hidden and output matrices, times sqrt(fan_in).
      output_init: 'zero' or 'normal', of an untied unembedding.
      decay_mode: 'independent' (shrinkage per step the same at every width) or 'coupled' (it follows the parameter's lr).
    """

    name: str = "standard"
    base_width: int = 128
    base_depth: int = 1
    base_head_dim: int = 32
    depth_exponent: float = 1.0
    embedding_std: float = 1.0
    hidden_std: float = 1.0
    output_init: str = "normal"
    decay_mode: str = "independent"

    def __post_init__(self):
        if self.name not in _TABLES:
            raise UserError(f"parametrization {self.name!r}: must be one of {', '.join(_TABLES)}")

    def rule(self, role: str, *, fan_in: int, base_fan_in: int, width: int, depth: int) -> Rule:
        """The row for one parameter; UserError for a role that the table does not have."""
        row = _TABLES[self.name].get(role)
        if row is None:
            raise UserError(f"role {role!r}: must be one of {', '.join(ROLES)}")
        sizes = Sizes(fan_in, fan_in / base_fan_in, width / self.base_width, depth / self.base_depth, self.depth_exponent)
        std = {"embedding": self.embedding_std, "vector": 0.0}.get(role, self.hidden_std)
        if role == "output" and self.output_init == "zero":
            std = 0.0
        lr = row.lr(sizes)
        decay = 1 / lr if self.decay_mode == "independent" else 1.0
        return Rule(std * row.init(sizes), lr, decay, row.eps(sizes), row.multiplier(sizes))

    def residual_multiplier(self, depth: int) -> float:
        """Of every residual branch's output."""
        return (depth / self.base_depth) ** -self.depth_exponent if self.name == "completep" else 1.0

    def attention_scale(self, head_dim: int) -> float:
        """Of q·k: 1/sqrt(head_dim) in `standard`, else 1/head_dim times what makes both agree at base_head_dim."""
        if self.name == "standard":
            return head_dim**-0.5
        return self.base_head_dim**0.5 / head_dim
