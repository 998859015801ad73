"""The schedules' values at their landmarks."""

import pytest
from conftest import tiny_config

from pera_fast.schedules import Schedules


def test_landmarks() -> None:
    config = tiny_config(epochs=10, batch_size=4)
    schedules = Schedules.of(config, images_per_epoch=40, ranks=1)
    assert (schedules.steps_per_epoch, schedules.total_steps) == (10, 100)
    first, peak, last = schedules.at(0), schedules.at(9), schedules.at(100)
    assert first.lr == 0 and peak.lr == config.optim.lr and schedules.at(10).lr == config.optim.lr
    assert last.lr == pytest.approx(1e-6)
    assert (first.weight_decay, last.weight_decay) == pytest.approx((0.04, 0.2))
    assert (first.momentum, last.momentum) == pytest.approx((0.992, 1.0))
    assert first.teacher_temperature == 0.03
    assert schedules.at(19).teacher_temperature == schedules.at(99).teacher_temperature == 0.05
    lrs = [schedules.at(step).lr for step in range(101)]
    assert lrs[:10] == sorted(lrs[:10]) and lrs[10:] == sorted(lrs[10:], reverse=True)


def test_ranks_and_parts_shorten_the_run() -> None:
    config = tiny_config(epochs=10, batch_size=4, accumulate=2)
    assert Schedules.of(config, images_per_epoch=40, ranks=2).total_steps == 25


def test_warm_up_longer_than_the_run() -> None:
    config = tiny_config(epochs=0.5, batch_size=4)
    schedules = Schedules.of(config, images_per_epoch=8, ranks=1)
    assert schedules.total_steps == 1 and 0 <= schedules.at(0).lr <= config.optim.lr
