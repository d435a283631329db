"""How long products take: that both dtypes are timed, and what the times say."""

from keras_mp import product_times


def test_the_eager_way_of_an_accelerator_times_both_dtypes():
    # The CPU stands in for the GPU: the code names the device and nothing else.
    times = product_times._interleaved_eager(product_times._factors("bfloat16"), "CPU")
    assert set(times) == {"float32", "bfloat16"}
    assert min(times.values()) > 0


def test_ratio_is_how_many_times_faster_16_bits_are():
    assert product_times.ProductTimes("CPU", 768, "bfloat16", float32_ms=6.0, dtype_ms=2.0).ratio == 3.0
