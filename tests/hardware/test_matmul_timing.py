"""How long products take: that both dtypes are timed, and what the times say."""

import numpy as np
import pytest

from keras_mp.hardware import matmul_timing


def test_the_eager_way_of_an_accelerator_times_both_dtypes():
    # The CPU stands in for the GPU: the code names the device and nothing else.
    times = matmul_timing._interleaved_eager(matmul_timing._factors("bfloat16"), "CPU")
    assert min(times[:2]) > 0


def test_ratio_is_how_many_times_faster_16_bits_are():
    assert matmul_timing.ProductTimes("CPU", 768, "bfloat16", float32_ms=6.0, dtype_ms=2.0).ratio == 3.0


def rounds(ratio, noise, seed):
    """Times of one round after another on a machine that others load: noisy, and some of them far off."""
    rng = np.random.default_rng(seed)
    while True:
        float32, other = np.exp(noise * rng.standard_normal(2))
        far_off = 1 + 2 * (rng.random() < 0.05)
        yield ratio * float32 * far_off, other


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.15, 1.19, 1.2, 1.21, 1.35, 1.9])
def test_the_answer_is_the_same_from_run_to_run(ratio):
    answers = [matmul_timing.settle(rounds(ratio, 0.1, seed)) for seed in range(100)]
    gains = [matmul_timing.ProductTimes("CPU", 768, "bfloat16", *each).gains for each in answers]
    # Near the threshold, where it cannot be told, the answer is no.
    assert gains == [ratio > 1.3] * 100


@pytest.mark.parametrize(("ratio", "few"), [(0.6, True), (2.0, True), (1.2, False)])
def test_only_what_is_near_the_threshold_is_timed_for_longer(ratio, few):
    taken = 0

    def counted():
        nonlocal taken
        for each in rounds(ratio, 0.01, 0):
            taken += 1
            yield each

    matmul_timing.settle(counted())
    assert (taken == 7) == few
    assert taken <= 61


def test_a_slow_device_is_timed_for_as_long_as_there_is_time():
    times = iter([(12.0, 10.0)])
    assert matmul_timing.settle(times) == (12.0, 10.0, False)
    assert matmul_timing.settle(iter([(30.0, 10.0)])) == (30.0, 10.0, True)


def test_what_is_too_close_to_tell_is_said():
    near = matmul_timing.ProductTimes("CPU", 768, "bfloat16", 12.3, 10.0, False)
    assert not near.gains
    assert "too close to 1.2x to tell" in str(near)
