"""`scaling-jax plan` as its users meet it: what it prints, exit codes, messages, and the config that it writes."""

import json
import types

import made_laws
import pytest

from scaling_jax import config as config_lib
from scaling_jax.cli import main
from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.laws.lr_surface import bend_form
from scaling_jax.pods import compile as pod_compile
from scaling_jax.verbs.plan_config import config_params, resize

RUN = ["--params=1e9", "--tokens=4e10"]


def base():
    """Fields of a study's base config, as plan.json has them."""
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = 256, 4, 64, 1024
    config.parametrization.base_width, config.parametrization.base_head_dim = 128, 64
    config.schedule.name, config.schedule.warmup_tokens, config.train.tokens = "constant", 1000, 100_000
    config.train.batch_tokens, config.eval.every_tokens = 4096, 25_000
    return json.loads(json.dumps(config_lib.flatten(config)))


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    return made_laws.write(tmp_path_factory.mktemp("laws") / "laws.json", base=base())


def refuses(capsys, argv, *words):
    """Exit code 2, one message with all `words`, no traceback."""
    capsys.readouterr()
    assert main(["plan", *map(str, argv)]) == 2
    printed, err = capsys.readouterr()
    assert printed == "" and "Traceback" not in err and err.startswith("scaling-jax plan: ") and err.count("\n") <= 2
    for word in words:
        assert str(word) in err
    return err


def test_prints_every_number_with_its_interval_and_where_it_was_measured(capsys, laws):
    assert main(["plan", str(laws), *RUN]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("batch  "))
    assert "tokens" in line and " to " in line and "10x outside" in line and "batch_optimum" in line
    assert "params measured 1.000e+06 to 1.000e+08, asked 1.000e+09: 10 times above" in text
    assert "tokens measured 1.000e+08 to 1.000e+10, asked 4.000e+10: 4 times above" in text
    assert "a suggestion that nothing here has tested" in text and "unknown" not in text


def test_below_the_measured_range_and_far_beyond_it(capsys, laws):
    assert main(["plan", str(laws), "--params=2e5", "--tokens=2e7"]) == 0
    text = capsys.readouterr().out
    assert "params measured 1.000e+06 to 1.000e+08, asked 2.000e+05: 5 times below" in text and " 5x outside " in text
    assert main(["plan", str(laws), "--params=1.1e11", "--tokens=1e9"]) == 2
    printed, err = capsys.readouterr()
    assert "no law is followed beyond 1000 times" in " ".join(printed.split()) and "tells neither" in err


