"""The command line as its users meet it, errors above all: one message, the right exit code, and nothing half-written."""

import errno
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from scaling_jax import config as config_lib
from scaling_jax import console
from scaling_jax.cli import VERBS, main
from scaling_jax.console import LiveLine
from scaling_jax.data.tokenizers import ByteTokenizer
from scaling_jax.train.metrics import MetricsWriter, Progress, read_records

CONFIG = """
from scaling_jax.config import default_config


def get_config():
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = 16, 1, 8, 16
    config.parametrization.base_width, config.parametrization.base_depth, config.parametrization.base_head_dim = 16, 1, 8
    config.optimizer.lr = 0.01
    config.train.tokens, config.train.batch_tokens = 640, 64
    config.data.path = {path!r}
    config.data.repeat = True
    config.eval.tokens, config.eval.batch_sequences = 256, 16
    config.logging.tensorboard = False
    return config
"""


def write_texts(directory: Path, documents: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    directory.mkdir()
    for n in range(documents):
        (directory / f"{n:03}.txt").write_text(" ".join(rng.choice(["tok", "ens", "and", "noise", "Ü"], 200)))
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    texts = write_texts(root / "texts", 12)
    assert main(["tokenize", f"--input={texts}", f"--out={root / 'tokens'}", "--holdout_every=4"]) == 0
    return root / "tokens"


@pytest.fixture(scope="module")
def config_file(tokens: Path) -> Path:
    path = tokens.parent / "tiny.py"
    path.write_text(CONFIG.format(path=str(tokens)))
    return path


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    """main() leaves the signal handlers of a notebook, or of these tests, as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def snapshot(directory: Path) -> dict[str, bytes] | None:
    """Every file's content but the lock's; None where there is no directory."""
    if not directory.is_dir():
        return None
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock"}


class Shell:
    """Runs `train` on the tiny config in one work directory."""

    def __init__(self, config_file: Path, workdir: Path, capsys: pytest.CaptureFixture[str]):
        self.config_file, self.workdir, self.capsys = config_file, workdir, capsys

    def command(self, *args: str) -> list[str]:
        return ["train", f"--config={self.config_file}", f"--workdir={self.workdir}", *args]

    def train(self, *args: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main(self.command(*args))
        return code, *self.capsys.readouterr()

    def refuses(self, argv: list[str], *words: str) -> str:
        """Exit code 2, one message with all `words`, no traceback, the work directory and its parent as before."""
        before, beside = snapshot(self.workdir), sorted(self.workdir.parent.iterdir())
        self.capsys.readouterr()
        assert main(argv) == 2
        out, err = self.capsys.readouterr()
        assert out == ""
        assert err.startswith("scaling-jax") and err.count("scaling-jax train:") <= 1
        assert "Traceback" not in err
        for word in words:
            assert word in err
        assert snapshot(self.workdir) == before and sorted(self.workdir.parent.iterdir()) == beside
        return err

    def refuses_train(self, args: list[str], *words: str) -> str:
        return self.refuses(self.command(*args), *words)

    def summary(self) -> dict:
        return json.loads((self.workdir / "summary.json").read_text())

    def records(self) -> list[dict]:
        return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_records(self.workdir)]


@pytest.fixture
def shell(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(config_file, tmp_path / "run", capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems of so many bytes, which takes root."""
    mounted = []

    def mount(size: str, *options: str) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        done = shutil.which("mount") and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(directory)], capture_output=True
        )
        if not done or done.returncode:
            pytest.skip("a small tmpfs cannot be mounted here; that takes root")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


# Flags


