"""The benchmarks of speed: what they count, what they write, and the page that is made of it. Sizes are tiny: nothing here is a figure."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import small_config

from scaling_jax.pods.flops import jaxpr_dot_flops
from scaling_jax.train.step import Trainer

ROOT = Path(__file__).parent.parent
SHAPE = ("--depth=1", "--context=16", "--head_dim=16", "--vocab_size=32", "--sequences=2", "--rounds=1", "--seconds=0.001")
PROGRAM = {"sequences": 2, "fields": {"model.width": 32, "model.depth": 3, "model.context": 8, "model.vocab_size": 50}}


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch, tmp_path_factory):
    """They import each other as scripts do; what they compile here need not be fast, and is compiled once."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def run(script, *flags):
    return subprocess.run([sys.executable, ROOT / "benchmarks" / script, *map(str, flags)], capture_output=True, text=True, cwd=ROOT)


def test_flops_are_those_of_each_matrix_and_of_attention():
    throughput = importlib.import_module("throughput")
    matrices = [(32, 32)] * 4 + [(32, 128), (128, 32)]  # query, key, value, attention out, MLP in and out
    entries = 3 * sum(rows * columns for rows, columns in matrices) + 32 * 50  # and the readout
    assert throughput.matrix_parameters(PROGRAM["fields"]) == entries
    attention = 3 * 2 * (2 * 8 * 32)  # a token's logits and values of 8 keys, 2 FLOPs each, and twice that backward, ...
    assert throughput.flops_per_token(PROGRAM["fields"]) == 3 * 2 * entries + 3 * attention  # ... in 3 blocks


def test_flops_are_those_of_the_traced_step():
    """All of its products, which are at most a few in a hundred more than the model's, whatever form the gradients take."""
    throughput = importlib.import_module("throughput")
    config = small_config(model__width=64, model__head_dim=32, model__context=32, noise_scale__every=0)
    traced = jaxpr_dot_flops(Trainer(config).trace_step(4, False).jaxpr)
    fields = {f"model.{name}": value for name, value in config.model.items()}
    assert 1 <= traced / (4 * 32 * throughput.flops_per_token(fields)) < 1.05


def test_figures_are_paired_with_the_peak_beside_them():
    """The machine grows slower from turn to turn: the share of the peak is the median of 0.5, 0.8 and 0.6."""
    throughput = importlib.import_module("throughput")
    flops = 2 * 8 * throughput.flops_per_token(PROGRAM["fields"])
    row = throughput.figures(PROGRAM, np.array([0.1, 0.2, 0.3]), flops * np.array([10 / 0.5, 5 / 0.8, 10 / 3 / 0.6]))
    np.testing.assert_allclose(row["of_peak"], 0.6)
    np.testing.assert_allclose([row["ms_per_step"], row["tokens_per_s"]], [200.0, 80.0])
    np.testing.assert_allclose([row["model_gflop_per_s"] * 1e9, row["peak_gflop_per_s"] * 1e9], [5 * flops, 6.25 * flops])


def test_the_peak_is_that_of_the_fastest_product(monkeypatch):
    """Products of 9, 1, 2 and 4 s by a clock made by hand."""
    machine = importlib.import_module("machine")
    peak, durations, now = machine.Peak(), iter([9.0, 1.0, 2.0, 4.0]), [0.0]

    def product(*_, out):
        now[0] += next(durations)

    peak._matmul = product
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert peak.flops_per_s(products=4) == 2 * 1024**3


