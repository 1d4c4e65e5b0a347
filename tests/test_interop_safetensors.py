"""Parameters in safetensors files: the format read by hand, a forward pass in numpy from the file alone, and every wrong file."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from scaling_jax import Parametrization, Transformer, TransformerConfig
from scaling_jax.errors import UserError
from scaling_jax.interop.weights_file import load_safetensors, name_map, params_from_file, save_safetensors

MUP = {"name": "mup", "base_width": 16, "base_head_dim": 4}
COMPLETE = MUP | {"name": "completep", "base_depth": 1}
LEARNED = {"positions": "learned", "biases": True, "norm_gains": True, "qk_norm": True, "kv_heads": 1, "mlp": "swiglu"}
SHARED = {"shared_depth": True, "depth": 3, "tied_embeddings": True, "rope_theta": 100.0, "mlp": "relu2", "kv_heads": 2}


def abstract(fields=None, parametrization=None):
    sizes = {"vocab_size": 24, "width": 32, "depth": 2, "head_dim": 8, "context": 12}
    config = TransformerConfig(**(sizes | (fields or {})))
    return nnx.eval_shape(lambda: Transformer(config, Parametrization(**(parametrization or {})), rngs=nnx.Rngs(0)))


def model_of(fields=None, parametrization=None, seed=0):
    """All parameters away from where training starts: gains of 1 and biases of 0 would hide what is left out."""
    rng = np.random.default_rng(seed)

    def value(path, param):
        spread = 0.3 * rng.standard_normal(param.shape)
        return param.replace(jnp.asarray(spread + path[-1].endswith("_gain"), jnp.float32))

    graph, params = nnx.split(abstract(fields, parametrization))
    return nnx.merge(graph, nnx.map_state(value, params))


def flat(model):
    return {".".join(path): np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def parse(path):
    """The format by its description alone: 8 bytes little-endian with the header's length, JSON, then the tensors row by row."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata, tensors = header.pop("__metadata__"), {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        low, high = entry["data_offsets"]
        tensors[name] = np.frombuffer(raw[start + low : start + high], "<f4").reshape(entry["shape"])
    return metadata, tensors


def tokens_of(batch=2, length=12):
    return np.random.default_rng(5).integers(0, 24, (batch, length))


def logits_of(model, tokens):
    graph, params = nnx.split(model)
    return np.asarray(jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, jnp.asarray(tokens, jnp.int32)))


