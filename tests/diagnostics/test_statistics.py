"""Statistics of tensors, against NumPy in float64."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from keras_mp.diagnostics import statistics as module
from keras_mp.diagnostics.formats import FORMATS, best_loss_scale
from keras_mp.diagnostics.statistics import BINS, Statistics


def numbers(size, seed=0):
    """Numbers of both signs over all of float32's range, with zeros, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.uniform(1, 2, size), rng.integers(-149, 128, size)) * rng.choice([-1, 1], size)
    x = x.astype(np.float32)
    x[:7] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3.4e38]
    return x


def found_by(x, how):
    def program(x):
        return module.statistics(x, in_xla=how == "xla")

    if how != "eager":
        program = tf.function(program, jit_compile=how == "xla")
    counts, values = program(x)
    return Statistics(counts.numpy().astype(np.int64), *map(float, values.numpy()))


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize("shape", [(40_000,), (3, 5, 7), (16384,), ()], ids=str)
def test_counts_are_numpys(shape, how):
    x = numbers(max(int(np.prod(shape)), 7)).ravel()[: int(np.prod(shape))].reshape(shape)
    found = found_by(tf.constant(x), how)
    finite = np.abs(x[np.isfinite(x) & (x != 0)]).astype(np.float64)
    exponents = np.maximum(np.floor(np.log2(finite)), -127).astype(int) if finite.size else np.zeros(0, int)
    expected = np.bincount(exponents + 127, minlength=BINS - 1)
    np.testing.assert_array_equal(found.exponents, expected)
    assert found.zeros == (x == 0).sum()
    assert (found.infinities, found.nans, found.size) == (np.isinf(x).sum(), np.isnan(x).sum(), x.size)
    assert found.largest == finite.max(initial=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_counted_as_float32(dtype):
    x = np.array([0.0, 1.0, -3.5, 2.0**-14, 1e-7], np.float32)
    found = Statistics.of(tf.cast(x, dtype))
    assert (found.size, found.zeros) == (5, 1)
    assert found.rms == pytest.approx(np.sqrt((x.astype(float) ** 2).mean()), rel=1e-2)


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
def test_no_numbers_have_statistics(how):
    found = found_by(tf.zeros((0, 3)), how)
    assert (found.size, found.largest, found.smallest, found.squares) == (0, 0, np.inf, 0)


def test_statistics_add_up():
    x = numbers(1000)
    whole, parts = Statistics.of(x), Statistics.of(x[:300]) + Statistics.of(x[300:])
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert (whole.largest, whole.smallest) == (parts.largest, parts.smallest)


@pytest.mark.parametrize("exponent", [-40, -3, 0, 5, 30])
def test_a_power_of_two_shifts_the_histogram(exponent):
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    np.testing.assert_array_equal(
        Statistics.of(x).scaled(exponent).counts, Statistics.of(x * np.float32(2.0**exponent)).counts
    )


CASTS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("exponent", [-8, 0, 10])
@pytest.mark.parametrize("name", CASTS)
def test_shares_are_those_of_numpys_casts(name, exponent):
    rng = np.random.default_rng(2)
    # Below 2**-126 TensorFlow and XLA flush numbers to zero, so that bfloat16's underflow is tested by hand below.
    x = np.ldexp(rng.uniform(1, 2, 20_000), rng.integers(-60, 40, 20_000)).astype(np.float32)
    scaled = x.astype(np.float64) * 2.0**exponent
    with np.errstate(over="ignore"):
        cast = scaled.astype(np.float32).astype(CASTS[name]).astype(np.float64)
    found, format = Statistics.of(x), FORMATS[name]
    # Of one octave out of 100 the share is a guess.
    assert format.overflow(found, exponent) == pytest.approx((~np.isfinite(cast)).mean(), abs=2e-3)
    assert format.underflow(found, exponent) == pytest.approx((cast == 0).mean(), abs=1e-3)
    normal = 2.0**format.normal
    assert format.subnormal(found, exponent) == pytest.approx(((cast != 0) & (scaled < normal)).mean(), abs=1e-3)


def test_the_limits_are_those_of_the_casts():
    for name, cast in CASTS.items():
        format, info = FORMATS[name], ml_dtypes.finfo(cast)
        below, at = format.limit * (1 - 2.0**-20), format.limit
        with np.errstate(over="ignore"):
            assert np.isfinite(np.float64(below).astype(np.float32).astype(cast).astype(np.float64)), name
            assert not np.isfinite(np.float64(at).astype(np.float32).astype(cast).astype(np.float64)), name
        assert 2.0**format.normal == float(info.smallest_normal), name
        assert 2.0**format.tiny == float(info.smallest_subnormal) / 2, name
        assert format.epsilon == float(info.eps), name


def test_the_best_loss_scale_overflows_nothing_and_loses_least():
    gradients = [Statistics.of(np.array([3e-8, 2e-5], np.float32)), Statistics.of(np.array([0.25], np.float32))]
    exponent = best_loss_scale(gradients, FORMATS["float16"])
    lost = lambda k: sum(FORMATS["float16"].underflow(each, k) for each in gradients)  # noqa: E731
    assert all(FORMATS["float16"].overflow(each, exponent + 1) == 0 for each in gradients)
    assert lost(exponent) == min(lost(k) for k in range(exponent + 1))
    assert best_loss_scale([Statistics.of(np.zeros(3, np.float32))], FORMATS["float16"]) == 0
    assert best_loss_scale([Statistics.of(np.array([1e6], np.float32))], FORMATS["float16"]) < 0
