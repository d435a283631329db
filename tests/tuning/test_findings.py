"""The sentences that a tuning makes of given figures."""

import pytest

from keras_mp.hardware import Device, fast_dtypes
from keras_mp.hardware import recommend as recommend_hardware
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.tuning import findings
from keras_mp.tuning.matmul_counts import Matmul, Work
from keras_mp.tuning.report import Candidate


def candidate(policy="float32", jit_compile=False, steps=1, ratio=1.0, **facts):
    facts = {"step_ms": None if ratio is None else 10 * ratio, "agrees": True, **facts}
    return Candidate(policy, jit_compile, steps, ratio=ratio, **facts)


CURRENT = candidate(current=True)


def test_why_a_candidate_failed_is_a_sentence():
    failed = candidate("mixed_float16", ratio=None, agrees=None, why="failed: there is no kernel: for half")
    assert findings.about_failed([CURRENT, failed]) == [
        "mixed_float16 with jit_compile=False failed: there is no kernel: for half"
    ]


def test_a_matmul_without_a_kernel_is_named_by_its_layer():
    """The graph is that of a copy, whose name TensorFlow adds a number to."""
    matmul = Matmul("gpt_1/block_2/attention_1/einsum/MatMul", "MatMul", 1e5, (8, 8))
    (text,) = findings.about_small_matmuls(Work((matmul,)), [], frozenset({"gpt", "block_2", "attention"}))
    assert "gpt/block_2/attention/einsum" in text


AMX = Device("cpu", "Xeon", ("amx_bf16",))
TIMES = [ProductTimes("CPU", 1000, "bfloat16", 20.0, 5.0), ProductTimes("CPU", 1000, "float16", 20.0, 22.0)]


def test_matmuls_are_described_by_dtype():
    bfloat16, float16 = findings.about_matmuls(TIMES)
    assert "20.00 ms in float32 and 5.00 ms in bfloat16 (4.0x): bfloat16 gains enough" in bfloat16
    assert "22.00 ms in float16 (0.9x): float16 gains nothing" in float16


def test_the_share_outside_matmuls_limits_the_gain():
    # 2e9 operations at 1e8 in a millisecond are 20 ms of 40; four times faster they are 5, and the step 25.
    (text,) = findings.about_share(Work((Matmul("a/MatMul", "MatMul", 2e9),)), 40.0, TIMES)
    assert "By estimate" in text
    assert "50% of a float32 step's 40.00 ms" in text
    assert "matmuls alone make the step 1.6 times as fast. Savings" in text
    (text,) = findings.about_share(Work((Matmul("a/MatMul", "MatMul", 2e9),), loops=("rnn/while",)), 40.0, TIMES)
    assert "2 billion operations at least" in text
    assert "rnn/while" in text
    (text,) = findings.about_share(Work(()), 40.0, TIMES)
    assert "no matmul" in text


def test_small_matmuls_are_named_by_their_layers():
    matmuls = (
        Matmul("net_1/dense_1/MatMul", "MatMul", 1e5, (4, 8)),
        Matmul("net_1/dense_1_2/MatMul", "MatMul", 1e5, (8, 2)),
        Matmul("gradient_tape/net_1/dense_1/MatMul", "MatMul", 1e5, (4, 8)),
    )
    kernels = [findings.Kernel("net/dense", (4, 8)), findings.Kernel("net/dense_1", (8, 2))]
    (text,) = findings.about_small_matmuls(Work(matmuls), kernels)
    assert "2 of 2 matmuls" in text
    assert "net/dense, net/dense_1." in text
    # A kernel of three axes, which is multiplied as a matrix; and a matmul with no kernel, named by its scope.
    attention = (
        Matmul("net_1/attention_1/query_1/MatMul", "MatMul", 1e5, (8, 16)),
        Matmul("a/b/MatMul", "MatMul", 1e5),
    )
    (text,) = findings.about_small_matmuls(Work(attention), [findings.Kernel("net/attention/query", (8, 2, 8))])
    assert "net/attention/query, a/b." in text
    large = Matmul("net_1/large/MatMul", "MatMul", 1e9, (512, 512))
    assert findings.about_small_matmuls(Work((large, matmuls[0])), kernels) == []


def test_sizes_that_are_no_multiples_of_8_are_named_where_the_hardware_cares():
    kernels = [findings.Kernel("net/in", (64, 128)), findings.Kernel("net/out", (128, 10))]
    fast = fast_dtypes([AMX])
    sizes, rows = findings.about_dimensions(kernels, 30, fast)
    assert "1 of 2 kernels have others: net/out (128 x 10)" in sizes
    assert "16 units instead of 10" in sizes
    assert "batch_size=32" in rows
    assert findings.about_dimensions(kernels[:1], 32, fast) == []
    assert findings.about_dimensions(kernels, 30, frozenset()) == []
    # Features and classes are what the data have.
    assert findings.about_dimensions([findings.Kernel("net/out", (6, 10))], 32, fast, frozenset({6, 10})) == []


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (AMX, "Xeon has AMX-BF16"),
        (Device("cpu", "Old"), "CPUs with AMX-BF16 multiply faster in bfloat16, some with AVX512-BF16 do"),
        (Device("gpu", "P100", compute_capability=(6, 0)), "from compute capability 7.0 on"),
    ],
)
def test_what_the_hardware_has_or_lacks_is_said(device, words):
    assert words in findings.about_hardware(recommend_hardware([device]))[0]


@pytest.mark.parametrize(
    "device", [AMX, Device("cpu", "Old"), *(Device("gpu", "X", compute_capability=(n, 0)) for n in (6, 7, 8))]
)
def test_what_the_hardware_has_says_nothing_of_what_to_switch_on(device):
    """The recommendation above it does, of what was timed, and may be another."""
    assert "jit_compile" not in " ".join(findings.about_hardware(recommend_hardware([device])))


@pytest.mark.parametrize(
    ("figures", "is_bottleneck"),
    [((10, 60, 50), True), ((10, 10.5, 2), False), ((10, 10.4, 9), False), ((10, 14, 0.1), False)],
)
def test_an_input_pipeline_is_the_bottleneck_where_steps_wait_for_it(figures, is_bottleneck):
    (text,) = findings.about_pipeline(findings.Pipeline(*figures))
    assert ("is the bottleneck" in text) is is_bottleneck
    assert ("tf.data.AUTOTUNE" in text) is is_bottleneck
    assert f"{figures[0]:.2f} ms with a cached batch" in text


def test_what_was_not_timed_is_named():
    assert findings.about_untimed([CURRENT], 60.0) == []
    left = candidate("mixed_float16", True, ratio=None, why="not timed: it would not be done in time")
    (text,) = findings.about_untimed([CURRENT, left], 10.0)
    assert "Not timed within 10 seconds: mixed_float16 with jit_compile=True" in text
    assert "Give a budget of 40 seconds" in text


def test_what_several_steps_in_a_call_gain_is_said():
    (text,) = findings.about_short_steps([CURRENT, candidate(steps=16, ratio=0.2)])
    assert "10.00 ms in float32 one by one and 2.00 ms with steps_per_execution=16" in text
    assert findings.about_short_steps([CURRENT]) == []
    assert findings.about_short_steps([CURRENT, candidate(steps=16, ratio=0.95)]) == []