@pytest.mark.parametrize(
    "args, words",
    [
        (["--config.model.widht=3"], ["--config.model.widht: no such field (did you mean config.model.width?)"]),
        (["--config.width=3"], ["--config.width: no such field (did you mean config.model.width?)"]),
        (["--config.foo=3"], ["--config.foo: no such field"]),
        (["--config.model=3"], ["--config.model: no such field"]),
        (["--config.a=1", "--config.model.depth=x"], ["--config.a: no such field", "--config.model.depth=x: must be an integer"]),
        (["--config.model.width=1.5"], ["--config.model.width=1.5: must be an integer"]),
        (["--config.model.width=1e3"], ["--config.model.width=1e3: must be an integer"]),
        (["--config.model.width="], ["--config.model.width=: must be an integer"]),
        (["--config.model.width"], ["--config.model.width: needs a value"]),
        (["--noconfig.model.width"], ["--noconfig.model.width: needs a value"]),
        (["--config.optimizer.lr=abc"], ["--config.optimizer.lr=abc: must be a number"]),
        (["--config.data.repeat=yes"], ["--config.data.repeat=yes: must be true or false"]),
        (["--config.checkpoint.keep_at_tokens=(100,x)"], ["--config.checkpoint.keep_at_tokens=(100,x): must be a tuple"]),
        (["--wrkdir=W"], ["--wrkdir: no such flag (did you mean --workdir?)"]),
        (["--noverwrite"], ["--noverwrite: no such flag (did you mean --overwrite?)"]),
        (["--zzz"], ["--zzz: no such flag; there are --config, --workdir, --overwrite"]),
        (["--overwrite=maybe"], ["--overwrite=maybe: must be true or false"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["config.model.width=32"], ["unexpected argument 'config.model.width=32'", "--flag=value"]),
        (["--", "--config.model.width=32"], ["unexpected argument '--config.model.width=32'"]),
        (["--flagfile=nowhere"], ["nowhere"]),
        (["--workdir="], ["--workdir=DIR is missing"]),
        (["--workdir"], ["--workdir"]),
        (["--workdir=gs://bucket/run"], ["--workdir=gs://bucket/run: must be a directory"]),
        (["--config="], ["--config=FILE is missing"]),
    ],
)
def test_wrong_flags_are_named(shell: Shell, args: list[str], words: list[str]):
    shell.refuses_train(args, *words)


def test_missing_flags_and_verbs_are_named(shell: Shell, capsys: pytest.CaptureFixture[str]):
    shell.refuses(["train", f"--workdir={shell.workdir}"], "--config=FILE is missing")
    shell.refuses(["train", f"--config={shell.config_file}"], "--workdir=DIR is missing")
    shell.refuses(["parametrization"], "--config=FILE is missing")
    shell.refuses(["parametrization", "--workdir=x"], "--workdir: no such flag")
    shell.refuses(["trian"], "no such verb: trian (did you mean train?); there are train, tokenize")
    shell.refuses(["--config=x.py"], "no such verb: --config=x.py")
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("help_flag", ["--help", "-h"])
def test_help_names_every_flag(help_flag: str, capsys: pytest.CaptureFixture[str]):
    assert main([help_flag]) == 0
    overview = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert name in overview and verb.summary in overview
        assert main([name, help_flag]) == 0
        text, err = capsys.readouterr()
        flags = {
            "train": ["config", "workdir", "overwrite", "profile_at_tokens"],
            "tokenize": [
                "input",
                "out",
                "tokenizer",
                "holdout_every",
                "split_documents",
                "stretch_characters",
                "field",
                "skip_bad",
                "shard_tokens",
                "workers",
            ],
            "train-tokenizer": ["input", "out", "vocab_size", "field", "split_documents", "max_bytes", "skip_bad"],
            "eval": ["run", "data", "at_tokens", "eval_tokens", "out"],
            "sample": ["run", "prompt", "tokens", "temperature", "top_p", "params", "tokenizer"],
            "export": ["run", "out", "at_tokens", "fold_multipliers"],
            "parametrization": ["config"],
        }
        assert err == "" and all(re.search(rf"^  --{flag}\b", text, re.MULTILINE) for flag in flags.get(name, []))
        if name in ("train", "parametrization"):
            assert all(f"--config.{field} " in text for field in config_lib.FIELDS)
    assert main(["train", "--config=nowhere.py", help_flag]) == 0  # a user who is stuck


def test_overrides_are_taken_however_they_are_written(shell: Shell, tmp_path: Path):
    (tmp_path / "flags").write_text("--config.optimizer.lr=0.5\n")
    code = main(
        [
            "train",
            "--config.model.mlp=relu2",  # before the file that it changes
            "--config",
            str(shell.config_file),
            "--workdir",
            str(shell.workdir),
            "--config.train.tokens",
            "128",
            "--noconfig.data.repeat",
            "--config.logging.tensorboard",
            "--config.checkpoint.keep_at_tokens=64,128",
            "--config.optimizer.weight_decay=-1",
            "--config.optimizer.weight_decay=1e-2",
            f"--flagfile={tmp_path / 'flags'}",
        ]
    )
    assert code == 0
    config = json.loads((shell.workdir / "config.json").read_text())["config"]
    assert config["model"]["mlp"] == "relu2" and config["train"]["tokens"] == 128 and config["data"]["repeat"] is False
    assert config["logging"]["tensorboard"] is True and config["checkpoint"]["keep_at_tokens"] == [64, 128]
    assert config["optimizer"]["weight_decay"] == 0.01 and config["optimizer"]["lr"] == 0.5
    assert shell.summary()["checkpoints"] == [64, 128]
    assert any((shell.workdir / "tensorboard").iterdir())


# Config files


@pytest.mark.parametrize(
    "source, words",
    [
        ("c.model.widht = 3", ["line 4: no such field: widht (did you mean config.model.width?)"]),
        ("c.modle.width = 3", ["line 4: no such field: modle"]),
        ("c['foo'] = 3", ["line 4: no such field: foo"]),
        ("c.model.width = 'x'", ["line 4: width is x: must be of type int"]),
        ("c.optimizer.lr = None", ["config.optimizer.lr is None: must be of type float"]),
        ("c.model = 3", ["line 4: model is 3: must be of type ConfigDict"]),
        ("1 / 0", ["line 4: ZeroDivisionError: division by zero"]),
        ("import nosuchmodule", ["line 4: ModuleNotFoundError: No module named 'nosuchmodule'"]),
        ("raise SystemExit(3)", ["line 4: SystemExit: 3"]),
        ("c = {'model': 3}", ["get_config() returned dict", "default_config()"]),
        ("c = None", ["get_config() returned NoneType"]),
        ("c.unlock(); c.model.foo = 3", ["config.model.foo: no such field"]),
        ("c.unlock(); del c.model.width", ["config.model.width: missing"]),
    ],
)
def test_faults_of_a_config_file_are_placed(shell: Shell, tmp_path: Path, source: str, words: list[str]):
    path = tmp_path / "c.py"
    path.write_text(
        f"from scaling_jax.config import default_config\ndef get_config():\n    c = default_config()\n    {source}\n    return c\n"
    )
    words = [f"--config={path}"] + words if "line" in words[0] or "returned" in words[0] else words
    shell.refuses(["train", f"--config={path}", f"--workdir={shell.workdir}"], *words)


def test_files_that_are_no_config_are_named(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(path: Path | str, *words: str) -> None:
        shell.refuses(["train", f"--config={path}", f"--workdir={shell.workdir}", "--config.model.depth=2"], f"--config={path}", *words)

    (tmp_path / "syntax.py").write_text("x = 1\ndef get_config(:\n")
    refuses(tmp_path / "syntax.py", "line 2: syntax error")
    (tmp_path / "none.py").write_text("x = 1\n")
    refuses(tmp_path / "none.py", "defines no function get_config()")
    (tmp_path / "value.py").write_text("get_config = 1\n")
    refuses(tmp_path / "value.py", "defines no function get_config()")
    refuses(tmp_path, "is a directory")
    monkeypatch.chdir(tmp_path)  # as from another folder than the commands of the documentation
    refuses("configs/cpu_demo.py", f"no such file, seen from {tmp_path}")
    shell.refuses(["train", "--config", f"--workdir={shell.workdir}"], "no such file")


# What is wrong between flags, data and machine


@pytest.mark.parametrize(
    "args, words",
    [
        (["model.width=-16"], ["config.model.width is -16: must be at least 1"]),
        (["model.depth=0", "train.tokens=-1"], ["config.model.depth is 0: must be at least 1", "config.train.tokens is -1"]),
        (["optimizer.lr=0"], ["config.optimizer.lr is 0.0: must be greater than 0"]),
        (["optimizer.lr=nan"], ["config.optimizer.lr is nan: must be greater than 0"]),
        (["optimizer.lr=inf"], ["config.optimizer.lr is inf: must be finite"]),
        (["train.seed=4294967296"], ["config.train.seed is 4294967296: must be less than 4294967296"]),
        (["model.mlp=foo"], ["config.model.mlp is 'foo': must be one of gelu, relu2, swiglu"]),
        (["model.width=17"], ["config.model.width is 17: must be a multiple of config.model.head_dim, 8"]),
        (["train.batch_tokens=65"], ["config.train.batch_tokens is 65: must be a multiple of 16"]),
        (["train.accumulation=3"], ["config.train.batch_tokens is 64: must be a multiple of 48", "accumulation 3"]),
        (["mesh.replica=3", "train.batch_tokens=48"], ["config.mesh is replica 3 x fsdp 1", "= 3 devices: must equal the"]),
        (["mesh.replica=3", "mesh.fsdp=-1"], ["config.mesh is replica 3", "= 3 devices: must equal the"]),
        (["mesh.fsdp=0"], ["config.mesh.fsdp is 0: must be positive, or -1"]),
        (["mesh.fsdp=-2"], ["config.mesh.fsdp is -2: must be at least -1"]),
        (["schedule.warmup_tokens=641"], ["config.schedule.warmup_tokens is 641: longer than the run, config.train.tokens 640"]),
        (["train.batch_tokens=16"], ["config.train.batch_tokens is 16: one sequence", "at least 32, or config.noise_scale.every=0"]),
        (["checkpoint.keep_at_tokens=5000"], ["config.checkpoint.keep_at_tokens has 5000: must be integers from 1 to"]),
        (["checkpoint.keep_at_tokens=foo"], ["config.checkpoint.keep_at_tokens has 'foo'"]),
        (["data.eval_domains=foo"], ["config.data.eval_domains has 'foo': must be 'name=directory'"]),
        (["data.eval_domains=x=nowhere"], ["nowhere/index.json: no such file"]),
        (["data.path=nowhere"], ["config.data.path is 'nowhere'", "scaling-jax tokenize"]),
        (["data.tokenizer=nowhere.json"], ["nowhere.json: cannot be read as a tokenizer"]),
        (["model.vocab_size=255"], ["config.model.vocab_size is 255: must be at least 256", "tokenizer, bytes"]),
        (["model.context=16384", "train.batch_tokens=32768", "train.tokens=32768"], ["tokens; a sequence needs 16385", "context 16384"]),
        (["data.repeat=false", "train.tokens=640000"], ["config.train.tokens", "config.data.repeat=True"]),
        (["eval.tokens=3"], ["config.eval.tokens is 3: must be 0 or at least one sequence"]),
    ],
)
def test_values_that_cannot_be_are_named(shell: Shell, args: list[str], words: list[str]):
    shell.refuses_train([f"--config.{arg}" for arg in args], *words)


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "index"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_damaged_shards_are_named(shell: Shell, tokens: Path, tmp_path: Path, damage: str, split: str):
    copy = tmp_path / "copy"
    shutil.copytree(tokens, copy)
    shard = copy / split / "tokens-00000.bin"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-2])
    elif damage == "changed":
        shard.write_bytes(content[:100] + b"\1" + content[101:])
    else:
        shard = copy / split / "index.json"
        shard.write_text(shard.read_text()[:50])
    shell.refuses_train([f"--config.data.path={copy}"], str(shard))


