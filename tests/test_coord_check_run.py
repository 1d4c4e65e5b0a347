"""A coordinate check from its input to its directory: what is refused, and how it is continued."""

import json
import math
import shutil

import numpy as np
import pytest
from coord_checks import MODULE, WIDTHS, check_of, config_of, refused, snapshot

from scaling_jax.coord_check import run
from scaling_jax.coord_check.measure import ACTIVATION, CHANGE, DECAY, EPSILON, PROBED, UPDATE, Coordinate
from scaling_jax.coord_check.run import COORDINATES_FILE, coord_check, expected
from scaling_jax.coord_check.verdict import Expected, passed, slopes, worst
from scaling_jax.data.corpus import open_run_data
from scaling_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("module") / "tiny.py"
    path.write_text(MODULE)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, module):
    """What is found, and the directory."""
    out = tmp_path_factory.mktemp("undisturbed")
    return coord_check(config_of(), check_of(module), out), out


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": {}}, ["--widths=… or --depths=… is missing"]),
        ({"sizes": {"width": (16, 32)}}, ["--widths=16,32: must be at least 3 different widths"]),
        ({"sizes": {"width": (16, 32, 32, 16)}}, ["--widths=16,32,32,16: must be at least 3 different widths"]),
        ({"sizes": {"depth": (1, 2, 2)}}, ["--depths=1,2,2: must be at least 3 different depths"]),
        ({"sizes": {"depth": (0, 1, 2)}}, ["--depths=0,1,2: must be positive"]),
        ({"sizes": {"width": (-16, 16, 32)}}, ["--widths=-16,16,32: must be positive"]),
        ({"sizes": {"width": (16, 20, 32, 44)}}, ["--widths has 20, 44: must be multiples of config.model.head_dim, 8"]),
        ({"sizes": {"width": (16, 20, 24, 32)}, "heads": 4}, ["--widths has 20: must be multiples of 8, twice --heads"]),
        ({"seeds": 0}, ["--seeds=0: must be at least 1"]),
        ({"steps": 2}, ["--steps=2: must be at least 3"]),
        ({"batch_tokens": 0}, ["--batch_tokens=0: must be at least 1"]),
        ({"heads": -1}, ["--heads=-1: must be"]),
        ({"lr": 0.0}, ["--lr=0.0: must be positive"]),
        ({"lr": math.nan}, ["--lr=nan: must be positive"]),
        ({"lr": math.inf}, ["--lr=inf: must be positive"]),
        (
            {"sizes": {"width": (16, 16), "depth": (1, 2)}, "seeds": 0, "steps": 1, "lr": -1.0},
            ["--widths=16,16", "--depths=1,2", "--seeds=0", "--steps=1", "--lr=-1.0"],
        ),
    ],
)
def test_bad_input_is_named_and_nothing_written(tmp_path, module, changes, words):
    message = refused(config_of(), check_of(module, **changes), tmp_path / "out", *words)
    assert len(message.splitlines()) == len(words)


def test_a_bad_config_is_refused_as_the_check_would_use_it(tmp_path, module):
    """completep without a base depth, at every size."""
    config = config_of()
    config.parametrization.name, config.parametrization.base_depth = "completep", 0
    refused(config, check_of(module), tmp_path / "out", "config.parametrization.base_depth is 0")


def test_missing_data_are_refused(tmp_path, module):
    refused(config_of(data__path=str(tmp_path / "nowhere")), check_of(module), tmp_path / "out", "config.data.path")


def test_a_file_in_the_place_of_the_directory_is_left_alone(tmp_path, module):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        coord_check(config_of(), check_of(module), path, overwrite=True)
    assert path.read_text() == "mine"


# A user's module


def test_a_module_of_ones_own_is_measured_by_its_logits_and_parameters(undisturbed):
    found, _ = undisturbed
    assert {(c.quantity, c.kind, c.role) for c in found} == {
        (ACTIVATION, "logits", ""),
        (CHANGE, "logits", ""),
        (CHANGE, "target logit", ""),
        *(
            (quantity, *of)
            for quantity in (UPDATE, DECAY, EPSILON)
            for of in (("table", "embedding"), ("inner", "hidden"), ("out", "output"))
        ),
    }
    assert {(c.size, c.seed) for c in found if c.quantity not in PROBED} == {(width, seed) for width in WIDTHS for seed in (0, 1)}
    assert len(found) == 3 * (6 + 2 * 3 * 6)


def test_a_module_of_ones_own_passes_only_if_it_keeps_to_the_rules(tmp_path, module, undisturbed):
    rows = slopes(undisturbed[0], expected(config_of(), check_of(module)))
    assert passed(rows), [row for row in worst(rows) if not row.ok]
    check = check_of(module, "NoMultiplier")
    rows = slopes(coord_check(config_of(), check, tmp_path), expected(config_of(), check))
    assert {(row.quantity, row.kind) for row in worst(rows) if not row.ok} == {(CHANGE, "logits"), (CHANGE, "target logit")}


