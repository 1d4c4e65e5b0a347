"""`scaling-jax fit`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.process import compute_on_cpu, use_compilation_cache
from scaling_jax.verbs.columns import EXAMPLE, parse_columns
from scaling_jax.verbs.common import Verb

if TYPE_CHECKING:
    import pandas

    from scaling_jax.laws.finding import Finding


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "data",
        None,
        "a study's directory, or a .csv or .parquet table or a directory of them; the flag's name may be left out",
        flag_values=values,
    )
    flags.DEFINE_string("columns", "", f"what our columns are called there, {EXAMPLE}", flag_values=values)
    flags.DEFINE_string("law", "all", "laws to fit, comma-separated, or all that the data support", flag_values=values)
    flags.DEFINE_string("out", "", "file for the fits, laws.json; nothing is written without it", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    compute_on_cpu()
    from scaling_jax import results
    from scaling_jax.laws import catalogue, store
    from scaling_jax.laws.observations import checked
    from scaling_jax.report.laws import laws_text

    if not values.data:
        raise UserError("DATA is missing: scaling-jax fit DATA, a study's directory or a table")
    names, columns = catalogue.chosen(values.law), parse_columns(values.columns)
    if values.out:
        store.check_writable(values.out)
    storage.directory("--data", values.data)
    use_compilation_cache()
    table = results.load(values.data, columns=columns)
    finished = checked(table)
    for name, how in table.attrs.get("derived", {}).items():
        print(f"{name} are not in the table: {how}")

    def progress(name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{name} …", end="", file=sys.stderr, flush=True)

    found = catalogue.analyse(table, names, progress)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if not any(_tells(finding) for finding in found.values()):
        if len(found) == 1 and isinstance(found[names[0]], str):
            raise UserError(f"{values.data}: {names[0]}: {found[names[0]]}{_mapping(catalogue.ANALYSES[names[0]].needs, table)}")
        print(laws_text(found))
        raise UserError(f"{values.data}: none of the laws can be fitted to its {len(finished)} finished rows")
    print(laws_text(found))
    if values.out:
        base = (storage.read_json(Path(values.data) / results.PLAN, {}) or {}).get("base", {}) if "study" in table.attrs else {}
        store.write(values.out, store.record(table, found, str(values.data), base))
        print(f"\nlaws    {values.out}")
    return 0


def _tells(finding: "Finding | str") -> bool:
    """Whether it has a number with an interval, or, fitting nothing, a measured one."""
    if isinstance(finding, str):
        return False
    if not finding.fits:
        return "censored" not in finding.points or not finding.points["censored"].astype(bool).all()
    fits = any(len(fitted.draws_RxP) and {*fitted.values} - {*fitted.unidentified} for fitted in finding.fits.values())
    return fits or any(one.value is not None and (one.low is not None or one.high is not None) for one in finding.numbers)


def _mapping(needs: Sequence[str], table: "pandas.DataFrame") -> str:
    missing = [name for name in needs if name not in table]
    if not missing or "study" in table.attrs:
        return ""
    return f"; --columns='{missing[0]}=NAME' says what it is called there, of {', '.join(map(str, table.columns))}"


FIT = Verb(
    "fit scaling laws to a study or a table, with intervals",
    "scaling-jax fit runs/time_transfer --law=all --out=laws.json",
    _define,
    _run,
    positional="data",
)
