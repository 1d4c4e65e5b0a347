"""The command line as its users meet it, errors above all: one message, the right exit code, and nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shells import Shell, write_texts

from scaling_jax import config as config_lib
from scaling_jax.cli import VERBS, main

pytestmark = pytest.mark.usefixtures("handlers_stay")


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


# Another verb


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