def test_data_of_another_tokenizer_are_refused(shell: Shell, tokens: Path, tmp_path: Path):
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[SEP]": 1, "tok": 2}, unk_token="[UNK]"))
    inner.save(str(tmp_path / "tokenizer.json"))
    shell.refuses_train(
        [f"--config.data.tokenizer={tmp_path / 'tokenizer.json'}"], str(tokens), "made with tokenizer bytes", "tokenizer.json"
    )
    shell.refuses_train([f"--config.data.tokenizer={tokens / 'train' / 'index.json'}"], "index.json: not a Hugging Face tokenizer.json")
    texts = write_texts(tmp_path / "texts", 2)
    assert (
        main(
            [
                "tokenize",
                f"--input={texts}",
                f"--out={tmp_path / 'words'}",
                f"--tokenizer={tmp_path / 'tokenizer.json'}",
                "--holdout_every=0",
            ]
        )
        == 0
    )
    shell.refuses_train([f"--config.data.eval_domains=x={tmp_path / 'words'}"], str(tmp_path / "words"), "bytes")
    shell.refuses_train([f"--config.data.eval_domains=heldout={tmp_path / 'words'}"], "there is already a domain 'heldout'")


# The work directory


def test_another_run_is_refused_and_its_own_continues(shell: Shell):
    assert shell.train()[0] == 0
    err = shell.refuses_train(
        ["--config.optimizer.lr=0.02", "--config.train.seed=1"],
        f"--workdir={shell.workdir}",
        "config.optimizer.lr: 0.01 there, 0.02 here",
        "config.train.seed: 0 there, 1 here",
        "--overwrite",
    )
    assert "batch_tokens" not in err
    assert shell.train("--config.eval.every_tokens=64", "--config.logging.every_tokens=128")[0] == 0  # only how, not what
    assert shell.records()[-1]["tokens"] == 640
    code, out, _ = shell.train("--config.train.seed=1", "--config.logging.every_tokens=320", "--overwrite")
    assert code == 0 and "finished" in out
    assert [record["tokens"] for record in shell.records() if "loss" in record] == [320, 640]
    assert json.loads((shell.workdir / "config.json").read_text())["identity"]["train.seed"] == 1