def forward_in_numpy(path, tokens):
    """The whole model in float64 from the file's tensors and header."""
    metadata, tensors = parse(path)
    c, times = json.loads(metadata["config"]), json.loads(metadata["multipliers"])
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    head = c["head_dim"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * t.get(f"{name}.weight", 1.0)

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    def activation(x):
        if c["mlp"] == "gelu":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return np.maximum(x, 0) ** 2 if c["mlp"] == "relu2" else x / (1 + np.exp(-x))

    def rotate(x):  # [length, head_dim] as complex numbers: entry k with entry k + head_dim/2
        angle = np.arange(len(x))[:, None] / c["rope_theta"] ** (np.arange(head // 2) / (head // 2))
        z = (x[:, : head // 2] + 1j * x[:, head // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    def attend(x, at):
        q, k, v = (linear(x, f"{at}.{name}") for name in ("query", "key", "value"))
        heads, shared_by, out = c["width"] // head, q.shape[1] // k.shape[1], []
        for h in range(heads):
            own, kv = slice(h * head, (h + 1) * head), slice(h // shared_by * head, (h // shared_by + 1) * head)
            qs, ks = q[:, own], k[:, kv]
            if c["qk_norm"]:
                qs, ks = norm(qs, f"{at}.query_norm"), norm(ks, f"{at}.key_norm")
            if c["positions"] == "rotary":
                qs, ks = rotate(qs), rotate(ks)
            weights = np.tril(np.exp(times["attention_scale"] * qs @ ks.T))
            out.append(weights / weights.sum(-1, keepdims=True) @ v[:, kv])
        return linear(np.concatenate(out, -1), f"{at}.attention_out")

    logits = []
    for row in tokens:
        x = t["embedding.weight"][row] + (t["position_embedding.weight"][: len(row)] if c["positions"] == "learned" else 0)
        for i in range(c["depth"]):
            at = f"blocks.{0 if c['shared_depth'] else i}"
            x = x + times["residual_multiplier"] * attend(norm(x, f"{at}.attention_norm"), at)
            h = norm(x, f"{at}.mlp_norm")
            gate = activation(linear(h, f"{at}.mlp_gate")) if c["mlp"] == "swiglu" else None
            h = linear(h, f"{at}.mlp_in")
            x = x + times["residual_multiplier"] * linear(activation(h) if gate is None else gate * h, f"{at}.mlp_out")
        out = t["embedding.weight"] if c["tied_embeddings"] else t["unembedding.weight"]
        logits.append(times["logit_multiplier"] * norm(x, "final_norm") @ out.T)
    return np.stack(logits)


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(model_of(), path)
    return path


def rewritten(path, change, dtype=None):
    """The file with `change(tensors)` made to its tensors, and its header kept."""
    metadata, tensors = parse(path)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata)


def test_the_file_read_by_hand_has_every_parameter_once(tmp_path):
    model = model_of(LEARNED)
    save_safetensors(model, tmp_path / "m.safetensors", {"whose": "mine"})
    metadata, tensors = parse(tmp_path / "m.safetensors")
    assert metadata["whose"] == "mine" and json.loads(metadata["config"])["kv_heads"] == 1
    left = flat(model)
    for file_name, name in (("embedding", "embedding"), ("position_embedding", "position_embedding"), ("final_norm", "final_gain")):
        np.testing.assert_array_equal(tensors.pop(f"{file_name}.weight"), left.pop(name))
    np.testing.assert_array_equal(tensors.pop("unembedding.weight").T, left.pop("unembedding"))
    for name in ("query", "key", "value", "attention_out", "mlp_in", "mlp_gate", "mlp_out"):
        weight, bias = left.pop(f"blocks.{name}"), left.pop(f"blocks.{name}_bias")
        for i in range(2):
            np.testing.assert_array_equal(tensors.pop(f"blocks.{i}.{name}.weight").T, weight[i])
            np.testing.assert_array_equal(tensors.pop(f"blocks.{i}.{name}.bias"), bias[i])
    for name in ("attention", "mlp", "query", "key"):
        gain = left.pop(f"blocks.{name}_gain")
        for i in range(2):
            np.testing.assert_array_equal(tensors.pop(f"blocks.{i}.{name}_norm.weight"), gain[i])
    assert not tensors and not left


@pytest.mark.parametrize(("fields", "parametrization"), [({}, MUP), (LEARNED, COMPLETE), (SHARED, MUP)], ids=["mup", "learned", "shared"])
def test_a_forward_pass_in_numpy_from_the_file_alone(tmp_path, fields, parametrization):
    """Names, layout, config and multipliers in the file are all that it takes; and of the folded file, the standard multipliers."""
    model, path, tokens = model_of(fields, parametrization), tmp_path / "m.safetensors", tokens_of()
    wanted = logits_of(model, tokens)
    save_safetensors(model, path)
    np.testing.assert_allclose(forward_in_numpy(path, tokens), wanted, atol=1e-5, rtol=1e-5)
    save_safetensors(model, path, fold_multipliers=True)
    assert json.loads(parse(path)[0]["multipliers"]) == {"attention_scale": 8**-0.5, "residual_multiplier": 1.0, "logit_multiplier": 1.0}
    np.testing.assert_allclose(forward_in_numpy(path, tokens), wanted, atol=1e-5, rtol=1e-5)


def test_a_folded_file_is_a_standard_models(tmp_path):
    path = tmp_path / "m.safetensors"
    model = model_of({"tied_embeddings": True, "biases": True, "depth": 3}, COMPLETE)
    save_safetensors(model, path, fold_multipliers=True)
    standard = model_of({"biases": True, "depth": 3}, seed=1)  # no longer tied
    load_safetensors(standard, path)
    tokens = tokens_of()
    np.testing.assert_allclose(logits_of(standard, tokens), logits_of(model, tokens), atol=1e-5, rtol=1e-5)


def test_a_scale_with_nowhere_to_go_is_not_folded(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="attention scale.*cannot be folded: queries are normed"):
        save_safetensors(model_of({"qk_norm": True}, MUP), path, fold_multipliers=True)
    assert not path.exists()
    save_safetensors(model_of({"qk_norm": True}), path, fold_multipliers=True)  # there is nothing to fold


@pytest.mark.parametrize("fields", [LEARNED, SHARED], ids=["learned", "shared"])
def test_out_and_in_again_bit_for_bit(tmp_path, fields):
    model, other = model_of(fields, MUP), model_of(fields, MUP, seed=1)
    save_safetensors(model, tmp_path / "m.safetensors")
    load_safetensors(other, tmp_path / "m.safetensors")
    for name, value in flat(model).items():
        np.testing.assert_array_equal(flat(other)[name], value)
    loaded = params_from_file(abstract(fields, MUP), tmp_path / "m.safetensors")  # of a model without parameters too
    assert nnx.to_flat_state(loaded)[0][1].get_metadata()["rule"] == nnx.to_flat_state(nnx.state(model))[0][1].get_metadata()["rule"]


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16])
def test_half_precision_is_read_as_float32(file, dtype):
    wanted = {name: value.astype(dtype).astype(np.float32) for name, value in flat(model_of()).items()}
    rewritten(file, lambda tensors: tensors.update({name: value.astype(dtype) for name, value in tensors.items()}))
    other = model_of(seed=1)
    load_safetensors(other, file)
    for name, value in flat(other).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, wanted[name])


def test_a_file_of_somebody_elses_needs_no_header_of_ours(file):
    save_file({name: np.ascontiguousarray(value) for name, value in parse(file)[1].items()}, file, {"format": "pt"})
    other = model_of(seed=1)
    load_safetensors(other, file)
    np.testing.assert_array_equal(flat(other)["blocks.query"], flat(model_of())["blocks.query"])


def cut_off(tensors):
    tensors["blocks.1.query.weight"] = tensors["blocks.1.query.weight"][:16].copy()


def as_integers(tensors):
    tensors["embedding.weight"] = tensors["embedding.weight"].astype(np.int32)


def spoil(tensors):
    for name, value in (("blocks.1.key.weight", np.nan), ("unembedding.weight", np.inf)):
        tensors[name] = tensors[name].copy()
        tensors[name][3, 2] = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.1.mlp_out.weight"), "has no tensor blocks.1.mlp_out.weight, which must be [32, 128]"),
        (lambda t: t.update({"blocks.2.key.bias": np.zeros(32, np.float32)}), "has a tensor blocks.2.key.bias, which this model has not"),
        (cut_off, "tensor blocks.1.query.weight is [16, 32]: must be [32, 32]"),
        (as_integers, "tensor embedding.weight is of dtype I32: must be F32, BF16 or F16"),
        (spoil, "tensor blocks.1.key.weight has values that are not finite"),
        (lambda t: [t.pop(f"blocks.1.{name}.weight") for name in ("query", "key", "value", "mlp_in", "mlp_out")], "; and 1 more"),
    ],
    ids=["missing", "unexpected", "misshapen", "dtype", "spoilt", "many"],
)
def test_a_wrong_tensor_is_named_and_nothing_is_changed(file, change, words):
    rewritten(file, change)
    model = model_of(seed=1)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*{re.escape(words)}"):
        load_safetensors(model, file)
    for name, value in flat(model_of(seed=1)).items():
        np.testing.assert_array_equal(flat(model)[name], value)


