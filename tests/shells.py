"""`train` and other verbs as a shell runs them, on a tiny config: fixtures for tests of the command line."""

import io
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.cli import main
from scaling_jax.train.metrics import read_records

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


@pytest.fixture
def handlers_stay() -> Iterator[None]:
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
