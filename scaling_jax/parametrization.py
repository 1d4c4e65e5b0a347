"""How init, learning rate, weight decay, epsilon and forward multipliers move with width and depth: one table.

Every parameter carries a role, its fan-in and its fan-in at the base sizes; the role's row says the rest, in terms of

    m = fan_in / base_fan_in          n = width / base_width          k = depth / base_depth          α = depth_exponent

Everything is 1 at the base sizes, where `mup` and `completep` are `standard`, bit for bit. A parameter without a role is an error.
docs/parametrization.md explains the rows; `scaling-jax coord-check` measures whether a model obeys them.

Roles: `embedding`, a matrix or vector read by token or position; `tied`, an embedding that is the unembedding too; `hidden`, a
matrix from width to width; `query`, the hidden matrix that makes queries; `output`, the unembedding; `vector`, a gain or bias
within a residual branch; `final_vector`, one outside.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from scaling_jax.errors import UserError

_LECUN = "variance 1/fan_in keeps a matrix's output as large as its input (LeCun et al. 1998)"
_TP5 = "Tensor Programs V (arXiv 2203.03466), Table 8"
_TP5_TIED = "constant variance and 1/width: microsoft/mup, MuSharedReadout. That it is 1/base_width is ours, for a first loss near log V"
_MUREADOUT = f"{_TP5}, with microsoft/mup's constant variance, or 0 as recommended there"
_ONE_OVER_D = "Tensor Programs V: q·k/head_dim, times what makes it 1/sqrt(head_dim) at base_head_dim (microsoft/mup)"
_EPS = "epsilon as the gradient's entries, 1/width (CompleteP, eq. 40; nanoGPT-mup)"
_COMPLETEP = "CompleteP (arXiv 2505.01618; epsilon: eq. 40); EleutherAI/nanoGPT-mup, branch completep"


class Sizes(NamedTuple):
    """What a row may depend on."""

    fan_in: int
    base_fan_in: int
    width: int
    base_width: int
    k: float = 1.0  # depth / base_depth
    alpha: float = 1.0  # depth_exponent

    @property
    def m(self) -> float:
        return self.fan_in / self.base_fan_in

    @property
    def n(self) -> float:
        return self.width / self.base_width


class Rule(NamedTuple):
    """A row as it applies to one parameter: init_std absolute, the others relative to the config's value."""

    init_std: float
    lr: float = 1.0
    weight_decay: float = 1.0  # on top of lr: shrinkage per step is lr·weight_decay
    eps: float = 1.0
    multiplier: float = 1.0  # of the layer's output, in the forward pass


def _one(_: Sizes) -> float:
    return 1.0


class Row(NamedTuple):
    """How one role's values depend on the sizes; `init` is over the role's configured std, `decay` holds for `independent`."""

    source: str
    init: Callable[[Sizes], float] = _one
    lr: Callable[[Sizes], float] = _one
    decay: Callable[[Sizes], float] = _one
    eps: Callable[[Sizes], float] = _one
    multiplier: Callable[[Sizes], float] = _one


def _root_fan_in(s: Sizes) -> float:
    return s.fan_in**-0.5


def _root_base_fan_in(s: Sizes) -> float:
    return s.base_fan_in**-0.5


def _none(_: Sizes) -> float:
    return 0.0


def _over_m(s: Sizes) -> float:
    return 1 / s.m


def _over_n(s: Sizes) -> float:
    return 1 / s.n


def _m(s: Sizes) -> float:
    return s.m


def _branch(s: Sizes) -> float:  # k^-α, the residual branch's multiplier, and so its gradients'
    return s.k**-s.alpha


def _branch_lr(s: Sizes) -> float:
    return s.k ** (s.alpha - 1)


_STANDARD = {
    "embedding": Row("constant, as is usual"),
    "tied": Row(_LECUN + ", seen as readout", init=lambda s: s.width**-0.5),
    "hidden": Row(_LECUN, init=_root_fan_in),
    "output": Row(_LECUN, init=_root_fan_in),
    "vector": Row("gains start at 1 and biases at 0; neither decays (nanoGPT)", decay=_none),
}
_MUP = {
    "embedding": Row(f"{_TP5}; {_EPS}", eps=_over_n),
    "tied": Row(_TP5_TIED, init=lambda s: s.base_width**-0.5, eps=_over_n, multiplier=_over_n),
    "hidden": Row(f"{_TP5}; {_EPS}", init=_root_fan_in, lr=_over_m, decay=_m, eps=_over_n),
    "output": Row(
        f"{_MUREADOUT}; {_EPS}",
        init=_root_base_fan_in,
        eps=_over_n,
        multiplier=_over_m,
    ),
    "vector": Row(f"{_TP5}; no decay (nanoGPT-mup); {_EPS}", decay=_none, eps=_over_n),
}
_COMPLETE = {
    "hidden": Row(
        _COMPLETEP,
        init=_root_fan_in,
        lr=lambda s: _branch_lr(s) / s.m,
        decay=_m,
        eps=lambda s: _branch(s) / s.n,
    ),
    "vector": Row(_COMPLETEP, lr=_branch_lr, decay=_none, eps=lambda s: _branch(s) / s.n),
    "final_vector": _MUP["vector"],
    "residual_branch": Row(_COMPLETEP, multiplier=_branch),
}


