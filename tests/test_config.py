import pytest
from ml_collections import ConfigDict

from scaling_jax import batch_schedule
from scaling_jax import config as config_lib
from scaling_jax.config import FIELDS, default_config, load, nearest, parse, resolve_mesh, validate
from scaling_jax.errors import UserError


def changed(**fields) -> ConfigDict:
    """The default config with `fields` as section__key=value."""
    config = default_config()
    for name, value in fields.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


def faults(config: ConfigDict, device_count: int | None = None) -> list[str]:
    try:
        validate(config, device_count)
    except UserError as error:
        return str(error).splitlines()
    return []


def test_defaults_are_valid_and_documented():
    assert faults(default_config(), 1) == []
    assert all(field.doc and name.count(".") == 1 for name, field in FIELDS.items())
    assert set(config_lib.flatten(default_config())) == set(FIELDS)


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if isinstance(field.default, float)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_other_than_finite(name: str, value: float):
    (fault,) = faults(changed(**{name.replace(".", "__"): value}))
    assert fault.startswith(f"config.{name} is {value}: must be ")


def test_every_fault_is_named_at_once_and_relations_only_between_sound_values():
    assert len(faults(changed(model__width=0, optimizer__lr=-1.0, model__mlp="x"))) == 3
    assert len(faults(changed(model__width=100, train__batch_tokens=65, schedule__warmup_tokens=1 << 30))) == 3


@pytest.mark.parametrize(
    "sequences, accumulation, every, sound", [(1, 1, 1, False), (1, 1, 0, True), (2, 1, 1, True), (2, 2, 1, True), (1, 1, 7, False)]
)
def test_noise_takes_two_sequences_a_batch(sequences: int, accumulation: int, every: int, sound: bool):
    found = faults(changed(train__batch_tokens=64 * sequences, train__accumulation=accumulation, noise_scale__every=every))
    assert (found == []) if sound else ("at least 128, or config.noise_scale.every=0" in found[0] and len(found) == 1)


@pytest.mark.parametrize(
    "fields, fault",
    [
        ({"model__kv_heads": 3}, "config.model.kv_heads is 3: must divide the 4 heads"),
        ({"model__head_dim": 1, "model__positions": "learned"}, "config.model.head_dim is 1"),
        ({"model__width": 99, "model__head_dim": 33}, "config.model.head_dim is 33: must be even, for rotary positions"),
        ({"model__width": 99, "model__head_dim": 33, "model__positions": "learned"}, None),
        ({"model__dropout": 1.0}, "config.model.dropout is 1.0: must be less than 1"),
        ({"model__loss_chunk_tokens": 60, "model__context": 61, "train__batch_tokens": 61 * 8}, "the next is 1"),
        ({"model__loss_chunk_tokens": 60}, None),  # pieces of 32
        (
            {"model__shared_depth": True, "parametrization__name": "completep", "parametrization__base_depth": 3},
            "config.model.shared_depth is True: completep",
        ),
    ],
)
def test_options_of_the_model_that_do_not_go_together(fields: dict, fault: str | None):
    found = faults(changed(**fields))
    assert (found == []) if fault is None else (len(found) == 1 and fault in found[0])


def test_key_value_heads_must_be_shared_evenly_by_devices():
    assert "must divide the config.model.kv_heads (2)" in faults(changed(model__kv_heads=2, mesh__tensor=4))[0]


def test_the_mesh_must_match_the_devices():
    config = changed(mesh__fsdp=-1, mesh__replica=2)
    assert faults(config) == []  # not resolved yet
    resolve_mesh(config, 8)
    assert config.mesh.fsdp == 4 and faults(config, 8) == []
    (fault,) = faults(config, 16)
    assert "= 8 devices: must equal the 16 that there are" in fault
    assert "config.train.batch_tokens" in faults(changed(mesh__fsdp=3, model__width=96, model__head_dim=32), 3)[0]
    assert "config.mesh.tensor is 3: must divide the heads (4" in faults(changed(mesh__tensor=3), 3)[0]


def test_missing_fields_are_one_fault():
    config = default_config().unlock()
    del config.model
    (fault,) = faults(config)
    assert fault.startswith("config.model.width, config.model.depth, config.model.head_dim and ") and "default_config()" in fault