def test_parameters_in_a_list_are_measured(tmp_path, module):
    found = coord_check(config_of(), check_of(module, "Listed"), tmp_path)
    assert "list.0" in {c.kind for c in found}


def test_what_is_expected_follows_the_config(module):
    config = config_of()
    config.parametrization.name, config.parametrization.depth_exponent = "completep", 0.5
    assert expected(config, check_of(module)) == Expected(depth_exponent=0.5)
    config.parametrization.name = "mup"  # whose branches know no depth
    assert expected(config, check_of(module)) == Expected(depth_exponent=1.0)
    config.optimizer.decay_mode, config.model.tied_embeddings = "coupled", True
    assert expected(config, check_of(module, heads=2)) == Expected(1.0, coupled_decay=True, tied_embeddings=True, growing_heads=True)


# The directory


class Instrument:
    """Stands before `coordinates`: keeps what was asked for, can stop midway, and can give made-up numbers at once."""

    def __init__(self, monkeypatch):
        self.asked, self.batches, self.stop_after, self.planted = [], [], math.inf, None
        self.real = run.coordinates
        monkeypatch.setattr(run, "coordinates", self)

    def __call__(self, config, axis, size, seeds, steps, tokens_BxL, model):
        self.batches.append(tokens_BxL)
        real = self.real(config, axis, size, seeds, steps, tokens_BxL, model) if self.planted is None else None
        for seed in seeds:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((axis, size, seed))
            yield next(real) if real else [Coordinate(axis, size, seed, 1, ACTIVATION, "logits", "", self.planted)]

    def restart(self):
        self.asked, self.batches, self.stop_after = [], [], math.inf


@pytest.fixture
def instrument(monkeypatch):
    return Instrument(monkeypatch)


def everything(seeds=2, widths=WIDTHS):
    return [("width", width, seed) for width in widths for seed in range(seeds)]


def test_an_interrupted_check_is_continued_to_the_same_end(tmp_path, module, instrument, undisturbed):
    stop_after = 3  # amid a size
    instrument.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        coord_check(config_of(), check_of(module), tmp_path)
    instrument.restart()
    assert coord_check(config_of(), check_of(module), tmp_path) == undisturbed[0]
    assert instrument.asked == everything()[stop_after:]
    assert coord_check(config_of(), check_of(module), tmp_path) == undisturbed[0]  # and all of it is on disk
    assert instrument.asked == everything()[stop_after:]
    assert (tmp_path / COORDINATES_FILE).read_bytes() == (undisturbed[1] / COORDINATES_FILE).read_bytes()


@pytest.mark.parametrize("lines", [2, 1])
def test_a_line_that_was_cut_off_in_writing_is_measured_again(tmp_path, module, instrument, undisturbed, lines):
    out = tmp_path / "out"
    shutil.copytree(undisturbed[1], out)
    whole = (out / COORDINATES_FILE).read_text()
    last = sum(map(len, whole.splitlines(keepends=True)[-lines:]))
    (out / COORDINATES_FILE).write_text(whole[: 10 - last])
    assert coord_check(config_of(), check_of(module), out) == undisturbed[0]
    assert instrument.asked == everything()[-lines:] and (out / COORDINATES_FILE).read_text() == whole


