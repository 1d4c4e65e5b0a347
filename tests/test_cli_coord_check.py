"""`scaling-jax coord-check` as its users meet it: exit codes, messages, and what it leaves on disk."""

import json
from pathlib import Path

import pytest

from scaling_jax.cli import main

CONFIG = """
from scaling_jax.config import default_config


def get_config():
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = 16, 1, 8, 8
    config.parametrization.base_width, config.parametrization.base_head_dim = 16, 8
    config.optimizer.lr = 0.02
    config.train.tokens, config.train.batch_tokens = 640, 64
    config.logging.tensorboard = False
    return config
"""
RUN = ["--widths=16,32,64", "--steps=4", "--seeds=1", "--batch_tokens=128"]


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def checked(config_file, tmp_path_factory) -> Path:
    """The directory of a check that passed."""
    out = tmp_path_factory.mktemp("checked") / "widths"
    assert main(["coord-check", f"--config={config_file}", f"--out={out}", *RUN]) == 0
    return out


def refuses(capsys, argv, *words, out=None) -> str:
    """Exit code 2, one message with all `words`, no traceback, nothing at `out`."""
    capsys.readouterr()
    assert main(["coord-check", *argv]) == 2
    printed, err = capsys.readouterr()
    assert printed == "" and "Traceback" not in err
    assert err.startswith("scaling-jax coord-check: ") and err.count("scaling-jax coord-check:") == 1
    for word in words:
        assert word in err
    assert out is None or not out.exists()
    return err


def test_mup_passes_and_leaves_table_figure_and_verdict(checked):
    assert sorted(path.name for path in checked.iterdir()) == [
        "conditions.json",
        "coord_check_width.png",
        "coordinates.jsonl",
        "slopes.csv",
        "verdict.json",
    ]
    verdict = json.loads((checked / "verdict.json").read_text())
    assert verdict["passed"] and verdict["axes"] == {"width": True}
    # Every parameter's update and decay and every activation is judged.
    judged = {(row["quantity"], row["kind"]) for row in verdict["worst"]}
    matrices = {f"blocks.{name}" for name in ("query", "key", "value", "attention_out", "mlp_in", "mlp_out")} | {"embedding", "unembedding"}
    assert {kind for quantity, kind in judged if quantity == "update"} == matrices
    assert {kind for quantity, kind in judged if quantity == "decay"} == matrices
    assert {kind for quantity, kind in judged if quantity == "epsilon"} == matrices
    activations = {"embedding", "q", "k", "v", "attention logits", "attention scale", "attention output", "MLP hidden", "MLP output"}
    assert {kind for quantity, kind in judged if quantity == "activation"} == activations
    assert {kind for quantity, kind in judged if quantity == "change"} == {
        "logits",
        "target logit",
        *(f"residual {i}/4" for i in range(1, 5)),
    }


def test_the_same_command_measures_nothing_twice_and_says_the_same(config_file, checked, capsys, monkeypatch):
    monkeypatch.setattr("scaling_jax.coord_check.run.coordinates", pytest.fail)
    before = {name: (checked / name).read_bytes() for name in ("coordinates.jsonl", "slopes.csv", "verdict.json")}
    capsys.readouterr()
    assert main(["coord-check", f"--config={config_file}", f"--out={checked}", *RUN]) == 0
    out, err = capsys.readouterr()
    assert "width   pass" in out.splitlines() and str(checked / "coord_check_width.png") in out
    assert "has 3 of 3 measurements" in err and "--overwrite" in err
    assert {name: (checked / name).read_bytes() for name in before} == before


def test_other_conditions_are_refused_and_overwrite_is_offered(config_file, checked, capsys):
    before = (checked / "coordinates.jsonl").read_bytes()
    refuses(capsys, [f"--config={config_file}", f"--out={checked}", *RUN, "--lr=0.5"], "check.lr 0.02 -> 0.5", "--overwrite")
    assert (checked / "coordinates.jsonl").read_bytes() == before


def test_standard_parametrization_fails_with_exit_code_1(config_file, tmp_path, capsys):
    argv = ["coord-check", f"--config={config_file}", f"--out={tmp_path}", *RUN, "--config.parametrization.name=standard"]
    assert main(argv) == 1
    (verdict,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("width   FAIL: ")]
    assert "logits" in verdict and "blocks.key" in verdict
    assert json.loads((tmp_path / "verdict.json").read_text())["passed"] is False