def test_nearest_finds_slips_and_lost_sections():
    for wrong, right in (
        ("model.widht", "model.width"),
        ("widht", "model.width"),
        ("model.lr", "optimizer.lr"),
        ("train.context", "model.context"),
    ):
        assert nearest(wrong) == f" (did you mean config.{right}?)"
    assert nearest("zzzzzz") == ""


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("model.width", "32", 32),
        ("train.tokens", "1_000", 1000),
        ("mesh.fsdp", "-1", -1),
        ("optimizer.lr", "1e-3", 1e-3),
        ("data.repeat", "True", True),
        ("data.repeat", "false", False),
        ("data.path", "", ""),
        ("data.path", "5", "5"),
        ("checkpoint.keep_at_tokens", "5", (5,)),
        ("checkpoint.keep_at_tokens", "5,6", (5, 6)),
        ("checkpoint.keep_at_tokens", "(100, 200)", (100, 200)),
        ("checkpoint.keep_at_tokens", "[7]", (7,)),
        ("checkpoint.keep_at_tokens", "()", ()),
        ("checkpoint.keep_at_tokens", "", ()),
        ("data.eval_domains", "x=a/b", ("x=a/b",)),
        ("data.eval_domains", "x=a,y=b", ("x=a", "y=b")),
        ("data.eval_domains", "('x=a,b', 'y=c')", ("x=a,b", "y=c")),
    ],
)
def test_values_are_read_by_the_type_of_their_field(name: str, text: str, value: object):
    parsed = parse(name, text)
    assert parsed == value and type(parsed) is type(FIELDS[name].default)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("model.width", "1.0", "must be an integer"),
        ("optimizer.lr", "", "must be a number"),
        ("data.repeat", "1", "must be true or false"),
        ("checkpoint.keep_at_tokens", "(1, x)", "must be a tuple"),
        ("data.eval_domains", "(x=a,)", "must be a tuple"),
    ],
)
def test_what_is_no_value_of_a_field_is_refused(name: str, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse(name, text)


def test_a_config_file_is_read_anew_and_may_take_an_argument(tmp_path):
    path = tmp_path / "c.py"
    source = "from scaling_jax.config import default_config\ndef get_config(depth={}):\n    c = default_config()\n"
    source += "    c.model.depth = int(depth)\n    return c\n"
    for depth in (5, 6):  # as when a test or a notebook rewrites it
        path.write_text(source.format(depth))
        assert load(str(path)).model.depth == depth
    assert load(f"{path}:7").model.depth == 7
    path.write_text("")
    with pytest.raises(UserError, match="no function get_config"):
        load(str(path))


def test_identity_leaves_execution_out():
    assert config_lib.identity(default_config()) == config_lib.identity(changed(mesh__fsdp=8, data__prefetch=5, eval__every_tokens=7))
    assert config_lib.identity(default_config()) != config_lib.identity(changed(train__seed=1))


STAGED = {"batch__schedule": "stages", "model__context": 16, "train__batch_tokens": 64, "train__tokens": 1000}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"batch__stages": ("100=128", "500=256")}, []),
        ({"batch__stages": ("0=32", "999=48")}, []),
        ({"batch__stages": ()}, ["config.batch.stages is (): must be 'tokens=batch_tokens'"]),
        ({"batch__stages": ("100",)}, ["config.batch.stages is ('100',): must be 'tokens=batch_tokens'"]),
        ({"batch__stages": (5,)}, ["config.batch.stages is (5,): must be 'tokens=batch_tokens'"]),
        ({"batch__stages": ("a=b",)}, ["config.batch.stages is ('a=b',): must be 'tokens=batch_tokens'"]),
        ({"batch__stages": ("100=128", "100=256")}, ["'100=256' after '100=128': must be in ascending order"]),
        ({"batch__stages": ("1000=128",)}, ["'1000=128': must begin within the run, before config.train.tokens 1000"]),
        ({"batch__stages": ("100=100", "200=-16")}, ["'100=100': the batch must be a multiple of 16", "'200=-16': the batch must be"]),
        ({"batch__stages": ("100=0",)}, ["'100=0': the batch must be a multiple of 16"]),
        ({"batch__stages": ("100=16",)}, ["'100=16': one sequence, but noise is measured between sequences; the batch must be at"]),
        ({"batch__stages": ("100=16",), "noise_scale__every": 0}, []),
        ({"batch__stages": ("100=144",), "mesh__fsdp": 4, "train__batch_tokens": 128}, ["'100=144': the batch must be a multiple of 64"]),
        ({"batch__stages": ("100=128",), "batch__schedule": "constant"}, ["takes config.batch.schedule=stages, which is 'constant'"]),
        ({"batch__stages": ("100=128",), "batch__schedule": "follow"}, ["takes config.batch.schedule=stages, which is 'follow'"]),
        ({"batch__schedule": "follow"}, []),
        ({"batch__schedule": "follow", "noise_scale__every": 0}, ["config.noise_scale.every is 0: config.batch.follow=noise follows"]),
        ({"batch__schedule": "follow", "noise_scale__every": 0, "batch__follow": "law.json"}, []),
        ({"batch__schedule": "follow", "batch__follow": "preconditioned"}, ["config.noise_scale.preconditioned is False: "]),
        ({"batch__schedule": "follow", "batch__follow": "preconditioned", "noise_scale__preconditioned": True}, []),
        ({"batch__schedule": "follow", "batch__max_tokens": 63}, ["config.batch.max_tokens is 63: must be at least where the batch"]),
        ({"batch__schedule": "follow", "batch__max_tokens": 64}, []),
        ({"batch__schedule": "follow", "batch__max_tokens": 10**14}, ["config.batch.max_tokens is 100000000000000: the run may end at"]),
        ({"batch__stages": ("8=64", f"512={16 * 10**16}")}, ["config.batch.stages has '512=160000000000000000': the run may end at"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_batch(fields: dict, expected: list[str]):
    found = faults(changed(**STAGED | fields))
    assert len(found) == len(expected)
    assert all(words in fault for words, fault in zip(expected, found, strict=True)), found


def test_stages_are_read_from_the_command_line():
    config = changed(**STAGED, batch__stages=parse("batch.stages", "100=128,500=256"))
    assert batch_schedule.stages(config) == [(100, 128), (500, 256)] and faults(config) == []


def test_a_run_is_not_longer_than_sequences_can_be_counted():
    longest = ((1 << 31) - 1) * 64
    assert faults(changed(train__tokens=longest, train__batch_tokens=128, batch__schedule="constant"))[0].startswith(
        "config.train.tokens is "
    )
    assert faults(changed(train__tokens=longest - 64, train__batch_tokens=128)) == []
    assert "config.train.tokens is" in faults(changed(train__tokens=longest - 64, train__batch_tokens=128, batch__schedule="follow"))[0]
