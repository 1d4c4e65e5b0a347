"""What is shown while something is under way."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from shells import Terminal

from scaling_jax import console
from scaling_jax.console import LiveLine
from scaling_jax.train.metrics import MetricsWriter, Progress


def test_a_terminal_shows_one_line_without_remains(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    out = Terminal()
    line = LiveLine(seconds=10, out=out)
    for text in ("x" * 79, "long, longer", "short"):
        line.show(text)
        assert out.lines == [text]
    assert out.getvalue().count("\r") == 3
    line.say("a message")
    line.show("y" * 200)  # more than the terminal's 80 columns
    assert out.lines == ["short", "a message", "y" * 79]
    line.end()
    line.end()
    assert out.lines == ["short", "a message", "y" * 79, ""]


def test_elsewhere_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress(1000, 10.0, out)
    record = {"loss": 1.0, "noise_scale_tokens": None, "noise_scale_tokens_low": None, "noise_scale_tokens_high": None}
    for now[0] in range(0, 25):
        progress.show(record | {"tokens": now[0]}, 2.5)
    progress.say("done")
    progress.end()
    assert out.getvalue().splitlines() == [
        *(f"{tokens}/1k tokens · loss 1.000 · held-out 2.500 · noise scale ∞ tokens" for tokens in (0, 10, 20)),
        "done",
    ]


def test_lines_that_come_too_soon_are_left_out(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    for out, times in ((io.StringIO(), (10.0, 20.0)), (Terminal(), (0.25, 0.5))):
        now[0] = 0.0
        line = LiveLine(seconds=10, out=out, at_once=False)  # work that is quick shows nothing
        line.show("a")
        for now[0] in times:
            line.show("b")
            line.show("c")
        assert out.getvalue().count("b") == 2 and not {"a", "c"} & set(out.getvalue())


def test_not_a_number_never_reaches_metrics(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write({"step": 1, "tokens": 64, "eval/heldout/loss": float("nan"), "loss": np.float64("inf")})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "tokens": 64, "eval/heldout/loss": None, "loss": None}
