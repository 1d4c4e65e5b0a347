"""`scaling-jax sweep` and `scaling-jax status` as their users meet them."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shells import snapshot
from test_sweep_run import FakeEngine, kills

from scaling_jax import results
from scaling_jax.cli import main

STUDY = """
from scaling_jax.config import default_config
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study


def get_study(lrs="2"):
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = 16, 1, 8, 16
    config.parametrization.base_width, config.parametrization.base_head_dim = 16, 8
    config.schedule.name = "constant"
    config.eval.tokens = 512
    lrs = grid.over("optimizer.lr", grid.geometric(2**-9, 2**-6, 2**0.5)[: int(lrs)])
    points = grid.product(lrs, grid.over("train.batch_tokens", (64, 128)))
    return Study(config, points, horizons=(2048, 4096), max_members=2)
"""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.py"
    path.write_text(STUDY)
    return path


def refuses(capsys: pytest.CaptureFixture[str], workdir: Path, argv: list[str], *words: str) -> None:
    """Exit code 2, one message with all `words`, and the directory as before."""
    before = snapshot(workdir)
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("scaling-jax") and "Traceback" not in err
    for word in words:
        assert word in err
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    "args, words",
    [
        (["--workers=0"], ["--workers=0: must be at least 1"]),
        (["--workers=x"], ["--workers=x: must be an integer"]),
        (["--topology=v5e:2x4"], ["--topology=v5e:2x4: is for --dry_run"]),
        (["--topology=v9:2x4", "--dry_run"], ["v9"]),
        (["--topology_groups=-1"], ["--topology_groups=-1: must be 0"]),
        (["--engine=slurm"], ["--engine=slurm: must be local or ray"]),
        (["--engine=ray", "--workers=2"], ["--workers=2: is for --engine=local"]),
        (["--engine=ray", "--ray_address=127.0.0.1:9"], ["--ray_address=127.0.0.1:9: no Ray cluster answers there"]),
        (["--config.model.widht=3"], ["--config.model.widht: no such field (did you mean config.model.width?)"]),
        (["--config.optimizer.lr=0.1"], ["--config.optimizer.lr=0.1: the study's grid sets it"]),
        (["--config.train.tokens=100"], ["--config.train.tokens=100: the study's horizons set it"]),
        (["--config.model.width=17"], ["config.model.width is 17: must be a multiple of config.model.head_dim, 8"]),
        (["--workdir="], ["--workdir=DIR is missing"]),
        (["--config="], ["--config=FILE is missing"]),
        (["--config=nowhere.py"], ["--config=nowhere.py: no such file"]),
        (["stray"], ["unexpected argument 'stray'"]),
    ],
)
def test_wrong_flags_are_named(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]):
    if "--engine=ray" in args and "--workers=2" not in args:
        pytest.importorskip("ray")
    refuses(capsys, tmp_path, ["sweep", f"--config={study_file}", f"--workdir={tmp_path / 's'}", *args], *words)


def test_configs_of_runs_and_of_studies_are_told_apart(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run.py"
    run.write_text("from scaling_jax.config import default_config\ndef get_config():\n    return default_config()\n")
    refuses(capsys, tmp_path, ["sweep", f"--config={run}", f"--workdir={tmp_path / 's'}"], "is the config of one run", "scaling-jax train")
    refuses(capsys, tmp_path, ["train", f"--config={study_file}", f"--workdir={tmp_path / 's'}"], f"--config={study_file}")


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", f"--config={study_file}:3", f"--workdir={tmp_path / 's'}", "--dry_run", "--workers=2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^points +6, 12 cells", out, re.MULTILINE)
    assert re.search(r"^trajectories +6 in at least 4 groups$", out, re.MULTILINE)
    assert re.search(rf"^tokens +{6 * 4096:,}$", out, re.MULTILINE)
    assert re.search(r"^time +about \d+:\d\d:\d\d with 2 at a time, besides starting and compiling$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
    assert main(["sweep", f"--config={study_file}", "--dry_run", "--config.model.width=32"]) == 0  # no directory needed
    assert "32 x 1" in capsys.readouterr().out


def test_a_study_is_run_shown_stopped_and_continued(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By Ctrl-C of a real process, once a group trains."""
    long = kills.write_study(tmp_path, 64_000, seeds=1, lrs=1, members=1)
    workdir = tmp_path / "s"
    command = ["sweep", f"--config={long}", f"--workdir={workdir}", "--workers=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", _MAIN, *command], **pipes)
    while not any(workdir.glob("groups/*/trunk/checkpoints/[0-9]*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    assert main(["status", str(workdir)]) == 0
    assert "in use" in capsys.readouterr().out
    workers = kills.workers_of(process)
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("interrupted; saving\ninterrupted, saved; the same command continues\n") and "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert main(["status", "--json", str(workdir)]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["cells"]["pending"] > 0 and status["groups"]["stopped"] > 0 and not status["in_use"]
    for group in status["running"]:
        assert (workdir / "groups" / group["group"] / "trunk" / "checkpoints" / str(group["tokens"])).exists()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"^cells +6 finished$", out, re.MULTILINE) and str(workdir / "results.parquet") in out
    assert set(results.load(workdir)["status"]) == {"finished"}
    assert main(["status", str(workdir)]) == 0
    assert re.search(r"^groups +2 done$", capsys.readouterr().out, re.MULTILINE)


_MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where these tests run in the background
from scaling_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_status_of_a_run_takes_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"train": {"tokens": 1000}}, "identity": {}}))
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: not begun, 0 of 1,000 tokens\nno records yet\n"
    records = [{"step": 1, "tokens": 64, "loss": 5.5}, {"step": 2, "tokens": 128, "loss": 5.25, "noise_scale_tokens": 800.0}]
    records[1] |= {"noise_scale_tokens_low": 600.0, "noise_scale_tokens_high": None}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "tok')
    assert main(["status", f"--workdir={tmp_path}"]) == 0
    expected = f"{tmp_path}: unfinished, 128 of 1,000 tokens\nloss 5.2500 · noise scale 800 [600, ∞] tokens\n"
    assert capsys.readouterr().out == expected
    (tmp_path / "summary.json").write_text(json.dumps({"status": "diverged", "tokens": 128}))
    assert main(["status", "--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "diverged"


def test_status_of_anything_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    refuses(capsys, tmp_path, ["status"], "DIR is missing")
    refuses(capsys, tmp_path, ["status", str(tmp_path)], f"{tmp_path}: holds neither a study, plan.json, nor a run, config.json")
    refuses(capsys, tmp_path, ["status", str(tmp_path / "x")], f"{tmp_path / 'x'}: no such directory")
    refuses(capsys, tmp_path, ["status", "a", "b"], "unexpected argument 'b'")
    refuses(capsys, tmp_path, ["status", "a", "--workdir=b"], "unexpected argument 'a'")
    (tmp_path / "config.json").write_text("{")
    refuses(capsys, tmp_path, ["status", str(tmp_path)], f"{tmp_path / 'config.json'}: not a config")


def test_status_does_not_start_jax(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"train": {"tokens": 1000}}, "identity": {}}))
    code = "import sys; from scaling_jax.cli import main; main(sys.argv[1:]); sys.exit(any(m in sys.modules for m in ('jax', 'pandas')))"
    subprocess.run([sys.executable, "-c", code, "status", str(tmp_path)], check=True)


