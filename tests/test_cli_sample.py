"""`scaling-jax sample` and `scaling-jax export` as their users meet them: text, files, messages, exit codes; and docs/interop.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scaling_jax.cli import main
from scaling_jax.data.tokenizers import ByteTokenizer
from scaling_jax.interop.opening import open_model
from scaling_jax.train.checkpoint import Checkpoints
from scaling_jax.train.opened import open_run

ROOT = Path(__file__).parent.parent
CONFIG = """
from scaling_jax.config import default_config


def get_config():
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = 16, 2, 8, 16
    config.model.vocab_size = 300
    config.parametrization.base_width, config.parametrization.base_head_dim = 8, 4
    config.optimizer.lr = 0.02
    config.train.tokens, config.train.batch_tokens = 12800, 64
    config.checkpoint.keep_at_tokens = (3200,)
    config.data.path, config.data.repeat = {path!r}, True
    config.eval.tokens, config.eval.batch_sequences = 32, 2
    config.logging.every_tokens = 6400
    config.logging.tensorboard, config.noise_scale.every = False, 0
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compilation):
    root = tmp_path_factory.mktemp("runs")
    (root / "texts").mkdir()
    for n in range(4):
        (root / "texts" / f"{n}.txt").write_text("Tokens and noise, as ever: é. " * 20)
    assert main(["tokenize", f"--input={root / 'texts'}", f"--out={root / 'tokens'}", "--holdout_every=4"]) == 0
    (root / "tiny.py").write_text(CONFIG.format(path=str(root / "tokens")))
    assert main(["train", f"--config={root / 'tiny.py'}", f"--workdir={root / 'run'}"]) == 0
    return root / "run"


def sampled(capsys, run, *args):
    capsys.readouterr()
    assert main(["sample", f"--run={run}", "--prompt=Tok", "--tokens=40", *args]) == 0
    return capsys.readouterr().out


def test_the_same_seed_gives_the_same_text(run, capsys):
    a, again, b = (sampled(capsys, run, f"--seed={seed}") for seed in (0, 0, 1))
    assert a == again != b and a.startswith("Tok") and a.endswith("\n")


def test_several_texts_differ_and_the_first_is_the_one_alone(run, capsys):
    one, three = sampled(capsys, run), sampled(capsys, run, "--samples=3")
    texts = re.split(r"^--- \d of 3\n", three, flags=re.MULTILINE)
    assert len(set(texts)) == 4 and texts[0] == "" and texts[1] == one


def test_the_likeliest_text_is_that_of_the_whole_forward_pass(run, capsys):
    """16 tokens of context hold the prompt and 12 more: no cache, no verb, no tokenizer in this one."""
    forward, tokens = jax.jit(open_model(run)), list(b"Tok")
    for _ in range(13):
        padded = np.pad(np.asarray([tokens], np.int32), ((0, 0), (0, 16 - len(tokens))))
        tokens.append(int(np.argmax(forward(padded)[0, len(tokens) - 1, :256])))
    found = sampled(capsys, run, "--temperature=0", "--tokens=13")
    assert found == ByteTokenizer().decode(tokens) + "\n"


def test_it_stops_where_the_document_ends(run, capsys, monkeypatch):
    text = sampled(capsys, run, "--temperature=0").encode()
    end = next(i for i in range(8, len(text)) if text[i] not in text[3:i])  # a byte that it has not written before
    monkeypatch.setattr(ByteTokenizer, "end_token", text[end])
    assert sampled(capsys, run, "--temperature=0").encode() == text[:end] + b"\n"


def test_no_prompt_begins_a_document(run, capsys):
    assert main(["sample", f"--run={run}", "--prompt=", "--tokens=5", "--temperature=0"]) == 0
    begun = capsys.readouterr().out
    forward = jax.jit(open_model(run))
    first = int(np.argmax(forward(np.asarray([[255] + 15 * [0]], np.int32))[0, 0, :256]))
    assert begun[0] == chr(first)


