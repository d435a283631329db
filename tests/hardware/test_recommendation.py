import pytest

from keras_mp.hardware import Device, fast_dtypes, recommend
from keras_mp.hardware.matmul_timing import ProductTimes

PASCAL = Device("gpu", "GTX 1080", compute_capability=(6, 1))
VOLTA = Device("gpu", "Tesla V100", compute_capability=(7, 0))
TURING = Device("gpu", "Tesla T4", compute_capability=(7, 5))
AMPERE = Device("gpu", "A100", compute_capability=(8, 0))
BLACKWELL = Device("gpu", "B200", compute_capability=(10, 0))
ROCM = Device("gpu", "MI300X")
TPU = Device("tpu", "TPU:0")
AMX = Device("cpu", "Sapphire Rapids", ("amx_bf16", "avx512_bf16"))
ZEN4 = Device("cpu", "EPYC 9654", ("avx512_bf16",))
GRAVITON3 = Device("cpu", "aarch64", ("bf16", "asimdhp"))
HALF_ONLY = Device("cpu", "aarch64", ("asimdhp",))
SKYLAKE = Device("cpu", "Skylake")


@pytest.mark.parametrize(
    ("devices", "policy", "jit_compile", "reason"),
    [
        ([SKYLAKE], "float32", False, "Skylake reports no bfloat16 instructions"),
        ([HALF_ONLY], "float32", False, "no bfloat16 instructions"),
        ([AMX], "mixed_bfloat16", False, "has AMX-BF16 and AVX512-BF16, which oneDNN's bfloat16 kernels use"),
        ([ZEN4], "mixed_bfloat16", False, "has AVX512-BF16, which"),
        ([GRAVITON3], "mixed_bfloat16", False, "has Arm BF16, which"),
        ([SKYLAKE, PASCAL], "float32", True, "GTX 1080 has compute capability 6.1, without 16-bit tensor cores"),
        ([AMX, PASCAL], "float32", True, "compute capability 6.1"),
        (
            [SKYLAKE, VOLTA],
            "mixed_float16",
            True,
            "Tesla V100 has compute capability 7.0, with tensor cores for float16",
        ),
        ([SKYLAKE, TURING], "mixed_float16", True, "compute capability 7.5"),
        ([SKYLAKE, AMPERE], "mixed_bfloat16", True, "A100 has compute capability 8.0, with tensor cores as fast"),
        ([SKYLAKE, BLACKWELL], "mixed_bfloat16", True, "compute capability 10.0"),
        ([SKYLAKE, AMPERE, AMPERE], "mixed_bfloat16", True, "A100 has compute"),
        ([SKYLAKE, AMPERE, TURING], "mixed_float16", True, "The weakest of 2 unlike GPUs decides, and Tesla T4 has"),
        ([SKYLAKE, TURING, AMPERE], "mixed_float16", True, "The weakest of 2 unlike GPUs decides, and Tesla T4 has"),
        ([SKYLAKE, AMPERE, PASCAL], "float32", True, "and GTX 1080 has compute capability 6.1"),
        ([SKYLAKE, ROCM], "float32", True, "no CUDA compute capability for MI300X"),
        ([SKYLAKE, AMPERE, ROCM], "float32", True, "no CUDA compute capability for MI300X"),
        ([SKYLAKE, TPU, TPU], "mixed_bfloat16", True, "A TPU multiplies in bfloat16"),
        ([], "float32", False, "no bfloat16 instructions"),
    ],
)
def test_recommendation(devices, policy, jit_compile, reason):
    found = recommend(devices)
    assert (found.recommended_policy, found.recommended_jit_compile) == (policy, jit_compile)
    assert reason in found.reason
    assert found.devices == tuple(devices)


def test_a_cpu_is_not_recommended_kernels_that_are_switched_off():
    found = recommend([AMX], onednn=False)
    assert found.recommended_policy == "float32"
    assert "TF_ENABLE_ONEDNN_OPTS=0" in found.reason
    assert recommend([AMX, AMPERE], onednn=False).recommended_policy == "mixed_bfloat16"


def product_times(dtype, ratio):
    return ProductTimes("CPU", 768, dtype, float32_ms=4.0 * ratio, dtype_ms=4.0)


@pytest.mark.parametrize(
    ("device", "ratio", "policy", "reason"),
    [
        (ZEN4, 1.9, "mixed_bfloat16", "EPYC 9654 has AVX512-BF16, which oneDNN's bfloat16 kernels use"),
        (ZEN4, 1.2, "mixed_bfloat16", "which oneDNN's bfloat16 kernels use"),
        (
            ZEN4,
            0.5,
            "float32",
            "EPYC 9654 has AVX512-BF16, but is no faster for it: a matmul of two 768 x 768 matrices takes 2.00 ms in "
            "float32 and 4.00 ms in bfloat16 (0.5x). On such a CPU half precision saves memory, not time.",
        ),
        (GRAVITON3, 1.1, "float32", "has Arm BF16, but is no faster for it"),
    ],
)
def test_a_cpu_with_bfloat16_instructions_must_be_seen_to_be_fast(device, ratio, policy, reason):
    found = recommend([device], measure=lambda dtype: product_times(dtype, ratio))
    assert (found.recommended_policy, found.recommended_jit_compile) == (policy, False)
    assert found.fast_dtypes == ({"bfloat16"} if policy != "float32" else set())
    assert reason in found.reason


@pytest.mark.parametrize(
    ("devices", "onednn"), [([AMX], True), ([AMX], False), ([SKYLAKE], True), ([ZEN4], False), ([ZEN4, AMPERE], True)]
)
def test_no_matmul_is_timed_where_it_decides_nothing(devices, onednn):
    def measure(dtype):
        raise AssertionError(f"timed {dtype}")

    assert recommend(devices, onednn=onednn, measure=measure) == recommend(devices, onednn=onednn)


def test_fast_dtypes_are_those_of_every_accelerator():
    assert fast_dtypes([SKYLAKE, AMPERE]) == {"bfloat16", "float16"}
    assert fast_dtypes([AMX, VOLTA]) == {"float16"}
    assert fast_dtypes([AMX, TPU]) == {"bfloat16"}
    assert fast_dtypes([AMX, ROCM]) == set()
    assert recommend([AMX]).fast_dtypes == {"bfloat16"}


def test_accelerators_are_all_but_the_cpu():
    assert recommend([AMX, AMPERE, TPU]).accelerators == (AMPERE, TPU)
    assert recommend([AMX]).accelerators == ()
