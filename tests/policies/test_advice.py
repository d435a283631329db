import keras
import pytest

import keras_mp
from keras_mp.errors import KerasMPWarning
from keras_mp.hardware import Device, recommend
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.policies.advice import advice

CPU = Device("cpu", "Skylake")
AMX = Device("cpu", "Sapphire Rapids", ("amx_bf16",))
cpu_only = pytest.mark.skipif(bool(keras_mp.detect().accelerators), reason="concerns machines without GPU and TPU")


def gpu(major, minor):
    return Device("gpu", f"GPU {major}.{minor}", compute_capability=(major, minor))


def times(dtype, float32_ms=3.0, dtype_ms=4.0):
    return ProductTimes("CPU", 768, dtype, float32_ms, dtype_ms)


SLOW = (
    "float16 gains nothing on this CPU: a matmul of two 768 x 768 matrices takes 3.00 ms in float32 and 4.00 ms in "
    "float16 (0.8x), and casts come on top. Training works, and is slower for it: a little with the layers of "
    "keras_mp, which keras_mp.convert puts in, more with Keras's own (in float16 a hundred times, where they convolve)."
)
VOLTA = (
    "bfloat16 gains nothing on this hardware. GPU 7.0 has compute capability 7.0, with tensor cores for float16; those "
    "for bfloat16 come with 8.0. XLA fuses the casts and small ops between matmuls."
)
STAGNATES = (
    "the weights themselves are held in {}, so an update below {} of a weight is rounded away and training stagnates."
)


@pytest.mark.parametrize(
    ("name", "devices", "fault", "instead"),
    [
        ("mixed_float16", [CPU], SLOW, 'keras_mp.set_policy("float32"), the best for this hardware'),
        ("mixed_float16", [AMX], SLOW, 'keras_mp.set_policy("mixed_bfloat16"), the best for this hardware'),
        ("mixed_bfloat16", [CPU, gpu(7, 0)], VOLTA, 'keras_mp.set_policy("mixed_float16"), the best for this hardware'),
        ("bfloat16", [CPU, gpu(8, 0)], STAGNATES.format("bfloat16", "1/256"), 'keras_mp.set_policy("mixed_bfloat16")'),
        (
            "float16",
            [CPU],
            f"{STAGNATES.format('float16', '1/2048')} Besides, {SLOW}",
            'keras_mp.set_policy("float32"), the best for this hardware, or keras_mp.set_policy("mixed_float16") to '
            "keep the dtype",
        ),
    ],
    ids=["float16-cpu", "float16-amx", "bfloat16-volta", "pure-ampere", "pure-cpu"],
)
def test_advice_says_what_is_wrong_and_what_to_type(name, devices, fault, instead):
    (message,) = advice(keras.DTypePolicy(name), recommend(devices), times)
    assert message == f'set_policy("{name}"): {fault} Type {instead}.'


@pytest.mark.parametrize(
    ("name", "devices", "warned"),
    [
        ("float32", [CPU], False),
        ("float64", [CPU], False),
        ("mixed_bfloat16", [CPU], True),
        ("mixed_bfloat16", [AMX], False),
        ("mixed_float16", [CPU, gpu(6, 1)], True),
        ("mixed_float16", [CPU, gpu(7, 5)], False),
        ("mixed_float16", [CPU, gpu(9, 0)], False),
        ("mixed_bfloat16", [CPU, gpu(9, 0)], False),
        ("mixed_bfloat16", [CPU, gpu(9, 0), gpu(7, 5)], True),
        ("mixed_float16", [CPU, Device("tpu", "TPU:0")], True),
        ("mixed_bfloat16", [CPU, Device("tpu", "TPU:0")], False),
        ("mixed_float16", [CPU, Device("gpu", "MI300X")], False),
    ],
)
def test_advice_is_given_where_hardware_is_known_to_gain_nothing(name, devices, warned):
    assert bool(advice(keras.DTypePolicy(name), recommend(devices), times)) == warned


def test_what_was_measured_to_be_fast_is_not_called_useless():
    def fast(dtype):
        return times(dtype, float32_ms=3.0, dtype_ms=1.0)

    assert advice(keras.DTypePolicy("mixed_float16"), recommend([CPU]), fast) == []


def test_advice_on_a_map_names_the_policy_in_it():
    policies = {"encoder/.*": keras.DTypePolicy("mixed_float16")}
    policy = keras.dtype_policies.DTypePolicyMap(keras.DTypePolicy("float32"), policies)
    (message,) = advice(policy, recommend([CPU]), times)
    assert message.startswith('set_policy(<a DTypePolicyMap with "mixed_float16">): float16 gains nothing')
    assert message.endswith('Type "float32" in its place in the map, the best for this hardware.')


@cpu_only
def test_the_policy_is_set_with_its_warning_and_the_times_are_measured():
    measured = keras_mp.hardware.measure("float16")
    with pytest.warns(KerasMPWarning) as caught:
        assert keras_mp.set_policy("float16").name == "float16"
    expected = advice(keras.DTypePolicy("float16"), keras_mp.detect(), lambda dtype: measured)
    assert [str(each.message) for each in caught] == expected
