"""The file, the table and the figure of an evaluation."""

import json
import math

import pytest
from test_report_figures import is_png

from scaling_jax.report.evaluation import evaluation_table, position_figure, store_evaluation

RUN = {"run": "abc", "tokens": 300, "context": 64}


def domain(loss=1.5, loss_se=0.02, bits=2.0, bits_se=0.03, slope=0.3, unknown=()):
    """A loss that falls by `slope` with each doubling of the position."""
    firsts = [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45]
    bins = [
        {"first": first, "last": after - 1, "loss": loss + slope * (6 - math.log2(first)), "loss_se": loss_se}
        for first, after in zip(firsts, [*firsts[1:], 65], strict=True)
    ]
    for i in unknown:
        bins[i] |= {"loss": None, "loss_se": None}
    return {"tokens": 1_234_567, "documents": 4321, "bins": bins} | {
        "loss": loss,
        "loss_se": loss_se,
        "bits_per_byte": bits,
        "bits_per_byte_se": bits_se,
    }


def test_the_table_is_aligned_and_unknown_numbers_are_dashes():
    lines = evaluation_table({"heldout": domain(), "a": domain(3.25, None, None, None)}).splitlines()
    assert lines == [
        "domain      tokens  documents  nats/token  ± s.e.  bits/byte  ± s.e.",
        "heldout  1,234,567      4,321      1.5000  0.0200     2.0000  0.0300",
        "a        1,234,567      4,321      3.2500       -          -       -",
    ]


def test_domains_are_added_to_those_of_the_same_checkpoint_only(tmp_path):
    path = tmp_path / "300.json"
    store_evaluation(path, RUN, {"a": {"loss": 1.0}, "b": {"loss": 2.0}})
    both = store_evaluation(path, RUN, {"b": {"loss": 3.0}, "c": {"loss": 4.0}})
    assert json.loads(path.read_text()) == both == RUN | {"domains": {"a": {"loss": 1.0}, "b": {"loss": 3.0}, "c": {"loss": 4.0}}}
    for other in (RUN | {"run": "another"}, RUN | {"tokens": 400}):
        store_evaluation(path, RUN, {"a": {}})
        assert store_evaluation(path, other, {"z": {}}) == other | {"domains": {"z": {}}}
    for damaged in ("{", "[]", '{"run": "abc"}', json.dumps(RUN)):
        path.write_text(damaged)
        assert store_evaluation(path, RUN, {"z": {}}) == RUN | {"domains": {"z": {}}}


@pytest.mark.parametrize("domains", [{"a": domain()}, {str(i): domain(i + 1.5, i * 0.1 or None, unknown=[0, i]) for i in range(8)}])
def test_the_figure_is_drawn_whatever_is_unknown(tmp_path, domains):
    assert position_figure(domains, tmp_path / "position.png", "a run") is True
    assert is_png(tmp_path / "position.png", (7.2, 4.6))


def test_a_figure_of_nothing_says_so(tmp_path):
    assert position_figure({}, tmp_path / "a.png") is False
    assert position_figure({"a": domain(unknown=range(11))}, tmp_path / "b.png") is False
    assert is_png(tmp_path / "a.png", (7.2, 4.6)) and is_png(tmp_path / "b.png", (7.2, 4.6))