def test_rivals_that_are_tied_are_each_shown(capsys, tmp_path):
    both = made_laws.findings()["lr_surface"].fits
    laws = made_laws.write(tmp_path / "laws.json", lr_surface=dict(both))
    assert main(["plan", str(laws), "--params=1e7", "--tokens=1e9", "--batch_tokens=3e5"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    power = made_laws.POWER["lr"] * 3 ** made_laws.POWER["batch_exponent"]
    for said in (f"surge {made_laws.surge_lr(3e5, 1e9):.4g} (", f"power {power:.4g} (", "the data cannot tell them apart"):
        assert said in text


def test_json_has_the_same(capsys, laws):
    assert main(["plan", str(laws), *RUN, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["learning rate"]["low"] < rows["learning rate"]["value"] < rows["learning rate"]["high"]
    assert rows["batch"]["inside"] is False and rows["batch"]["reaches"][0]["factor"] == pytest.approx(4)


def test_writes_a_config_that_loads_and_is_the_run_that_was_asked_for(capsys, laws, tmp_path):
    out = tmp_path / "ready.py"
    assert main(["plan", str(laws), *RUN, f"--config_out={out}"]) == 0
    config = config_lib.load(str(out))
    config_lib.validate(config)
    text = out.read_text()
    assert abs(config_params(config) / 1e9 - 1) < 0.03 and config.model.head_dim == 64
    assert 0.75 < config.model.width / config.model.depth / 64 < 4 / 3
    assert config.train.tokens == 40_000_000_000 and config.train.batch_tokens % 1024 == 0
    assert config.train.batch_tokens == pytest.approx(made_laws.BATCH["batch"] * 40 ** made_laws.BATCH["tokens_exponent"], abs=512)
    assert config.schedule.warmup_tokens == 400_000_000 and config.eval.every_tokens == 10_000_000_000  # 1/100, 1/4 of it
    assert config.batch.schedule == "constant" and config.batch.stages == ()
    assert config.parametrization.base_width == 128 and config.schedule.name == "constant"
    assert f"--config={out}" in text and "batch_optimum" in text and "FLOP" in text and f"{config.optimizer.lr:.4g}" in text
    refuses(capsys, [laws, *RUN, f"--config_out={out}"], out, "is there already")
    assert out.read_text() == text


@pytest.mark.parametrize(
    "shape, params",
    [
        ({"width": 64, "depth": 2, "head_dim": 16}, 7e9),
        ({"width": 4096, "depth": 32, "head_dim": 128, "kv_heads": 8, "mlp": "swiglu", "mlp_ratio": 8 / 3}, 1.3e9),
        ({"width": 128, "depth": 6, "head_dim": 32, "shared_depth": True}, 1e7),
        ({"width": 64, "depth": 2, "head_dim": 16}, 2e5),
    ],
)
def test_resized_models_keep_their_proportions(shape, params):
    config = default_config()
    config.model.update(shape)
    aspect = config.model.width / config.model.depth
    group = config_lib.heads(config) // config.model.kv_heads if config.model.kv_heads else 0
    resize(config, params)
    assert config_lib.field_faults(config) == [] and config.model.width % config.model.head_dim == 0
    assert abs(config_params(config) / params - 1) < (0.05 if params > 1e6 else 0.25)
    assert params < 1e6 or 0.7 < config.model.width / config.model.depth / aspect < 1.4
    assert not group or config_lib.heads(config) == group * config.model.kv_heads


def test_a_config_that_is_far_from_the_run_is_not_written(capsys, laws, tmp_path):
    out = tmp_path / "a.py"
    least = ["--params=5e4", "--tokens=1e8"]  # one layer of width 64, the head_dim, has about that
    refuses(capsys, [laws, "--params=2e4", "--tokens=1e8", f"--config_out={out}"], "N next to 2e+04", "factor 1.5", "head_dim")
    assert main(["plan", str(laws), *least, f"--config_out={out}"]) == 0
    out.unlink()
    refuses(capsys, [laws, "--params=1e7", "--tokens=1e9", "--batch_tokens=300", f"--config_out={out}"], "the batch next to 300", "context")
    refuses(capsys, [laws, "--params=1e7", "--tokens=1e6", "--batch_tokens=1e6", f"--config_out={out}"], "is not one step")
    assert not out.exists()


def test_the_lr_is_that_at_the_batch_that_is_written(capsys, tmp_path):
    laws = made_laws.write(
        tmp_path / "laws.json",
        base=base() | {"model.context": 180_000, "train.batch_tokens": 180_000, "train.tokens": 1_800_000, "noise_scale.every": 0},
    )
    assert main(["plan", str(laws), *RUN, f"--config_out={tmp_path / 'a.py'}"]) == 0
    config = config_lib.load(str(tmp_path / "a.py"))
    batch = made_laws.BATCH["batch"] * 40 ** made_laws.BATCH["tokens_exponent"]
    assert config.train.batch_tokens % 180_000 == 0 and abs(config.train.batch_tokens / batch - 1) > 0.2
    assert config.optimizer.lr == pytest.approx(made_laws.surge_lr(config.train.batch_tokens, 4e10), rel=1e-3)
    assert config.optimizer.lr != pytest.approx(made_laws.surge_lr(batch, 4e10), rel=0.01)


def test_base_sizes_that_are_not_known_are_said(capsys, laws, tmp_path):
    unknown = made_laws.write(tmp_path / "laws.json")  # of a table: no fields of a study
    argv = ["plan", str(unknown), *RUN, "--config=configs/cpu_demo.py"]
    assert main([*argv, f"--config_out={tmp_path / 'a.py'}"]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "a.py").read_text()):
        assert "The base sizes of the table behind" in text and "base_width 128" in " ".join(text.split())
    form = bend_form("surge", made_laws.T0, made_laws.BATCHES, 0.01, made_laws.N0)
    values = made_laws.SURGE | {"lr_crit_params_exponent": -0.3, "batch_crit_params_exponent": 0.1}
    ranges = {"batch_tokens": made_laws.BATCHES, "tokens": made_laws.TOKENS, "params": made_laws.PARAMS}
    surface = {"surge": made_laws.fitted(form, values, 0.02, ranges)}
    nothing = made_laws.write(tmp_path / "nothing.json", parametrization=None, lr_surface=surface)
    assert main(["plan", str(nothing), *argv[2:], f"--config_out={tmp_path / 'b.py'}"]) == 0
    assert "does not say under which parametrization" in " ".join((tmp_path / "b.py").read_text().split())
    assert main(["plan", str(laws), *RUN, f"--config_out={tmp_path / 'c.py'}"]) == 0
    assert "not known" not in (tmp_path / "c.py").read_text()


def test_a_config_of_somebody_elses_table_needs_a_base(capsys, tmp_path):
    laws = made_laws.write(tmp_path / "laws.json")
    refuses(capsys, [laws, *RUN, f"--config_out={tmp_path / 'a.py'}"], "--config=FILE")
    assert not (tmp_path / "a.py").exists()
    assert main(["plan", str(laws), *RUN, f"--config_out={tmp_path / 'b.py'}", "--config=configs/cpu_demo.py"]) == 0
    assert config_lib.load(str(tmp_path / "b.py")).model.mlp == "swiglu"


def test_an_lr_is_not_written_into_another_parametrization(capsys, laws, tmp_path):
    out = f"--config_out={tmp_path / 'a.py'}"
    refuses(capsys, [laws, *RUN, out, "--config=configs/cpu_demo.py"], "config.parametrization.base_depth", laws)
    argv = [laws, *RUN, out, "--config=configs/cpu_demo.py", "--config.parametrization.name=standard"]
    refuses(capsys, argv, "config.parametrization.name is 'standard'", "'mup'")
    assert not (tmp_path / "a.py").exists()


def test_bad_input_is_said_in_one_message(capsys, laws, tmp_path):
    refuses(capsys, [laws, "--tokens=1e9"], "--params is missing")
    refuses(capsys, [laws, "--params=-1", "--tokens=1e9"], "--params=-1", "positive")
    refuses(capsys, [tmp_path / "none.json", *RUN], "none.json", "no such file")
    refuses(capsys, [laws, *RUN, "--topology=v5p:9x9"], "v5p:9x9")
    refuses(capsys, [laws, *RUN, "--slices=2"], "--slices=2 needs --topology")
    refuses(capsys, [laws, *RUN, "--batch_tokens=1e300"], "--batch_tokens=1e+300: not one step")
    refuses(capsys, [laws, *RUN, "--config_out=there/is/none.py"], "--config_out=there/is/none.py", "no such directory")
    refuses(capsys, [laws, *RUN, f"--config_out={tmp_path / 'config.txt'}"], "Python file")
    content = json.loads(laws.read_text())
    for change, word in (({"version": 99}, "version"), ({"laws": {"lr_surface": 3}}, "damaged"), ({"format": "?"}, "is no laws.json")):
        other = tmp_path / "other.json"
        other.write_text(json.dumps(content | change))
        refuses(capsys, [other, *RUN], "other.json", word)


def test_nothing_that_can_be_told_ends_with_2(capsys, tmp_path):
    laws = made_laws.write(tmp_path / "laws.json", batch_optimum="one batch size", chinchilla_3="one size", lr_surface="one batch size")
    assert main(["plan", str(laws), *RUN]) == 2
    printed, err = capsys.readouterr()
    text = " ".join(printed.split())
    assert "learning rate: " in text and "lr_surface could not be fitted: one batch size" in text and "loss: " in text
    assert err.count("\n") == 1 and "tells neither" in err


def test_pod_check_without_its_compiler_is_unknown_and_the_rest_is_told(capsys, laws, monkeypatch):
    def absent():
        raise UserError("libtpu is not installed")

    monkeypatch.setattr(pod_compile, "prepare", absent)
    assert main(["plan", str(laws), *RUN, "--topology=v5p:2x2x1"]) == 0
    text = capsys.readouterr().out
    assert "least chip-hours: libtpu is not installed" in text and "learning rate" in text


@pytest.mark.parametrize("share, told", [(0.5, "8 hours"), (1.2, "does not fit v5p:2x2x1: it takes 120% of a device's memory")])
def test_chip_hours_are_those_of_the_compiled_step_on_all_chips(capsys, laws, monkeypatch, share, told):
    compiled = []

    def compile_step(config, topology):
        compiled.append(config)
        roof, memory = types.SimpleNamespace(bound="compute", mfu=0.5), types.SimpleNamespace(share=share)
        return types.SimpleNamespace(seconds=7200.0, roofline=roof, memory=memory)

    monkeypatch.setattr(pod_compile, "prepare", lambda: None)
    monkeypatch.setattr(pod_compile, "compile_step", compile_step)
    assert main(["plan", str(laws), *RUN, "--topology=v5p:2x2x1"]) == 0  # 4 chips, 2 hours
    text = " ".join(capsys.readouterr().out.split())
    assert f"least chip-hours {told}" in text or f"least chip-hours: {told}" in text
    config = compiled[0]
    assert config.mesh.fsdp == -1 and config.train.batch_tokens % (4 * 1024) == 0 and abs(config_params(config) / 1e9 - 1) < 0.03