def test_scaling_is_against_the_narrower_width_and_the_largest_batch():
    alternate, throughput = importlib.import_module("alternate"), importlib.import_module("throughput")

    def program(width, sequences):
        fields = PROGRAM["fields"] | {"model.width": width, "model.compute_dtype": "float32"}
        return {"sequences": sequences, "fields": fields}

    programs = [program(32, 2), program(32, 4), program(32, 8), program(64, 4)]
    entries = [throughput.matrix_parameters(p["fields"]) for p in programs]
    seconds = np.array([0.5, 0.7, 1.1, 0.7 * 3 * entries[3] / entries[1]])  # 0.3 + 0.1 a sequence; three times as much for each entry
    drift_R = np.array([1.0, 1.7, 1.0])[:, None]
    rows = throughput.scaled(programs, alternate.Turns(seconds * drift_R, np.ones((3, 4))))
    np.testing.assert_allclose([row["over_line"] for row in rows[:3]], 1.0)
    np.testing.assert_allclose([row["per_sequence"] for row in rows[:3]], [0.25 / 0.1375, 0.175 / 0.1375, 1.0])
    np.testing.assert_allclose(rows[3]["per_token_and_entry"], 3.0)
    ideal = (6 + 12 * 3 * 8 * 64 / entries[3]) / (6 + 12 * 3 * 8 * 32 / entries[1])
    np.testing.assert_allclose([rows[3]["ideal"], rows[3]["over_ideal"]], [ideal, 3 / ideal])


def test_a_batch_off_the_line_is_seen():
    off = importlib.import_module("throughput").off_the_line(np.array([4, 8, 16, 32, 64]), np.array([0.7, 1.1, 1.9, 3.5 * 1.2, 6.7]))
    assert off.argmax() == 3 and off[3] > 1.1 and off.min() > 0.9


def test_throughput_writes_its_row(tmp_path):
    done = run("throughput.py", "--widths=32", "--dtypes=float32", *SHAPE, f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"machine", "date", "command", "arguments", "rows"}
    assert "--json" not in found["command"] and found["command"].startswith("python benchmarks/throughput.py --widths=32")
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0)) and found["machine"]["packages"]["jax"]
    (row,) = found["rows"]
    assert (row["width"], row["dtype"]) == (32, "float32")
    np.testing.assert_allclose(row["tokens_per_s"], 32 / row["ms_per_step"] * 1e3)
    np.testing.assert_allclose(row["of_peak"], row["model_gflop_per_s"] / row["peak_gflop_per_s"])  # one turn
    assert "ms per step" in done.stdout and f"{row['ms_per_step']:.4g}" in done.stdout


def test_the_same_code_is_as_fast_as_itself(tmp_path):
    found = tmp_path / "found.json"
    done = run("throughput.py", "--widths=32", "--dtypes=float32", *SHAPE[:-2], "--rounds=3", f"--against={ROOT}", f"--json={found}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(found.read_text())["rows"]
    assert row["low"] <= row["tokens_ratio"] <= row["high"] and 1 / 5 < row["tokens_ratio"] < 5
    assert json.loads(found.read_text())["command"].endswith("--against=DIR")


def test_the_code_that_ran_is_told_from_what_was_asked_for(tmp_path):
    """Where a folder holds no package, Python would take the one that is installed, and compare it with itself."""
    alternate = importlib.import_module("alternate")
    with pytest.raises(alternate.Failed, match=f"^{tmp_path}: is no checkout of this project; the code that would run is that of "):
        alternate.Worker(PROGRAM | {"program": "ours"}, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtypes=float16"], "float16: must be float32 or bfloat16"),
        (["--against=nowhere"], "--against=nowhere: must be a checkout of this project"),
        (["--widths=40", "--dtypes=float32"], "throughput: head_dim is 32: must divide width, 40"),
    ],
)
def test_bad_flags_get_one_message(flags, message):
    done = run("throughput.py", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_peer_says_what_it_needs(monkeypatch, capsys):
    peer = importlib.import_module("peer")
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["peer.py"])
    assert peer.main() == 2
    assert capsys.readouterr().err == "peer: no torch and no transformers here: pip install 'scaling_jax[bench]'\n"


