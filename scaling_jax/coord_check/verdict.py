"""From coordinates to a verdict: log-log slopes against size, what they should be, and how far off is too far.

What should be is not read from the table under test. It is what feature learning at every size asks for (Tensor Programs V, section
4; CompleteP, section 4): activations, and changes of the residual stream, keep their size; an Adam step moves an entry of a hidden
matrix by 1/width, and of everything else by as much at any width.

The tolerances are calibrated: see docs/parametrization.md for what a correct model and the known mistakes reach.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from scaling_jax.coord_check.measure import ACTIVATION, CHANGE, DECAY, EPSILON, PROBED, UPDATE, Coordinate
from scaling_jax.laws.power_law import power_law

TOLERANCE = {
    ("width", ACTIVATION): 0.25,
    ("width", CHANGE): 0.25,
    ("width", UPDATE): 0.15,
    ("width", DECAY): 0.01,
    ("width", EPSILON): 0.05,
    ("depth", ACTIVATION): 0.25,
    ("depth", CHANGE): 0.25,
    ("depth", UPDATE): 0.15,
    ("depth", DECAY): 0.01,
    ("depth", EPSILON): 0.05,
}
EXACT = 0.01  # for what is no measurement of anything random
# The first step that is judged: at step 1 all is as it was drawn, and hidden matrices behind a zero readout have no gradient.
FIRST_STEP = {ACTIVATION: 2, UPDATE: 2, CHANGE: 2, DECAY: 0, EPSILON: 0}


def by_change(kind: str) -> bool:
    """Whether an activation is judged by its change since step 1, which what it starts from would hide.

    So is the residual stream, which sums what all branches add, and so are logits, which behind a zero readout are all change.
    """
    return kind.startswith(("residual", "logits", "target"))


class Expected(NamedTuple):
    """What the parametrization claims: the exponents that differ between claims."""

    depth_exponent: float = 1.0  # α
    coupled_decay: bool = False
    tied_embeddings: bool = False
    growing_heads: bool = False

    def exponent(self, axis: str, quantity: str, kind: str, role: str) -> float | None:
        """Of size, for one row; None where nothing is claimed: the row is shown and not judged."""
        hidden, in_branch = role in ("hidden", "query"), role in ("hidden", "query", "vector")
        if quantity in (ACTIVATION, CHANGE):
            return self._activation(axis, kind) if by_change(kind) == (quantity == CHANGE) else None
        lr = (-1.0 if hidden else 0.0) if axis == "width" else (self.depth_exponent - 1 if in_branch else 0.0)
        if quantity == UPDATE:
            return lr
        if quantity == EPSILON:  # lr over epsilon, and epsilon is as the gradient
            return lr + (1.0 if axis == "width" else self.depth_exponent if in_branch else 0.0)
        return 0.0 if axis == "width" and hidden and not self.coupled_decay else lr

    def _activation(self, axis: str, kind: str) -> float | None:
        if axis == "width" and self.tied_embeddings and kind == "logits":
            return None  # random at first, they shrink as 1/sqrt(width): the target's tells
        if axis == "width" and self.growing_heads and kind.startswith("attention "):
            # As random are products of queries and keys over head_dim: their scale tells, exactly.
            return {"attention scale": -1.0, "attention logits": None}.get(kind, 0.0)
        return 0.0


class Slope(NamedTuple):
    """The exponent of size of one quantity at one step. `ok` is None where it is not judged."""

    axis: str
    quantity: str
    kind: str
    role: str
    step: int
    slope: float | None  # None: not a positive number at every size
    se: float | None
    expected: float | None
    tolerance: float | None
    ok: bool | None

    @property
    def off(self) -> float:
        """Distance from what is expected, in tolerances; infinite where there is no slope."""
        if self.expected is None or self.tolerance is None:
            return 0.0
        if self.slope is None:
            return 0.0 if self.ok else math.inf
        return abs(self.slope - self.expected) / self.tolerance


def slopes(coordinates: Sequence[Coordinate], expected: Expected) -> list[Slope]:
    """One row for each axis, quantity, kind and step, fitted over sizes to the mean over seeds.

    What is still zero at every size at a step (keys behind zero queries have no gradient at first) is not judged there, except at the
    last.
    """
    groups: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for c in coordinates:
        groups[c.axis, c.quantity, c.kind, c.role, c.step][c.size].append(c.value)
    last = max((c.step for c in coordinates), default=0)
    rows = []
    for (axis, quantity, kind, role, step), by_size in groups.items():
        slope, se = _fit(by_size)
        exponent = expected.exponent(axis, quantity, kind, role)
        nothing = not any(map(any, by_size.values()))
        if (nothing and quantity not in PROBED and step < last) or step < FIRST_STEP[quantity]:
            exponent = None
        tolerance = None if exponent is None else TOLERANCE[axis, quantity]
        if exponent is not None and kind == "attention scale":
            tolerance = EXACT
        ok = None if exponent is None else slope is not None and abs(slope - exponent) <= tolerance
        if quantity == DECAY and "vector" in role:  # gains and biases do not decay
            ok = nothing
        rows.append(Slope(axis, quantity, kind, role, step, slope, se, exponent, tolerance, ok))
    return rows


def worst(rows: Iterable[Slope]) -> list[Slope]:
    """The judged row that is furthest off, for each axis, quantity and kind."""
    found: dict[tuple, Slope] = {}
    for row in rows:
        key = row.axis, row.quantity, row.kind
        if row.ok is not None and (key not in found or row.off > found[key].off):
            found[key] = row
    return list(found.values())


def passed(rows: Iterable[Slope]) -> bool:
    judged = [row.ok for row in rows if row.ok is not None]
    return bool(judged) and all(judged)


def widest_ratio(coordinates: Iterable[Coordinate], narrow: int, wide: int, steps: int = 3) -> tuple[float, str]:
    """The criterion of microsoft/mup's own test: mean |x| of every activation, wide over narrow, over the first steps.

    Returns the ratio furthest from 1 and the activation. Theirs: one seed, Adam with lr 1e-3, one batch, steps 1 to 3, four times the
    width; it must lie within [1/1.2, 1.2]. What is zero at every size (logits before the first update) is left out.
    """
    groups: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for c in coordinates:
        if c.quantity == ACTIVATION and c.step <= steps and c.size in (narrow, wide):
            groups[c.kind, c.step][c.size].append(c.value)
    ratios = []
    for (kind, _), by_size in groups.items():
        top, bottom = np.mean(by_size[wide]), np.mean(by_size[narrow])
        if top or bottom:
            ratios.append((top / bottom if bottom else math.inf, kind))
    return max(ratios, key=lambda found: abs(math.log(found[0])) if found[0] > 0 else math.inf)


def _fit(by_size: dict[int, list[float]]) -> tuple[float | None, float | None]:
    """Slope and standard error of log mean against log size."""
    sizes = sorted(by_size)
    values = [np.asarray(by_size[size], float) for size in sizes]
    if not all(np.isfinite(v).all() and (v > 0).all() for v in values):
        return None, None
    logs = [np.log(v) for v in values]
    freedom = sum(len(v) - 1 for v in logs)
    # One variance for all sizes: a few seeds are too few to tell them apart. Never quite 0, for what has no scatter.
    variance = sum(((v - v.mean()) ** 2).sum() for v in logs) / freedom if freedom else 0.0
    half = 1.959963985 * np.maximum(np.sqrt(variance / np.array([len(v) for v in logs])), 1e-6)
    mean = np.array([v.mean() for v in values])
    law = power_law(sizes, mean, mean * np.exp(-half), mean * np.exp(half))
    return (None, None) if law is None else (law.exponent, law.exponent_se)