def test_execution_may_change_in_the_middle(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, 5)
    assert shell.train()[0] == 143
    monkeypatch.undo()
    code, _, err = shell.train("--config.eval.every_tokens=64", "--config.logging.every_tokens=320", "--config.train.accumulation=2")
    assert code == 0 and "continuing from the checkpoint at 320 tokens" in err
    losses = [record["tokens"] for record in shell.records() if "loss" in record]
    evaluations = [record["tokens"] for record in shell.records() if "eval/heldout/loss" in record]
    assert losses == [64, 128, 192, 256, 320, 640] and evaluations == [384, 448, 512, 576, 640]


def stop_after(monkeypatch: pytest.MonkeyPatch, records: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal at the n-th record, as a scheduler does."""
    write, written = MetricsWriter.write, []

    def stopping(self: MetricsWriter, record: dict) -> None:
        write(self, record)
        written.append(record)
        if len(written) == records - 1:  # the next step is on its way
            signal.raise_signal(number)

    monkeypatch.setattr(MetricsWriter, "write", stopping)
    monkeypatch.setattr("scaling_jax.train.loop.RECORDS_AT_ONCE", 1)


def test_a_workdir_in_use_is_refused(shell: Shell):
    shell.workdir.mkdir()
    with open(shell.workdir / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        shell.refuses_train([], f"--workdir={shell.workdir}: in use by another process")
        shell.refuses_train(["--overwrite"], "in use by another process")


def test_places_that_are_no_workdir_are_named(shell: Shell, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    shell.refuses_train([f"--workdir={file}"], f"--workdir={file}: is a file, must be a directory")
    shell.refuses_train([f"--workdir={file}/run"], f"--workdir={file}/run: cannot be written: Not a directory")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shell.refuses_train([f"--workdir={tmp_path}/link"], "cannot be written")
    shell.workdir.mkdir()
    (shell.workdir / "figures").mkdir()
    (shell.workdir / "figures" / "mine.png").write_text("precious")
    shell.refuses_train(["--overwrite"], "holds figures of something else than a run")
    assert (shell.workdir / "figures" / "mine.png").exists()


def test_a_workdir_that_cannot_be_written_is_named(shell: Shell, tmp_path: Path, request: pytest.FixtureRequest):
    if os.geteuid() == 0:  # root heeds no permissions, but a read-only file system
        sealed = request.getfixturevalue("small_disk")("64k", "ro")
    else:
        sealed = tmp_path / "sealed"
        sealed.mkdir(mode=0o500)
    shell.refuses_train([f"--workdir={sealed / 'run'}"], f"--workdir={sealed / 'run'}: cannot be written: ")


# A full disk


def test_a_full_disk_stops_metrics_with_a_message(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    init = MetricsWriter.__init__

    def on_full_disk(self: MetricsWriter, *args: object) -> None:
        init(self, *args)
        self._file.close()
        self._file = open("/dev/full", "ab")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "__init__", on_full_disk)
        code, out, err = shell.train()
    assert code == 2 and out == "" and "Traceback" not in err
    assert f"--workdir={shell.workdir}: no space left" in err
    assert shell.train()[0] == 0


def test_a_full_disk_stops_checkpoints_with_a_message(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
        code, out, err = shell.train()
    assert code == 2 and out == "" and "Traceback" not in err
    assert "no space left" in err and str(shell.workdir) in err
    assert not any(path.name.isdigit() for path in (shell.workdir / "checkpoints").iterdir())
    assert shell.train()[0] == 0


def test_a_full_disk_stops_the_claim_with_a_message(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        code, _, err = shell.train()
    assert code == 2 and f"--workdir={shell.workdir}: no space left" in err
    assert snapshot(shell.workdir) == {}
    assert shell.train()[0] == 0  # the lock is free again


def test_a_truly_full_disk(shell: Shell, small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    disk = small_disk("12k")
    shell.workdir = disk / "run"
    for tensorboard in ("true", "false"):
        code, out, err = shell.train(f"--config.logging.tensorboard={tensorboard}")
        assert code == 2 and out == "" and "Traceback" not in err
        assert f"--workdir={shell.workdir}: no space left" in err
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert shell.train()[0] == 0
    assert [record["step"] for record in shell.records()] == [*range(1, 11), 10]

    other = small_disk("8k")
    for every in (0, 4):
        code = main(
            ["tokenize", f"--input={write_texts(tmp_path / f'texts{every}', 12)}", f"--out={other / 'out'}", f"--holdout_every={every}"]
        )
        assert code == 2 and f"{other / 'out'}: no space left on the disk; nothing was written" in capsys.readouterr().err
        assert not any(other.iterdir())


# The course of a run


def test_divergence_is_recorded_and_the_last_checkpoint_kept(shell: Shell):
    run = ["--config.optimizer.lr=1e20", "--config.optimizer.clip_norm=0", "--config.checkpoint.every_tokens=64"]
    for _ in range(2):  # the same command diverges again
        code, out, err = shell.train(*run)
        assert code == 1 and "diverged" in out
        *before, last = (shell.workdir / "metrics.jsonl").read_text().splitlines()
        assert "NaN" not in last and "Infinity" not in last
        last = json.loads(last)
        assert None in last.values() and last["event"] == "not finite" and last["tokens"] == 64 * (len(before) + 1)
        summary = shell.summary()
        assert summary["status"] == "diverged" and summary["tokens"] == last["tokens"]
        assert summary["checkpoints"] and summary["checkpoints"][-1] < last["tokens"]
        assert f"not finite at {last['tokens']:,} tokens; the checkpoint at {summary['checkpoints'][-1]:,} tokens is kept" in err


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_continues_as_if_it_never_stopped(shell: Shell, tmp_path: Path, number: int, code: int):
    args = ["--config.train.tokens=12800", "--config.eval.every_tokens=3200", "--config.checkpoint.every_tokens=6400"]
    command = [sys.executable, "-m", "scaling_jax", *shell.command(*args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics, deadline = shell.workdir / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 20):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    summary = shell.summary()
    assert summary["status"] == "interrupted" and summary["signal"] == number and 20 * 64 <= summary["tokens"] < 12800
    assert f"saved at {summary['tokens']:,} tokens; the same command continues" in err
    assert summary["checkpoints"][-1] == summary["tokens"]

    rc, _, err = shell.train(*args)
    assert rc == 0 and f"continuing from the checkpoint at {summary['tokens']:,} tokens" in err
    whole = Shell(shell.config_file, tmp_path / "whole", shell.capsys)
    assert whole.train(*args)[0] == 0
    assert shell.records() == whole.records()
    assert [record["step"] for record in shell.records() if "loss" in record] == list(range(1, 201))


def test_a_finished_run_stays_as_it_is(shell: Shell):
    assert shell.train()[0] == 0
    before = snapshot(shell.workdir)
    started = time.monotonic()
    code, out, err = shell.train()
    assert code == 0 and "finished" in out and "continuing" not in err
    assert time.monotonic() - started < 10
    after = snapshot(shell.workdir)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"summary.json"}


def test_a_finished_run_says_so_and_keeps_its_summary(shell: Shell):
    shell.train()
    before = snapshot(shell.workdir)
    _, _, err = shell.train()
    assert snapshot(shell.workdir) == before
    assert "already finished" in err


@pytest.mark.parametrize("args", [["--config.train.accumulation=2"], ["--config.noise_scale.every=0"]])
def test_the_smallest_batches_train(shell: Shell, args: list[str]):
    """Two sequences suffice for noise, whatever a microbatch holds; one does without."""
    sequences = 2 if "accumulation" in args[0] else 1
    assert shell.train(f"--config.train.batch_tokens={16 * sequences}", "--config.train.tokens=64", *args)[0] == 0
    traces = [record.get("grad_trace") for record in shell.records() if "loss" in record]
    assert all(trace is not None and trace >= 0 for trace in traces) if sequences == 2 else traces == [None] * 4


# Progress


class Terminal(io.StringIO):
    """What a screen shows of what was written: `lines`."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        screen = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            screen.append("".join(cells).rstrip())
        return screen


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


def test_progress_of_a_run(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    _, _, err = shell.train()
    assert "\r" not in err and re.fullmatch(r"64/640 tokens · loss \d\.\d+ · noise scale .* tokens\n", err)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(shell.command("--overwrite")) == 0
    assert "\r" in terminal.getvalue() and len(terminal.lines) == 2 and "/640 tokens · loss" in terminal.lines[0]


def test_not_a_number_never_reaches_metrics(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write({"step": 1, "tokens": 64, "eval/heldout/loss": float("nan"), "loss": np.float64("inf")})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "tokens": 64, "eval/heldout/loss": None, "loss": None}


# The other verbs


def test_tokenize_then_train_with_a_second_domain(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console.time, "monotonic", iter(range(0, 100_000, 20)).__next__)  # every call is due
    texts, more = write_texts(tmp_path / "texts", 10), write_texts(tmp_path / "more", 3, seed=1)
    assert main(["tokenize", f"--input={texts}", f"--out={tmp_path / 'a'}", "--holdout_every=5"]) == 0
    out, err = shell.capsys.readouterr()
    monkeypatch.undo()
    header, *rows = (line.split() for line in out.splitlines())
    assert header == ["split", "documents", "tokens", "bytes", "shards", "directory"]
    for split, documents in (("train", 8), ("heldout", 2)):
        row = next(row for row in rows if row[0] == split)
        index = json.loads((tmp_path / "a" / split / "index.json").read_text())
        assert row[1:] == [str(documents), f"{index['tokens']:,}", f"{index['text_bytes']:,}", "1", str(tmp_path / "a" / split)]
    told = r"^100% · 10/10 files · [\d.,/]+ MB read · [\d,]+ tokens · [\d.,]+ MB/s of text"
    assert "\r" not in err and re.search(told, err, re.MULTILINE)

    assert main(["tokenize", f"--input={more}", f"--out={tmp_path / 'b'}", "--holdout_every=0"]) == 0
    code, out, _ = shell.train(f"--config.data.path={tmp_path / 'a'}", f"--config.data.eval_domains=('x={tmp_path / 'b'}',)")
    assert code == 0 and "x loss" in out and "heldout loss" in out
    assert {"eval/x/loss", "eval/heldout/loss"} <= shell.records()[-1].keys()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--out=O"], ["--input=FILES is missing"]),
        (["--input=T"], ["--out=DIR is missing"]),
        (["--input=T", "--out=O", "--holdout_every=1"], ["--holdout_every=1: must be 0 (none) or at least 2"]),
        (["--input=T", "--out=O", "--holdout_every=-3"], ["--holdout_every=-3: must be"]),
        (["--input=T", "--out=O", "--holdout_every=x"], ["--holdout_every=x: must be an integer"]),
        (["--input=T", "--out=O", "--holdout_every=50"], ["12 documents"]),
        (["--inputt=T", "--out=O"], ["--inputt: no such flag (did you mean --input?)"]),
        (["--input=nowhere", "--out=O"], ["nowhere: no .txt, .jsonl, .parquet file, plain or .gz, .xz, .zst there"]),
        (["--input=T", "--out=O", "--tokenizer=zzz"], ["zzz: cannot be read as a tokenizer"]),
        (["--input=T", "--out=T"], ["T: already exists"]),
        (["--input=E", "--out=O", "--holdout_every=0"], ["no text in 1 files"]),
        (["--input=T", "T", "--out=O"], ["unexpected argument 'T'"]),
        (["--input=T", "--out=O", "--config.model.width=3"], ["--config.model.width: no such flag"]),
    ],
)
def test_tokenize_refuses(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: list[str]):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "T", 12)
    (tmp_path / "E").mkdir()
    (tmp_path / "E" / "blank.txt").write_text("\n")
    shell.refuses(["tokenize", *args], *words)