def test_a_long_prompt_says_what_is_read(run, capsys):
    assert main(["sample", f"--run={run}", f"--prompt={'noise, ' * 4}", "--tokens=2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("noise, noise, noise, noise, ")
    assert err == "--prompt has 28 tokens, of which the last 16, the model's context, are read\n"


def test_a_file_in_the_place_of_the_checkpoint(run, capsys, tmp_path):
    """Sampling from what was exported gives the very text; another checkpoint gives another."""
    file, old = tmp_path / "new" / "m.safetensors", tmp_path / "old.safetensors"
    assert main(["export", f"--run={run}", f"--out={file}"]) == 0
    said = capsys.readouterr().out
    assert said == f"{file}: 14 tensors, 15,744 parameters, float32, of the checkpoint at 12,800 tokens\n"
    assert sampled(capsys, run, f"--params={file}") == sampled(capsys, run)
    assert main(["export", f"--run={run}", f"--out={old}", "--at_tokens=3200"]) == 0
    assert sampled(capsys, run, f"--params={old}") == sampled(capsys, run, "--at_tokens=3200") != sampled(capsys, run)
    assert main(["export", f"--run={run}", f"--out={file}", "--fold_multipliers"]) == 0
    plain, folded = load_file(old), load_file(file)
    assert set(plain) == set(folded)
    assert main(["sample", f"--run={run}", "--prompt=", f"--params={file}"]) == 2  # the run is mup, the file standard
    assert "fold_multipliers" in capsys.readouterr().err


def test_the_header_says_what_the_run_was(run, tmp_path):
    assert main(["export", f"--run={run}", f"--out={tmp_path / 'm.safetensors'}"]) == 0
    raw = (tmp_path / "m.safetensors").read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert json.loads(metadata["parametrization"])["name"] == "mup" and json.loads(metadata["config"])["vocab_size"] == 300
    assert metadata["tokens"] == "12800" and metadata["tokenizer"] == "bytes"
    multipliers = {"attention_scale": 0.25, "residual_multiplier": 1.0, "logit_multiplier": 0.5}
    assert json.loads(metadata["multipliers"]) == pytest.approx(multipliers)


@pytest.mark.parametrize(
    ("verb", "args", "words"),
    [
        ("sample", ["--prompt=a"], "--run=DIR is missing"),
        ("sample", ["--run=RUN"], "--prompt=TEXT is missing"),
        ("sample", ["--run=RUN", "--prompt=a", "--temperature=-1"], "--temperature=-1.0: must be a number, 0 or more"),
        ("sample", ["--run=RUN", "--prompt=a", "--temperature=nan"], "--temperature=nan: must be"),
        ("sample", ["--run=RUN", "--prompt=a", "--top_p=0"], "--top_p=0.0: must be greater than 0, and at most 1"),
        ("sample", ["--run=RUN", "--prompt=a", "--top_p=1.01"], "--top_p=1.01: must be"),
        ("sample", ["--run=RUN", "--prompt=a", "--tokens=0"], "--tokens=0: must be at least 1"),
        ("sample", ["--run=RUN", "--prompt=a", "--samples=0"], "--samples=0: must be at least 1"),
        ("sample", ["--run=RUN", "--prompt=a", "--seed=-1"], "--seed=-1: must be from 0 to 4294967295"),
        ("sample", ["--run=RUN", "--prompt=\udcff"], r"--prompt='\udcff': must be UTF-8"),
        ("sample", ["--run=RUN", "--prompt=a", "--params=x", "--at_tokens=3200"], "--at_tokens=3200: names a checkpoint, but"),
        ("sample", ["--run=RUN", "--prompt=a", "--params=absent.safetensors"], "absent.safetensors: cannot be read: no such file"),
        ("sample", ["--run=RUN", "--prompt=a", "--at_tokens=7"], "--at_tokens=7: "),
        ("sample", ["--run=RUN", "--prompt=a", "--params="], "--params=: must be a safetensors file"),
        ("sample", ["--run=RUN", "--prompt=a", "--tokenizer="], "--tokenizer=: must be 'bytes', a tokenizer.json"),
        ("sample", ["--run=absent", "--prompt=a"], "--run=absent: no such directory"),
        ("sample", ["--run=RUN", "--prompt=a", "--tokenizer=absent.json"], "--tokenizer: absent.json: cannot be read"),
        ("export", ["--out=x.safetensors"], "--run=DIR is missing"),
        ("export", ["--run=RUN"], "--out=FILE.safetensors is missing"),
        ("export", ["--run=RUN", "--out=x.npz"], "--out=x.npz: must be the name of a .safetensors file"),
        ("export", ["--run=RUN", "--out=x.safetensors", "--at_tokens=7"], "--at_tokens=7: "),
    ],
)
def test_bad_input_is_one_message(run, capsys, monkeypatch, tmp_path, verb, args, words):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([verb, *(arg.replace("RUN", str(run)) for arg in args)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"scaling-jax {verb}: ") and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def moved_run(run, to, **fields):
    to.mkdir()
    (to / "checkpoints").symlink_to(run / "checkpoints")
    stored = json.loads((run / "config.json").read_text())
    for section, changed in fields.items():
        stored["config"][section] |= changed
    (to / "config.json").write_text(json.dumps(stored))
    return to


def test_it_computes_in_float32(run, capsys, tmp_path):
    moved, file = moved_run(run, tmp_path / "run", model={"compute_dtype": "bfloat16"}), tmp_path / "m.safetensors"
    assert main(["export", f"--run={moved}", f"--out={file}"]) == 0
    for params in (None, file):
        assert open_model(moved, params=params).config.compute_dtype == "float32"
    assert sampled(capsys, moved) == sampled(capsys, run)


def test_parameters_that_are_not_finite_are_named(run, capsys, tmp_path):
    def spoilt(path, param):
        return param.replace(param.get_value().at[..., 1].set(jnp.inf)) if path[-1] in ("key", "unembedding") else param

    moved = Path(shutil.copytree(run, tmp_path / "run"))
    with Checkpoints(moved, 9) as checkpoints:
        checkpoints.save(12864, {"params": nnx.map_state(spoilt, open_run(run).params)})
    for verb, flag in (("sample", "--prompt=a"), ("export", f"--out={tmp_path / 'm.safetensors'}")):
        assert main([verb, f"--run={moved}", flag]) == 2
        out, err = capsys.readouterr()
        assert out == "" and f"{moved}/checkpoints/12864: not finite: blocks.key, unembedding; the parameters are spoilt" in err
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_where_no_text_can_be_written(run, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["sample", f"--run={run}", "--prompt=a", "--tokens=3"]) == 2
    assert capsys.readouterr().err == "scaling-jax sample: the text cannot be written: No space left on device\n"


INTERRUPTED = """
import os, signal, sys, time

class Importing:  # as NumPy's C modules, which make an ImportError of it
    def find_spec(self, name, *_):
        if name == sys.argv[2]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                raise ImportError("half of it")

sys.meta_path.insert(0, Importing())
from scaling_jax.cli import main
sys.exit(main([sys.argv[1], "--run=" + sys.argv[3], *sys.argv[4:]]))
"""


@pytest.mark.parametrize(
    ("verb", "module", "flags"),
    [
        ("eval", "jax", []),
        ("sample", "scaling_jax.train.opened", ["--prompt=a"]),
        ("export", "scaling_jax.interop.weights_file", ["--out=x.safetensors"]),
    ],
)
def test_ctrl_c_amid_the_imports_is_one_line(run, tmp_path, verb, module, flags):
    command = [sys.executable, "-c", INTERRUPTED, verb, module, str(run), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"scaling-jax {verb}: interrupted\n")


def save_tokenizer(path, tokens):
    made = Tokenizer(models.BPE({"<|endoftext|>": 0} | {c: n + 1 for n, c in enumerate(tokens)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(path))


def test_a_tokenizer_that_is_not_the_runs(run, capsys, tmp_path):
    """Its fingerprint is compared with the data's; it may not have more tokens than the model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for tokens, words in (
        (alphabet, "is not what the run's data were made with"),
        (map(str, range(400)), "has 401 tokens, the run's model 300"),
    ):
        save_tokenizer(tmp_path / "t.json", tokens)
        assert main(["sample", f"--run={run}", "--prompt=a", f"--tokenizer={tmp_path / 't.json'}"]) == 2
        assert words in capsys.readouterr().err


def test_a_missing_tokenizer_file_is_named_with_its_field(run, capsys, tmp_path):
    moved = moved_run(run, tmp_path / "run", data={"tokenizer": "gone.json", "path": "gone"})
    assert main(["sample", f"--run={moved}", "--prompt=a"]) == 2
    err = capsys.readouterr().err
    assert f"--run={moved}: its config.data.tokenizer: gone.json: cannot be read" in err and "--tokenizer=FILE says where it is now" in err
    assert sampled(capsys, moved, "--tokenizer=bytes") == sampled(capsys, run)


def test_the_snippets_of_the_page_run(tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/interop.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    (tmp_path / "page.py").write_text("\n".join(snippets))
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # they compile for longer than they compute
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    *losses, difference = map(float, done.stdout.split())
    assert losses[-1] < losses[0] and difference < 1e-5
