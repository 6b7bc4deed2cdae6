from __future__ import annotations

import math

import pytest

from histill.distill.config import DistillConfig, ObjectiveConfig, OptimiserConfig
from histill.distill.schedules import cosine, scheduled

CONFIG = DistillConfig(
    batch_tiles=256,
    objective=ObjectiveConfig(teacher_temperature_warmup=0.5),
    optimiser=OptimiserConfig(base_lr=4e-4, warmup=0.1, final_lr=1e-6, freeze_last_layer=0.02, ema=0.97),
)


def test_cosine_ends_and_middle() -> None:
    assert cosine(2.0, 1.0, 0.0) == 2.0
    assert cosine(2.0, 1.0, 1.0) == 1.0
    assert cosine(2.0, 1.0, 0.5) == pytest.approx(1.5)
    assert cosine(2.0, 1.0, 7.0) == 1.0


def test_learning_rate_warms_up_to_the_scaled_peak_and_falls_to_the_end() -> None:
    rates = [scheduled(CONFIG, step, 1000).lr for step in range(1001)]
    peak = 4e-4 * math.sqrt(256 / 1024)
    assert rates[0] == pytest.approx(peak / 100)
    assert rates[99] == pytest.approx(peak)
    assert max(rates) == pytest.approx(peak)
    assert rates[1000] == pytest.approx(1e-6)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_the_other_schedules() -> None:
    first, middle, last = (scheduled(CONFIG, step, 1000) for step in (0, 500, 1000))
    assert (first.teacher_temperature, middle.teacher_temperature) == (0.04, pytest.approx(0.07))
    assert last.teacher_temperature == pytest.approx(0.07)
    assert scheduled(CONFIG, 250, 1000).teacher_temperature == pytest.approx(0.055)
    assert (first.weight_decay, last.weight_decay) == (pytest.approx(0.04), pytest.approx(0.2))
    assert (first.ema_momentum, last.ema_momentum) == (pytest.approx(0.97), pytest.approx(1.0))
    assert first.last_layer_lr == scheduled(CONFIG, 19, 1000).last_layer_lr == 0.0
    assert scheduled(CONFIG, 20, 1000).last_layer_lr > 0


def test_one_step_is_a_run() -> None:
    assert scheduled(CONFIG, 0, 1).lr > 0


@pytest.mark.parametrize("steps", [10, 21, 100, 663, 5000, 100_000])
def test_the_average_forgets_its_start_in_any_run(steps: int) -> None:
    config = DistillConfig(optimiser=OptimiserConfig(ema=0.994))
    left = math.prod(scheduled(config, step, steps).ema_momentum for step in range(steps))
    assert left < 1e-3
    assert scheduled(config, 0, 100_000).ema_momentum == pytest.approx(0.994)
