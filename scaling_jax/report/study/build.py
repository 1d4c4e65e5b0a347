"""The report of a study: what it analyses, which figures it draws, and in which order the page has them."""

from collections.abc import Callable

import pandas
from etils import epath

from scaling_jax import results
from scaling_jax.console import LiveLine
from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Finding
from scaling_jax.laws.observations import checked
from scaling_jax.report.study import answers, batch, compute, curves, fits, lr, page, scaling, width
from scaling_jax.report.study.plot import Source

_TOPICS = (
    ("curves", "Along the runs", curves.FIGURES),
    ("learning-rate", "Learning rate", lr.FIGURES),
    ("batch-size", "Batch size", batch.FIGURES),
    ("sensitivity-width", "Sensitivity and width", width.FIGURES),
    ("scaling", "Scaling with size, data and compute", (*scaling.FIGURES, *compute.FIGURES)),
)
Analyse = Callable[..., dict[str, Finding | str]]


def report_table(
    table: pandas.DataFrame, curves_of_runs: pandas.DataFrame | None, title: str, out: epath.Path, analyse: Analyse
) -> epath.Path:
    """Analyses a table of results, draws what it supports, and writes the page and its figures to `out`.

    Args:
      table: as `results.load` gives it.
      curves_of_runs: as `results.curves` gives them, or None.
      title: of the page.
      out: an empty or new directory, or that of an earlier report.
      analyse: table to the findings by name, a text where there is none; takes `progress`, called with a line on what it is at.

    Returns:
      The page's file.

    Raises:
      UserError: the table holds nothing that can be reported, or `out` holds something else.
    """
    page.check_out(out)
    line = LiveLine(10.0)
    checked(table, ())  # that nothing finished is told before that there is no loss
    rows = checked(table)
    findings = analyse(table, progress=lambda name: line.show(f"fitting {name}"))
    source = Source(table, rows, findings, curves_of_runs)
    drawn, sections, left_out = [], [], []
    for anchor, heading, figures in _TOPICS:
        here = []
        for name, what, make in figures:
            line.show(f"figure {name}")
            try:
                here.append(page.draw(make(source)))
            except UserError as error:
                if str(error):
                    left_out.append((what, str(error)))
        if here:
            sections.append(page.Section(anchor, heading, "".join(page.figure(each) for each in here)))
            drawn += here
    line.end()
    sections = [
        page.Section("run", "What was run", answers.what_was_run(source)),
        page.Section("answers", "Key answers", answers.key_answers(source)),
        *sections,
        page.Section("fits", "All fits", fits.all_fits(findings)),
        page.Section("left-out", "What is left out, and why", fits.left_out(left_out, findings)),
    ]
    return page.write(out, page.document(title, answers.lead(source), sections), drawn)


def load(directory: epath.Path, columns: dict[str, str] | None = None) -> tuple[pandas.DataFrame, pandas.DataFrame | None]:
    """The table of a study or a file, and the courses of a study's runs."""
    table = results.load(directory, columns)
    return table, results.curves(directory) if (directory / results.PLAN).exists() else None