@pytest.mark.parametrize("every", [0, 4])
def test_an_interrupted_tokenize_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: int
):
    texts = write_texts(tmp_path / "texts", 12)
    encode, calls = ByteTokenizer.encode, []

    def interrupted(self: ByteTokenizer, text: str) -> np.ndarray:
        calls.append(text)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", interrupted)
    assert main(["tokenize", f"--input={texts}", f"--out={tmp_path / 'out'}", f"--holdout_every={every}"]) == 130
    assert capsys.readouterr().err.endswith("scaling-jax tokenize: interrupted; the same command continues\n")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize("name", ["standard", "mup", "completep"])
def test_parametrization_has_a_row_for_every_parameter(config_file: Path, capsys: pytest.CaptureFixture[str], name: str):
    from flax import nnx

    from scaling_jax.train.step import Trainer

    assert main(["parametrization", f"--config={config_file}", f"--config.parametrization.name={name}"]) == 0
    out = capsys.readouterr().out
    params = nnx.to_flat_state(Trainer(config_lib.load(str(config_file))).abstract_state.params)
    names = [".".join(map(str, path)) for path, _ in params]
    table, _, notes = out.partition("\n\n")
    assert sorted(line.split()[0] for line in table.splitlines()[1:]) == sorted(names) and len(names) > 5
    assert f"parametrization {name}" in notes


def test_an_output_that_cannot_be_written_is_said(config_file: Path):
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full")
    command = [sys.executable, "-m", "scaling_jax", "parametrization", f"--config={config_file}"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "scaling-jax parametrization: cannot write: No space left on device\n"