def test_the_peer_has_our_shapes():
    """Entries of its matrices, but for the tables of tokens and positions; and the loss is that which its authors compute."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    gpt2, throughput = importlib.import_module("gpt2"), importlib.import_module("throughput")
    program = {**PROGRAM, "fields": PROGRAM["fields"] | {"model.head_dim": 16}, "precision": "float32", "mode": "eager"}
    model, loss = gpt2._loss(program, "sdpa")
    tables = (model.transformer.wte.weight, model.transformer.wpe.weight)
    matrices = [p for p in model.parameters() if p.ndim == 2 and not any(p is table for table in tables)]
    assert sum(p.numel() for p in matrices) == throughput.matrix_parameters(program["fields"])
    assert model.config.n_head == 2
    torch.set_num_threads(1)  # waiting for others costs more than it brings
    tokens_BxL = torch.randint(50, (2, 8))
    gpt2._steps(model, loss, torch.optim.AdamW(model.parameters(), lr=0.01), tokens_BxL)(10)
    theirs = model(input_ids=tokens_BxL, labels=tokens_BxL).loss.item()  # of the next token, too
    np.testing.assert_allclose(loss(tokens_BxL).item(), theirs, rtol=1e-5)
    assert theirs < 0.8 * np.log(50)  # it learns this batch


def test_the_page_holds_what_the_files_do(tmp_path):
    performance = importlib.import_module("performance")
    machine = {"cpu": "Planted CPU", "units": [], "cores": 3, "memory_gb": 7.5, "os": "Linux 1", "python": "3.11", "packages": {"jax": "9"}}
    rows = [
        {"width": 64, "dtype": "float32", "of_peak": 0.54321, "tokens_per_s": 98765.4},
        {"width": 64, "dtype": "bfloat16", "note": "none"},
    ]
    file = {
        "machine": machine,
        "date": "2001-02-03",
        "command": "python planted.py",
        "arguments": {"depth": 5, "sequences": 16},
        "rows": rows,
    }
    comparison = {"ours": "A", "peer": "B", "tokens_ratio": 1.234, "low": 1.1, "high": 1.345}
    files = {
        "throughput": file,
        "peer": file | {"machine": machine | {"cpu": "Other CPU"}, "comparison": comparison},
        "loop_shares": file | {"arguments": {}, "rows": [{"name": "evaluation", "seconds": 0.5, "share": 0.0123}]},
        "startup": file | {"rows": [{"name": "import", "median_s": 2.0, "from_s": 1.0}]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    out = tmp_path / "page.md"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["performance.py", f"--from={tmp_path}", f"--out={out}"])
        assert performance.main() == 0
    page = out.read_text()
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert page.count("Planted CPU, 3 cores, 7.5 GB, Linux 1; Python 3.11, jax 9") == 1
    for text in ("0.5432 ", "98,765 ", "`python planted.py` (depth 5, 16 sequences a step if not said), 2001-02-03\n"):
        assert text in sections["The step"]
    assert "on another machine: Other CPU" in sections["Beside PyTorch"]
    assert "**A, over B: 1.23 times the tokens a second (quartiles 1.10 to 1.34)**" in sections["Beside PyTorch"]
    assert "0.0123" in sections["Around the step"] and "`python planted.py`, 2001-02-03\n" in sections["Around the step"]
    assert "| import |        2 |      1 |" in sections["Start"]
    assert "Not measured here; `python benchmarks/noise_overhead.py --standard` does." in sections["Measuring the noise scale"]
    assert all(len(section.command.split()) > 1 and (ROOT / section.command.split()[1]).exists() for section in performance.SECTIONS)


def test_a_table_is_markdown_with_every_column():
    table = importlib.import_module("reporting").table
    lines = table([{"name": "a", "some_ms": 1.23456}, {"name": "long", "more": 1234567.8, "some_ms": None}]).splitlines()
    assert lines[0] == "| name | some ms |      more |"
    assert lines[1] == "|------|--------:|----------:|"
    assert lines[2:] == ["| a    |   1.235 |           |", "| long |         | 1,234,568 |"]
