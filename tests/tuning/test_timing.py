"""Ratios of times, and errors of outputs."""

import numpy as np
import pytest

from keras_mp.tuning.timing import largest_error, paired_ratio


def test_a_ratio_is_taken_round_by_round():
    ratio, noise = paired_ratio([1.0, 10.0, 2.0, 1.5], [2.0, 20.0, 4.0, 3.0])
    assert (ratio, noise) == (0.5, 0.0)
    assert paired_ratio([1.0, 2.0], [1.0, 1.0]) == (1.5, 1.0)
    # Of normal values it is the standard error of a median.
    noisy = 1 + 0.1 * np.random.default_rng(0).standard_normal(10_000)
    assert paired_ratio(noisy, np.ones(10_000))[1] == pytest.approx(1.2533 * 0.1 / 100, rel=0.03)


def varying(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(
    "expected",
    [
        varying(64, 3),
        1000 + varying(64, 3),
        1000 + varying(64),
        varying(64, 5, 1) + np.array([[1000.0], [2000.0], [3000.0], [0.0], [-5000.0]]),
        varying(64, 3) * [1.0, 10.0, 0.3] + [1000.0, 0.0, 5.0],
        varying(64, 4, 4, 2) + 1000,
    ],
    ids=["plain", "level", "squeezed", "levels-by-position", "units", "images"],
)
def test_an_error_is_relative_to_what_an_output_varies_by_over_the_batch(expected):
    wrong = 0.1 * expected.std(axis=0)
    assert largest_error([expected], [expected]) == 0
    assert largest_error([expected + wrong], [expected]) == pytest.approx(0.1, rel=0.3)
    # The worst output counts.
    assert largest_error([expected, expected + wrong], [expected, expected]) > 0.05


def test_what_float32_cannot_tell_apart_is_no_error():
    expected = 1000 + 0.01 * varying(64, 3)
    assert largest_error([expected + 6e-5], [expected]) == 0
    assert largest_error([expected + 0.01], [expected]) > 0.5


@pytest.mark.parametrize(
    ("expected", "wrong", "error"),
    [
        (np.full((8, 2), 1000.0), 10.0, 0.01),  # judged by its level where nothing varies
        (np.zeros((8, 2)), 0.25, 0.25),
        (np.full((8, 1), 1000.0) + 1e-5 * varying(8, 1), 10.0, 0.01),  # what varies is rounding of float32
        (1000 + varying(1, 64), 0.1, 0.1),  # one row: by what its entries vary by
        (np.array(7.0), 0.7, 0.1),
    ],
    ids=["constant", "zero", "rounding", "one-row", "scalar"],
)
def test_an_output_that_does_not_vary_is_judged_by_its_level(expected, wrong, error):
    assert largest_error([expected + wrong], [expected]) == pytest.approx(error, rel=0.2)


def test_a_feature_that_hardly_varies_is_not_judged_by_next_to_nothing():
    expected = varying(64, 8) * [1, 1, 1, 1, 1, 1, 1e-4, 0]
    assert largest_error([expected + 1e-3], [expected]) == pytest.approx(0.01, rel=0.3)
    # Few rows tell little of what one feature varies by: two alike in one feature do not make its rounding an error.
    expected = varying(2, 256)
    assert largest_error([expected + 3e-3], [expected]) < 0.01


def test_an_error_is_infinite_for_what_is_not_finite_or_of_another_shape():
    reference = [np.array([[100.0, 1.0]]), np.array([[0.5]])]
    assert largest_error([np.array([[np.nan, 1.0]]), np.array([[0.5]])], reference) == np.inf
    assert largest_error([np.array([[100.0, 1.0]])], reference) == np.inf
    masked = np.where(varying(8, 3) > 0.5, -np.inf, varying(8, 3))
    assert largest_error([masked], [masked]) == 0
    assert 0.05 < largest_error([masked + 0.1], [masked]) < 0.5
    assert largest_error([np.array([np.inf])], [np.array([np.inf])]) == 0
