"""`scaling-jax report`."""

from absl import flags

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.process import compute_on_cpu, use_compilation_cache
from scaling_jax.verbs.columns import EXAMPLE, parse_columns
from scaling_jax.verbs.common import Verb

_TABLES = (".csv", ".parquet")


def _define(values: flags.FlagValues) -> None:
    text = "a study's directory, a run's, or a .csv or .parquet table or a directory of them; the flag's name may be left out"
    flags.DEFINE_string("data", None, text, flag_values=values)
    flags.DEFINE_string("out", "", "directory for the page and its figures; DIR/report if not given", flag_values=values)
    flags.DEFINE_string("columns", "", f"what our columns are called in a table of somebody else's, {EXAMPLE}", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    compute_on_cpu()
    from scaling_jax import results
    from scaling_jax.laws import catalogue
    from scaling_jax.report.study import build, page, run
    from scaling_jax.train.metrics import FILE as METRICS_FILE

    if not values.data:
        raise UserError("DIR is missing: scaling-jax report DIR, the work directory of a study or a run, or a .csv or .parquet table")
    source = storage.directory("--data", values.data)
    columns = parse_columns(values.columns)
    is_run = (source / METRICS_FILE).exists()
    parts = source.is_dir() and not is_run and bool(results.table_files(source))
    is_table = parts or (not source.is_dir() and source.suffix in _TABLES)
    if is_table and not parts and not values.out:
        raise UserError(f"--out=DIR is missing: {source} is a table, and the page needs a directory of its own")
    if columns and not is_table:
        raise UserError(f"--columns={values.columns}: {source} is no .csv or .parquet table; leave it out")
    out = storage.directory("--out", values.out) if values.out else source / "report"
    page.check_out(out)
    storage.check_writable(out / "index.html")
    use_compilation_cache()
    if is_table or (source / results.PLAN).exists():
        table, curves = build.load(source, columns)
        written = build.report_table(table, curves, (source.name or "table") if source.is_dir() else source.stem, out, catalogue.analyse)
    elif is_run:
        written = run.report_run_page(source, source.name, out)
    else:
        what = "no such directory or table" if not source.exists() else f"holds neither a study, {results.PLAN}, nor a run, {METRICS_FILE}"
        raise UserError(f"{values.data}: {what}")
    print(f"{'report':<24}{written}")
    return 0


REPORT = Verb(
    "one HTML page of a study, a run or a table: figures, fits, answers",
    "scaling-jax report runs/time_transfer",
    _define,
    _run,
    positional="data",
)
