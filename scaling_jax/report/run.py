"""What a finished run shows: a short table, and its figures."""

from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.report.critical_batch import critical_batch_figure, critical_batches, write_laws
from scaling_jax.report.figures import loss_figure, noise_figure
from scaling_jax.train.metrics import human, read_records
from scaling_jax.train.workdir import FIGURES, LAWS, SUMMARY_FILE, write_json

CRITICAL_BATCH_FIGURE = "critical_batch.png"
_NOISE_SCALES = {"noise": ("", "noise scale"), "preconditioned": ("preconditioned_", "preconditioned noise")}  # prefix of keys, row


class Report(NamedTuple):
    """A run's table, and the files of the figures that show something."""

    table: str
    figures: list[Path]


def report_run(workdir: str | Path, summary: dict[str, Any]) -> Report:
    """Draws DIR/figures, writes DIR/laws, and adds the noise scales' exponents to `summary` and summary.json."""
    workdir = Path(workdir)
    records = read_records(workdir)
    found = critical_batches(workdir, records)
    laws = write_laws(workdir, found)
    exponents = {}
    for definition, (prefix, _) in _NOISE_SCALES.items():
        if definition in laws:
            key, law = f"{prefix}noise_scale_exponent", laws[definition]
            exponents |= {key: law.exponent, f"{key}_se": law.exponent_se}
    if exponents:
        summary |= exponents
        write_json(workdir / SUMMARY_FILE, summary)
    figures = workdir / FIGURES
    figures.mkdir(exist_ok=True)
    drawn = [
        figures / name
        for name, draw in (("loss.png", loss_figure), ("noise_scale.png", noise_figure))
        if draw(records, figures / name, summary)
    ]
    if critical_batch_figure(found, laws, records, figures / CRITICAL_BATCH_FIGURE, summary):
        drawn.append(figures / CRITICAL_BATCH_FIGURE)
    files = [("law", workdir / LAWS / f"{definition}.json") for definition in laws] + [("figure", path) for path in drawn]
    return Report("\n".join(f"{name:<24}{value}" for name, value in [*summary_rows(summary), *files]), drawn)


def draw_critical_batch(workdir: str | Path) -> Path | None:
    """Draws DIR/figures/critical_batch.png from what the run has by now; None where it has no critical batch.

    Of DIR/laws only branch.json is written: the others are the run's, and its records may be gone or still growing.
    """
    workdir = Path(workdir)
    records = read_records(workdir)
    found = critical_batches(workdir, records)
    path = workdir / FIGURES / CRITICAL_BATCH_FIGURE
    path.parent.mkdir(exist_ok=True)
    return path if critical_batch_figure(found, write_laws(workdir, found, ["branch"]), records, path) else None


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run came to, as (name, value) in words; `summary` is that of summary.json."""
    rows = [
        ("status", summary["status"]),
        ("tokens", f"{summary['tokens']:,} in {summary['steps']:,} steps"),
        ("parameters", f"{human(summary['params'])} (N, without embeddings), {human(summary['total_params'])} in all"),
    ]
    if summary["train_loss"] is not None:
        rows.append(("training loss", f"{summary['train_loss']:.4f} nats/token over the last 5%"))
    for key in (key for key in summary if key.startswith("eval/") and key.endswith("/loss")):
        if summary[key] is None:
            continue
        domain, se, bits = key.split("/")[1], summary[key + "_se"], summary[key.removesuffix("loss") + "bits_per_byte"]
        error = "" if se is None else f" ± {se:.4f}"
        per_byte = "" if bits is None else f", {bits:.3f} bits/byte"  # unknown where the tokenizer loses text
        rows.append((f"{domain} loss", f"{summary[key]:.4f}{error} nats/token{per_byte}"))
    for prefix, name in _NOISE_SCALES.values():
        value, exponent = f"{prefix}noise_scale_tokens", f"{prefix}noise_scale_exponent"
        if value in summary:
            low, high = summary[f"{value}_low"], summary[f"{value}_high"]
            interval = "no interval yet" if low is None else f"95% interval {human(low)} to {human(high)}"
            known = "not known" if summary[value] is None else f"{human(summary[value])} tokens"  # |G|² came out below zero
            rows.append((name, f"{known}, {interval}"))
        if exponent in summary:
            rows.append(("its growth", f"tokens^{summary[exponent]:.2f} ± {summary[f'{exponent}_se']:.2f}"))
    return [*rows, ("time", f"{summary['timing']['seconds']:.0f} s")]