def _whole(rows: dict[str, Row], attention: Row) -> dict[str, Row]:
    """The rows with those that follow from others: queries are hidden, what acts outside the blocks knows no depth."""
    defaults = {
        "query": rows["hidden"]._replace(source=rows["hidden"].source + "; or init 0 (Tensor Programs V; microsoft/mup)"),
        "final_vector": rows["vector"],
        "residual_branch": Row("not scaled"),
        "attention_logits": attention,
    }
    return defaults | rows


# Here fan_in is head_dim, and the multiplier is over 1/sqrt(head_dim).
_TP5_ATTENTION = Row(
    "Tensor Programs V: q·k/head_dim, times what makes it 1/sqrt(head_dim) at base_head_dim (microsoft/mup)", multiplier=lambda s: s.m**-0.5
)

TABLE: dict[str, dict[str, Row]] = {
    "standard": _whole(_STANDARD, Row("q·k/sqrt(head_dim) (Vaswani et al. 2017)")),
    "mup": _whole(_MUP, _TP5_ATTENTION),
    "completep": _whole(_MUP | _COMPLETE, _TP5_ATTENTION),
}
ROLES = ("embedding", "tied", "hidden", "query", "output", "vector", "final_vector")


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """A part of the table together with the base sizes that it is measured against.

    Attributes:
      name: 'standard', 'mup' or 'completep'.
      base_width, base_head_dim: sizes at which every multiplier is 1.
      base_depth: the same for depth; only completep reads it, and must be given it (0 is not given).
      depth_exponent: α of the residual branch's multiplier (depth / base_depth)^-α; completep only.
      embedding_std: init std of embeddings; of a tied one, times sqrt(base_width).
      hidden_std: init std of hidden and output matrices, times sqrt(fan_in).
      output_init: 'zero' or 'normal', of an untied unembedding.
      query_init: 'zero' or 'normal', of the matrices that make queries.
      decay_mode: 'independent' (shrinkage per step the same at every width) or 'coupled' (it follows the parameter's lr).

    Raises:
      UserError: an unknown name, or completep without base_depth.
    """

    name: str = "standard"
    base_width: int = 128
    base_depth: int = 0
    base_head_dim: int = 32
    depth_exponent: float = 1.0
    embedding_std: float = 1.0
    hidden_std: float = 1.0
    output_init: str = "normal"
    query_init: str = "normal"
    decay_mode: str = "independent"

    def __post_init__(self):
        if self.name not in TABLE:
            raise UserError(f"parametrization {self.name!r}: must be one of {', '.join(TABLE)}")
        if self.name == "completep" and self.base_depth < 1:
            raise UserError(f"base_depth is {self.base_depth}: completep needs it, the depth at which every multiplier is 1")

    def rule(self, role: str, *, fan_in: int, base_fan_in: int, width: int, depth: int) -> Rule:
        """The row for one parameter; UserError for a role that the table does not have."""
        if role not in ROLES:
            raise UserError(f"role {role!r}: must be one of {', '.join(ROLES)}")
        row, sizes = TABLE[self.name][role], self._sizes(fan_in, base_fan_in, width, depth)
        std = {"embedding": self.embedding_std, "tied": self.embedding_std}.get(role, self.hidden_std)
        zero = role in ("vector", "final_vector") or "zero" == {"output": self.output_init, "query": self.query_init}.get(role)
        decay = row.decay(sizes)
        if self.decay_mode == "coupled" and decay:
            decay = 1.0
        return Rule(0.0 if zero else std * row.init(sizes), row.lr(sizes), decay, row.eps(sizes), row.multiplier(sizes))

    def residual_multiplier(self, depth: int) -> float:
        """Of every residual branch's output."""
        return TABLE[self.name]["residual_branch"].multiplier(self._sizes(1, 1, self.base_width, depth))

    def attention_scale(self, head_dim: int) -> float:
        """Of q·k: 1/sqrt(head_dim) in `standard`, else 1/head_dim times what makes both agree at base_head_dim."""
        sizes = self._sizes(head_dim, self.base_head_dim, self.base_width, self.base_depth)
        return head_dim**-0.5 * TABLE[self.name]["attention_logits"].multiplier(sizes)

    def _sizes(self, fan_in: int, base_fan_in: int, width: int, depth: int) -> Sizes:
        k = depth / self.base_depth if self.base_depth else 1.0
        return Sizes(fan_in, base_fan_in, width, self.base_width, k, self.depth_exponent)
