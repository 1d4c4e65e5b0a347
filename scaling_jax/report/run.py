"""What a finished run shows: a short table, and its figures."""

from pathlib import Path
from typing import Any

from scaling_jax.report.figures import loss_figure, noise_exponent, noise_figure
from scaling_jax.train.metrics import human, read_records
from scaling_jax.train.workdir import FIGURES, SUMMARY_FILE, write_json


def report_run(workdir: str | Path, summary: dict[str, Any]) -> str:
    """Draws DIR/figures, adds the noise scale's exponent to summary.json, and returns the table."""
    workdir = Path(workdir)
    records = read_records(workdir)
    law = noise_exponent(records)
    if law is not None:
        summary |= {"noise_scale_exponent": law.exponent, "noise_scale_exponent_se": law.exponent_se}
        write_json(workdir / SUMMARY_FILE, summary)
    figures = workdir / FIGURES
    figures.mkdir(exist_ok=True)
    drawn = [
        figures / name
        for name, draw in (("loss.png", loss_figure), ("noise_scale.png", noise_figure))
        if draw(records, figures / name, summary)
    ]
    return "\n".join(f"{name:<24}{value}" for name, value in _rows(summary, drawn))


def _rows(summary: dict[str, Any], figures: list[Path]) -> list[tuple[str, str]]:
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
        rows.append((f"{domain} loss", f"{summary[key]:.4f}{error} nats/token, {bits:.3f} bits/byte"))
    if "noise_scale_tokens" in summary:
        low, high = summary["noise_scale_tokens_low"], summary["noise_scale_tokens_high"]
        interval = "no interval yet" if low is None else f"95% interval {human(low)} to {human(high)}"
        rows.append(("noise scale", f"{human(summary['noise_scale_tokens'])} tokens, {interval}"))
    if "noise_scale_exponent" in summary:
        rows.append(("its growth", f"tokens^{summary['noise_scale_exponent']:.2f} ± {summary['noise_scale_exponent_se']:.2f}"))
    seconds = summary["timing"]["seconds"]
    return [*rows, ("time", f"{seconds:.0f} s"), *(("figure", str(path)) for path in figures)]
