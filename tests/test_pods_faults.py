"""Faults planted among collectives that are as they should be."""

import pytest

from scaling_jax.pods.collectives import Collective
from scaling_jax.pods.faults import faults, grown
from scaling_jax.pods.hlo import Loop
from scaling_jax.pods.traffic import Least

DEPTH = 8
LEAST = Least(weights=2e9, gradients=1e9, replicas=1e9, tensor=4e9, embedding=0.1e9)


def sent(kind: str, axes: str, gigabytes: float, trips: int = 0, name: str = "c") -> Collective:
    loops = (Loop("while", "body", "", trips),) if trips else ()
    return Collective(kind, tuple(axes.split("+")), 4, max(1, trips), gigabytes * 1e9, "", loops, "bf16", False, name)


SOUND = [
    sent("all-gather", "fsdp", 2, DEPTH),
    sent("reduce-scatter", "fsdp", 1, DEPTH - 1),
    sent("all-reduce", "replica", 1),
    sent("all-gather", "tensor", 4, DEPTH),
    sent("all-to-all", "fsdp", 0.1),
    sent("all-reduce", "replica+fsdp", 0.001),  # a squared norm
]


def test_a_sound_program_has_none():
    assert faults(SOUND, LEAST, DEPTH) == []
    assert faults([], Least(0, 0, 0, 0, 0), DEPTH) == []


@pytest.mark.parametrize(
    "planted, words",
    [
        (sent("all-gather", "fsdp+tensor", 0.1, name="g7"), ["wider than one axis: all-gather over fsdp+tensor", "0.1 GB", "bf16", "g7"]),
        (sent("all-reduce", "replica+fsdp", 0.02), ["wider than one axis: all-reduce over replica+fsdp"]),
        (sent("all-to-all", "fsdp", 0.001, DEPTH), ["all-to-all inside the loop over blocks", f"{DEPTH} times"][:1]),
        (sent("all-to-all", "tensor", 0.001, DEPTH - 2), ["all-to-all inside the loop over blocks"]),  # a loop with both ends peeled off
        (sent("all-gather", "fsdp", 0.9), ["along replica and fsdp 5.001 GB, where 4.9 GB are allowed"]),
        (sent("all-reduce", "replica", 0.9), ["along replica and fsdp 5.001 GB"]),
        (sent("collective-permute", "tensor", 2.5), ["in all 10.6 GB, where 10.53 GB are allowed"]),
    ],
)
def test_a_planted_one_is_named(planted, words):
    found = faults([*SOUND, planted], LEAST, DEPTH)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize(
    "harmless",
    [
        sent("all-to-all", "fsdp", 0.001),  # the embedding's
        sent("all-to-all", "fsdp", 0.001, 2),  # in a loop over something else
        sent("all-gather", "fsdp", 0.7),  # gathered once more
        sent("collective-permute", "tensor", 2.0),
    ],
)
def test_what_is_allowed(harmless):
    assert faults([*SOUND, harmless], LEAST, DEPTH) == []


def test_in_a_short_model_no_loop_is_that_over_blocks():
    assert faults([*SOUND, sent("all-to-all", "fsdp", 0.001, 1)], LEAST, depth=2) == []


def test_the_loop_over_microbatches_is_not_that_over_blocks():
    once = sent("all-to-all", "fsdp", 0.001, DEPTH)
    assert len(faults([*SOUND, once], LEAST, DEPTH, accumulation=2 * DEPTH)) == 1
    assert faults([*SOUND, once], LEAST, DEPTH, accumulation=DEPTH) == []
    within = once._replace(loops=(*once.loops, Loop("while", "body", "", DEPTH - 1)))
    assert len(faults([*SOUND, within], LEAST, DEPTH, accumulation=DEPTH)) == 1


def test_several_faults_are_all_named():
    found = faults([*SOUND, sent("all-to-all", "fsdp+tensor", 1.5, DEPTH)], LEAST, DEPTH)
    assert [line.split(":")[0].split(" ")[0] for line in found] == ["wider", "all-to-all"]
    found = faults([*SOUND, sent("all-reduce", "fsdp", 4)], LEAST, DEPTH)
    assert [line.split(" 1")[0].split(" 8")[0] for line in found] == ["along replica and fsdp", "in all"]


def test_grown():
    large = [
        sent("all-gather", "fsdp", 2),  # in two places now
        sent("all-gather", "tensor", 8),
        sent("all-to-all", "fsdp", 0.2),
        sent("reduce-scatter", "fsdp", 1.005),
        sent("all-reduce", "replica", 0.4),
        sent("all-reduce", "replica", 0.6),
        sent("collective-permute", "replica", 0.3),  # new
    ]
    found = {(row.kind, *row.axes): row.wire_bytes for row in grown(SOUND, large)}
    assert found == {
        ("all-gather", "tensor"): pytest.approx(4e9),
        ("collective-permute", "replica"): pytest.approx(0.3e9),
        ("all-to-all", "fsdp"): pytest.approx(0.1e9),
    }
    assert grown(large, large) == []