@pytest.mark.parametrize(
    "content", [b"", b"some text, and no tensors " * 9, slice(0, 50), slice(0, -4)], ids=["empty", "text", "header", "cut"]
)
def test_what_is_no_whole_file(file, content):
    file.write_bytes(file.read_bytes()[content] if isinstance(content, slice) else content)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: not a safetensors file, or not a whole one: "):
        load_safetensors(abstract(), file)


def test_no_file_and_no_regular_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "absent", "no such file"), (tmp_path, "is a directory"), (tmp_path / "pipe", "is no regular file")):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: cannot be read: {why}; must be a safetensors file"):
            load_safetensors(abstract(), path)


@pytest.mark.parametrize(
    ("fields", "parametrization", "words"),
    [
        ({"head_dim": 4}, {}, "is of a model whose head_dim is 8: must be 4"),
        ({"rope_theta": 500.0}, {}, "is of a model whose rope_theta is 10000.0: must be 500.0"),
        ({"mlp": "relu2"}, {}, "is of a model whose mlp is 'gelu': must be 'relu2'"),
        ({}, MUP, "is of a model whose logit_multiplier is 1: must be 0.5; a file made with fold_multipliers is of 'standard'"),
    ],
)
def test_a_model_that_would_give_other_logits_with_the_same_tensors_is_refused(file, fields, parametrization, words):
    with pytest.raises(UserError, match=re.escape(words)):
        load_safetensors(abstract(fields, parametrization), file)


ODD = '{"attention_scale": "a", "residual_multiplier": NaN, "logit_multiplier": null}'
ODD_WORDS = r"no multipliers .*\(attention_scale is 'a', residual_multiplier is nan, logit_multiplier is None: must be numbers\)"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"scaling_jax": "9"}, "is of version '9'"),
        ({"config": "{}"}, "no config"),
        ({"multipliers": "?"}, "no config"),
        ({"multipliers": ODD}, ODD_WORDS),
    ],
)
def test_a_header_that_cannot_be_understood(file, entries, words):
    metadata, tensors = parse(file)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file, metadata | entries)
    with pytest.raises(UserError, match=words):
        load_safetensors(abstract(), file)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_full_disk_leaves_what_was_there(file):
    before = file.read_bytes()
    file.with_name(file.name + ".tmp").symlink_to("/dev/full")  # where the new one is written first
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: no space left on the disk, 0.1 MB needed"):
        save_safetensors(model_of(seed=1), file)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path, words in (("file/m.safetensors", "cannot be written: "), ("pipe", "is no file"), (".", "is no file")):
        with pytest.raises(UserError, match=words):
            save_safetensors(model_of(), tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_the_map_is_that_of_the_page():
    """Every name of every option is in the table of docs/interop.md, and nothing else."""
    page = (Path(__file__).parent.parent / "docs/interop.md").read_text()
    documented = set(re.findall(r"^\| `([\w.{}]+)` \|", page, re.MULTILINE))
    found = {re.sub(r"blocks\.\d+", "blocks.{i}", name) for name in name_map(abstract(LEARNED))}
    assert found == documented


def test_the_package_reads_what_is_written_and_a_second_time_it_is_the_same(file):
    before = file.read_bytes()
    save_safetensors(model_of(), file, {})
    assert file.read_bytes() == before
    np.testing.assert_array_equal(load_file(file)["embedding.weight"], flat(model_of())["embedding"])