def test_every_flag_reaches_the_check(config_file, tmp_path, monkeypatch):
    """Flags that are read and dropped would go unnoticed: their defaults work too."""
    seen = {}

    def coord_check(config, check, out, overwrite):
        seen.update(check._asdict(), out=out, overwrite=overwrite, width=config.model.width)
        raise KeyboardInterrupt

    monkeypatch.setattr("scaling_jax.coord_check.run.coord_check", coord_check)
    flags = ["--depths=2,4,8", "--seeds=3", "--steps=7", "--lr=0.5", "--batch_tokens=32", "--heads=2", "--model=m.py:M", "--overwrite"]
    argv = ["coord-check", f"--config={config_file}", f"--out={tmp_path}", "--widths=16,32,64", *flags, "--config.model.width=24"]
    assert main(argv) == 130
    assert seen == {
        "sizes": {"width": [16, 32, 64], "depth": [2, 4, 8]},
        "seeds": 3,
        "steps": 7,
        "lr": 0.5,
        "batch_tokens": 32,
        "heads": 2,
        "model": "m.py:M",
        "out": str(tmp_path),
        "overwrite": True,
        "width": 24,
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--widths=16,32"], ["--widths=16,32: must be at least 3 different widths"]),
        (["--widths=a,b"], ["--widths=a,b: must be integers", "64,128,256"]),
        (["--widths=16,,32"], ["--widths=16,,32: must be integers"]),
        (["--depths=1.5,2,3"], ["--depths=1.5,2,3: must be integers"]),
        ([], ["--widths=… or --depths=… is missing"]),
        (["--widths="], ["--widths=… or --depths=… is missing"]),
        (["--widths=16,20,32"], ["--widths has 20: must be multiples of config.model.head_dim, 8"]),
        (["--widths=16,18,32", "--heads=2"], ["--widths has 18: must be multiples of 4, twice --heads"]),
        (["--widths=16,32,64", "--steps=two"], ["--steps=two: must be an integer"]),
        (["--widths=16,32,64", "--lr=0"], ["--lr=0.0: must be positive"]),
        (["--widths=16,32,64", "--step=3"], ["--step: no such flag (did you mean --steps?)"]),
        (["--widths=16,32,64", "--model=nowhere.py:M"], ["--model=nowhere.py:M"]),
        (["--widths=16,32,64", "--config.parametrization.name=completep"], ["config.parametrization.base_depth is 0: completep"]),
        (["--widths=16,32,64", "--config.model.width=20"], ["config.model.width is 20"]),
    ],
)
def test_bad_input_is_exit_code_2_and_one_message(config_file, tmp_path, capsys, args, words):
    out = tmp_path / "out"
    refuses(capsys, [f"--config={config_file}", f"--out={out}", *args], *words, out=out)


def test_a_missing_out_or_config_is_named(config_file, tmp_path, capsys):
    refuses(capsys, [f"--config={config_file}", *RUN], "--out=DIR is missing")
    refuses(capsys, [f"--out={tmp_path / 'out'}", *RUN], "--config=FILE is missing", out=tmp_path / "out")


def test_an_interrupt_keeps_what_was_measured(config_file, checked, tmp_path, capsys, monkeypatch):
    """Exit code 130, and the same command goes on from there."""
    lines = (checked / "coordinates.jsonl").read_text().splitlines(keepends=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "conditions.json").write_bytes((checked / "conditions.json").read_bytes())
    (out / "coordinates.jsonl").write_text("".join(lines[:2]))

    def interrupted(config, axis, size, *rest):
        assert size == 64  # the other two are there
        raise KeyboardInterrupt

    monkeypatch.setattr("scaling_jax.coord_check.run.coordinates", interrupted)
    assert main(["coord-check", f"--config={config_file}", f"--out={out}", *RUN]) == 130
    assert "interrupted" in capsys.readouterr().err and not (out / "verdict.json").exists()
    assert (out / "coordinates.jsonl").read_text() == "".join(lines[:2])
