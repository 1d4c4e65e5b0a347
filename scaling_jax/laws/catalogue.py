"""All analyses by name."""

from collections.abc import Callable, Iterable

import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import (
    batch_critical,
    batch_optimum,
    chinchilla,
    critical_growth,
    kaplan,
    kaplan_allocation,
    kaplan_curves,
    kaplan_efficiency,
    kaplan_overfitting,
    kaplan_shape,
    kaplan_steps,
    lr_bend,
    lr_optimum,
    lr_surface,
    other_laws,
    sensitivity,
    width,
)
from scaling_jax.laws.finding import Analysis, Finding

_TIME_TRANSFER = (lr_optimum, lr_surface, lr_bend, batch_optimum, batch_critical, critical_growth, sensitivity, width)
_KAPLAN = (kaplan, kaplan_steps, kaplan_overfitting, kaplan_allocation, kaplan_curves, kaplan_efficiency, kaplan_shape)
_FAMILIES = (*_TIME_TRANSFER, *_KAPLAN, chinchilla, other_laws)
ANALYSES: dict[str, Analysis] = {analysis.name: analysis for family in _FAMILIES for analysis in family.ANALYSES}


def chosen(names: str) -> list[str]:
    """The analyses that a comma-separated list names, 'all' being all; UserError names one that there is not."""
    found = list(ANALYSES) if names.strip() == "all" else [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in ANALYSES:
            raise UserError(f"--law={name}: no such law; must be all, or of {', '.join(ANALYSES)}")
    if not found:
        raise UserError(f"--law={names}: must be all, or of {', '.join(ANALYSES)}")
    return list(dict.fromkeys(found))


def analyse(
    table: pandas.DataFrame, names: Iterable[str] | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Finding | str]:
    """Each analysis of a results table: what it found, or, in words, why the table does not support it. `progress` is called with the
    name of each that begins."""
    found: dict[str, Finding | str] = {}
    for name in ANALYSES if names is None else names:
        if progress is not None:
            progress(name)
        if missing := [column for column in ANALYSES[name].needs if column not in table]:
            found[name] = f"needs {', '.join(missing)}, which the table does not have"
            continue
        try:
            found[name] = ANALYSES[name].run(table)
        except UserError as error:
            found[name] = str(error)
    return found