def test_a_failed_group_is_named_and_is_exit_code_1(study_file: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    fails = FakeEngine(tmp_path / "s", lambda group: {"state": "failed", "reason": "why not"})
    monkeypatch.setattr("scaling_jax.verbs.sweep._engine", lambda *_: fails)
    assert main(["sweep", f"--config={study_file}", f"--workdir={tmp_path / 's'}"]) == 1
    assert "why not" in "".join(capsys.readouterr())


@pytest.mark.parametrize("workdir", ["nowhere://bucket/study", "a\0b"])
@pytest.mark.parametrize("verb", [["sweep", "--config=FILE"], ["status"]])
def test_what_can_be_no_directory_is_refused(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb, workdir: str):
    argv = [arg.replace("FILE", str(study_file)) for arg in verb]
    refuses(capsys, tmp_path, [*argv, f"--workdir={workdir}"], f"--workdir={workdir!r}: must be a directory")


def written(folder: Path, texts: dict[str, list[str]]) -> Path:
    """A directory of tokens with train/ and whatever else `texts` has."""
    for name, documents in texts.items():
        source = folder.with_name(f"{folder.name}_{name}.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        assert main(["tokenize", f"--input={source}", f"--out={folder / name}", "--holdout_every=0"]) == 0
    return folder


def test_points_are_compared_on_the_same_held_out_text(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train = ["abcdefgh " * 400, "hgfedcba " * 400]
    without, one, other = tmp_path / "without", tmp_path / "one", tmp_path / "other"
    written(without, {"train": train})
    written(one, {"train": train, "heldout": ["abc " * 400]})
    written(other, {"train": train, "heldout": ["cba " * 400]})
    command = ["sweep", f"--config={study_file}", f"--workdir={tmp_path / 's'}"]
    refuses(capsys, tmp_path, [*command, f"--config.data.path={without}"], "has no held-out domain")
    both = tmp_path / "both.py"
    both.write_text(STUDY.replace('grid.over("train.batch_tokens", (64, 128))', f'grid.over("data.path", ({str(one)!r}, {str(other)!r}))'))
    refuses(
        capsys, tmp_path, ["sweep", f"--config={both}", f"--workdir={tmp_path / 's'}"], "of different held-out text", str(one), str(other)
    )
    assert main(["sweep", f"--config={study_file}", "--dry_run", f"--config.data.path={one}"]) == 0


def test_held_out_text_that_changed_is_another_study(study_file: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    folder = written(tmp_path / "data", {"train": ["abcdefgh " * 800], "heldout": ["abc " * 400]})
    engine = FakeEngine(tmp_path / "s")
    monkeypatch.setattr("scaling_jax.verbs.sweep._engine", lambda *_: engine)
    command = ["sweep", f"--config={study_file}", f"--workdir={tmp_path / 's'}", f"--config.data.path={folder}"]
    assert main(command) == 0
    shutil.rmtree(folder / "heldout")
    written(folder, {"heldout": ["cba " * 400]})
    refuses(capsys, tmp_path / "s", command, "holds other data than the study was begun with")


def test_a_damaged_shard_is_found_before_anything_is_trained(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = written(tmp_path / "data", {"train": ["abcdefgh " * 800], "heldout": ["abc " * 400]})
    shard = max((path for path in (folder / "train").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(bytes(content))
    refuses(
        capsys, tmp_path, ["sweep", f"--config={study_file}", f"--workdir={tmp_path / 's'}", f"--config.data.path={folder}"], str(shard)
    )
