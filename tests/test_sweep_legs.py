"""The way to the horizons."""

import numpy as np
import pytest
from helpers import small_config

from scaling_jax.batch_schedule import batch_at
from scaling_jax.sweep.legs import TRUNK, legs_of, step_end


def test_one_leg_takes_a_constant_lr_to_all_horizons():
    (leg,) = legs_of(small_config(schedule__name="constant"), (300, 640, 1000))
    assert (leg.name, leg.start_tokens, leg.end_tokens, leg.tokens) == (TRUNK, 0, 1024, 1024)
    assert leg.horizons == ((300, 384), (640, 640), (1000, 1024))  # whole steps of 128
    assert leg.config(small_config()).train.tokens == 1000


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_schedule_that_ends_has_a_leg_of_its_own(name):
    (leg,) = legs_of(small_config(schedule__name=name), (1280,))
    config = leg.config(small_config(schedule__name=name))
    assert (leg.start_tokens, config.schedule.name, config.train.tokens) == (0, name, 1280)


def test_decays_branch_off_a_constant_trunk_where_the_lr_begins_to_fall():
    config = small_config(schedule__name="wsd", schedule__decay_tokens=300)
    trunk, *decays = legs_of(config, (640, 1280))
    assert trunk.config(config).schedule.name == "constant"
    assert (trunk.horizons, trunk.keep_at_tokens, trunk.end_tokens) == ((), (256, 896), 896)  # 340 and 980, in whole steps before
    assert [(leg.start_tokens, leg.end_tokens, leg.horizons) for leg in decays] == [(256, 640, ((640, 640),)), (896, 1280, ((1280, 1280),))]
    for leg, horizon in zip(decays, (640, 1280), strict=True):
        own = leg.config(config)
        assert (own.schedule.name, own.train.tokens, own.schedule.decay_tokens) == ("wsd", horizon, 300)


def test_a_fraction_of_each_horizon_decays():
    legs = legs_of(small_config(schedule__name="wsd"), (1280, 2560), decay_fraction=0.25)
    assert [leg.decay_tokens for leg in legs[1:]] == [320, 640]
    assert legs[0].keep_at_tokens == (896, 1920)


def test_a_decay_from_the_very_first_step_needs_no_trunk():
    (leg,) = legs_of(small_config(schedule__name="wsd", schedule__decay_tokens=600), (640,))
    assert (leg.name, leg.start_tokens) == ("decay-640", 0)


@pytest.mark.parametrize("stages", [(), ("256=256", "1024=512")])
def test_ends_of_steps_against_walking_there(stages):
    config = small_config(train__tokens=4096, batch__schedule="stages" if stages else "constant", batch__stages=stages)
    ends = [0]
    while ends[-1] < 4096:
        ends.append(ends[-1] + batch_at(config, ends[-1]))
    for tokens in range(0, 3000, 37):
        assert step_end(config, tokens) == min(end for end in ends if end >= tokens)
        assert step_end(config, tokens, before=True) == max(np.array(ends)[np.array(ends) <= tokens])