def test_the_batch_is_the_first_of_the_data_in_whole_sequences(tmp_path, module, instrument):
    instrument.planted = 1.0
    coord_check(config_of(), check_of(module, batch_tokens=70), tmp_path)
    for tokens_BxL in instrument.batches:
        np.testing.assert_array_equal(tokens_BxL, open_run_data(config_of()).train.batch(0, 4))
    coord_check(config_of(), check_of(module, batch_tokens=64), tmp_path)  # the same four sequences
    assert instrument.asked == everything()
    instrument.restart()
    coord_check(config_of(), check_of(module, batch_tokens=1), tmp_path / "one")
    assert {len(tokens_BxL) for tokens_BxL in instrument.batches} == {1}


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e-30])
def test_numbers_that_are_none_survive_the_disk(tmp_path, module, instrument, value):
    """A run that diverges is measured once, in a file that any JSON reader takes."""
    instrument.planted = value
    coord_check(config_of(), check_of(module), tmp_path)
    instrument.restart()
    found = coord_check(config_of(), check_of(module), tmp_path)
    assert instrument.asked == [] and len(found) == 6
    assert all(c.value == value if math.isfinite(value) else not math.isfinite(c.value) for c in found)
    for line in (tmp_path / COORDINATES_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_only_what_is_missing_is_measured(tmp_path, module, instrument):
    instrument.planted = 1.0

    def asked_for(**changes):
        instrument.restart()
        found = coord_check(config_of(), check_of(module, **changes), tmp_path)
        return instrument.asked, {(c.axis, c.size, c.seed) for c in found}

    assert asked_for() == (everything(), set(everything()))
    wider = (*WIDTHS, 128)
    assert asked_for(sizes={"width": wider}) == ([("width", 128, 0), ("width", 128, 1)], set(everything(widths=wider)))
    assert asked_for(seeds=3) == ([("width", width, 2) for width in WIDTHS], set(everything(3)))
    depths = [("depth", depth, seed) for depth in (1, 2, 4) for seed in range(2)]
    assert asked_for(sizes={"depth": (4, 2, 1)}) == (depths, set(depths))
    # What is there and not asked for is kept, and not returned.
    assert asked_for(seeds=1) == ([], set(everything(1)))
    assert asked_for(sizes={"width": (64, 16, 128, 16)}) == ([], set(everything(widths=(16, 64, 128))))


OTHERS = {
    "check.lr 0.02 -> 0.5": ({}, {"lr": 0.5}),
    "check.steps 3 -> 4": ({}, {"steps": 4}),
    "check.batch_tokens 64 -> 128": ({}, {"batch_tokens": 128}),
    "check.heads 0 -> 2": ({}, {"heads": 2}),
    "check.model": ({}, {"name": "Twice"}),
    "optimizer.eps 1e-08 -> 1e-06": ({"optimizer__eps": 1e-6}, {}),
    "optimizer.decay_mode 'independent' -> 'coupled'": ({"optimizer__decay_mode": "coupled"}, {}),
    "parametrization.name 'mup' -> 'standard'": ({"parametrization__name": "standard"}, {}),
    "parametrization.base_width 16 -> 32": ({"parametrization__base_width": 32}, {}),
    "model.mlp 'gelu' -> 'swiglu'": ({"model__mlp": "swiglu"}, {}),
    "data.train_tokens 0 -> 4096": ({"data__train_tokens": 4096}, {}),
}


@pytest.fixture
def finished(tmp_path, module, instrument):
    """A finished check of made-up numbers."""
    instrument.planted = 1.0
    coord_check(config_of(), check_of(module), tmp_path)
    instrument.restart()
    return tmp_path


@pytest.mark.parametrize("what", OTHERS)
def test_a_check_under_other_conditions_is_refused_by_name(finished, module, instrument, what):
    fields, changes = OTHERS[what]
    message = refused(config_of(**fields), check_of(module, **changes), finished, f"--out={finished}", what, "--overwrite")
    assert instrument.asked == [] and message.count(" -> ") == 1


@pytest.mark.parametrize(
    "fields",
    [{"schedule__name": "constant"}, {"train__tokens": 4096}, {"optimizer__weight_decay": 0.1}, {"parametrization__output_init": "zero"}],
)
def test_what_the_check_sets_itself_may_differ(finished, module, instrument, fields):
    coord_check(config_of(**fields), check_of(module), finished)
    coord_check(config_of(), check_of(module, lr=0.02), finished)  # the config's own
    assert instrument.asked == []


def test_another_batch_is_another_condition(finished, module):
    refused(config_of(train__seed=1), check_of(module), finished, "train.seed 0 -> 1")


def test_a_module_that_was_changed_is_another_condition(tmp_path, instrument):
    instrument.planted = 1.0
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    coord_check(config_of(), check_of(path), tmp_path / "out")
    path.write_text(MODULE.replace("relu", "gelu"))
    refused(config_of(), check_of(path), tmp_path / "out", "check.model")


def test_overwrite_replaces_what_is_there(finished, module, instrument):
    """Under other conditions and under the same."""
    for steps, value in ((4, 2.0), (4, 3.0)):
        instrument.restart()
        instrument.planted = value
        found = coord_check(config_of(), check_of(module, steps=steps), finished, overwrite=True)
        assert instrument.asked == everything() and {c.value for c in found} == {value}
    instrument.restart()
    assert {c.value for c in coord_check(config_of(), check_of(module, steps=4), finished)} == {3.0}
    assert instrument.asked == []


def test_bad_input_keeps_what_overwrite_would_replace(finished, module):
    before = snapshot(finished)
    for changes in ({"steps": 1}, {"name": "Roleless"}, {"name": "Missing"}):
        with pytest.raises(UserError):
            coord_check(config_of(), check_of(module, **changes), finished, overwrite=True)
        assert snapshot(finished) == before


def test_a_damaged_directory_is_refused(finished, module):
    (finished / run.CONDITIONS_FILE).write_text("{")
    refused(config_of(), check_of(module), finished, f"--out={finished}", "damaged", "--overwrite")
