import json
import os
import pathlib
import subprocess
import sys

import pytest

from keras_mp.errors import ArgumentError
from keras_mp.hardware import Device, detect, fast_dtypes, measure, parse_cpuinfo, parse_sysctl, recommend
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

SAPPHIRE_RAPIDS_CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu vme avx512f avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8
vmx flags\t: vnmi bf16
bugs\t\t: spectre_v1

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu vme avx512f avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8
"""
GRAVITON3_CPUINFO = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd fphp asimdhp sve svebf16 i8mm bf16 dgh rng
CPU implementer\t: 0x41
"""


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (SAPPHIRE_RAPIDS_CPUINFO, ("amx_bf16", "avx512_bf16", "avx512_fp16")),
        (GRAVITON3_CPUINFO, ("bf16", "asimdhp")),
        ("flags : fpu sse2 avx2 avx512f avx512_bitalg\n", ()),
        ("Features : fp asimd svebf16\n", ()),
        ("flags : amx_bf16 avx512_bf16\n\nflags : avx512_bf16\n", ("avx512_bf16",)),
        ("model name : amx_bf16\nbugs : bf16\n", ()),
        ("", ()),
    ],
    ids=["sapphire-rapids", "graviton3", "skylake", "other-names", "unlike-cores", "not-a-flag", "empty"],
)
def test_features_are_read_from_cpuinfo(text, features):
    assert parse_cpuinfo(text).features == features


def test_the_cpu_is_named_as_the_system_names_it():
    assert parse_cpuinfo(SAPPHIRE_RAPIDS_CPUINFO).name == "Intel(R) Xeon(R) Platinum 8488C"
    assert parse_cpuinfo(GRAVITON3_CPUINFO).name != ""


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        ("machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_BF16: 1\n", "Apple M2", ("bf16",)),
        ("machdep.cpu.brand_string: Apple M1\nhw.optional.arm.FEAT_BF16: 0\n", "Apple M1", ()),
        ("machdep.cpu.brand_string: Intel(R) Core(TM) i7\n", "Intel(R) Core(TM) i7", ()),
    ],
)
def test_features_are_read_from_sysctl(text, name, features):
    assert parse_sysctl(text) == Device("cpu", name, features)


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
            "EPYC 9654 has AVX512-BF16, but is no faster for it: a product of two 768 x 768 matrices takes 2.00 ms in "
            "float32 and 4.00 ms in bfloat16 (0.5x). On such a CPU 16 bits save memory, not time.",
        ),
        (GRAVITON3, 1.1, "float32", "has Arm BF16, but is no faster for it"),
    ],
)
def test_a_cpu_with_bfloat16_instructions_must_be_seen_to_be_fast(device, ratio, policy, reason):
    found = recommend([device], product=lambda dtype: product_times(dtype, ratio))
    assert (found.recommended_policy, found.recommended_jit_compile) == (policy, False)
    assert found.fast_dtypes == ({"bfloat16"} if policy != "float32" else set())
    assert reason in found.reason


@pytest.mark.parametrize(
    ("devices", "onednn"), [([AMX], True), ([AMX], False), ([SKYLAKE], True), ([ZEN4], False), ([ZEN4, AMPERE], True)]
)
def test_no_product_is_timed_where_it_decides_nothing(devices, onednn):
    def product(dtype):
        raise AssertionError(f"timed {dtype}")

    assert recommend(devices, onednn=onednn, product=product) == recommend(devices, onednn=onednn)


def test_what_detect_recommends_on_a_cpu_agrees_with_what_it_measures():
    found = detect()
    if not found.accelerators and found.recommended_policy == "mixed_bfloat16":
        assert measure("bfloat16").gains or "amx_bf16" in found.devices[0].features
    elif not found.accelerators and set(found.devices[0].features) & {"avx512_bf16", "bf16"}:
        assert str(measure("bfloat16")) in found.reason


def test_fast_dtypes_are_those_of_every_accelerator():
    assert fast_dtypes([SKYLAKE, AMPERE]) == {"bfloat16", "float16"}
    assert fast_dtypes([AMX, VOLTA]) == {"float16"}
    assert fast_dtypes([AMX, TPU]) == {"bfloat16"}
    assert fast_dtypes([AMX, ROCM]) == set()
    assert recommend([AMX]).fast_dtypes == {"bfloat16"}


def test_accelerators_are_all_but_the_cpu():
    assert recommend([AMX, AMPERE, TPU]).accelerators == (AMPERE, TPU)
    assert recommend([AMX]).accelerators == ()


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux only")
def test_detect_finds_this_cpu():
    words = set(pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    cpu = detect().devices[0]
    assert cpu.kind == "cpu"
    for feature in ("amx_bf16", "avx512_bf16"):
        assert (feature in cpu.features) == (feature in words)


@pytest.mark.skipif(bool(detect().accelerators), reason="a GPU or TPU decides here")
def test_detect_is_not_stale(monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    enabled = detect()
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert detect().recommended_policy == "float32"
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS")
    assert detect() == enabled == recommend(enabled.devices, product=measure)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_measure_times_both_dtypes(dtype):
    times = measure(dtype)
    assert (times.device, times.dtype) == ("CPU", dtype)
    assert times.float32_ms > 0
    assert times.dtype_ms > 0
    assert measure(dtype, "CPU") is times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float32",), 'measure(dtype=\'float32\'): expected "bfloat16" or "float16".'),
        (("mixed_float16",), "measure(dtype='mixed_float16'): expected"),
        (("float16", "NPU"), "measure(device='NPU'): expected a kind of device that is here: 'CPU'"),
    ],
)
def test_measure_refuses_what_it_cannot_time(arguments, message):
    with pytest.raises(ArgumentError) as caught:
        measure(*arguments)
    assert message in str(caught.value)


CONFIGURED_LATER = """
import json, sys, warnings
import tensorflow as tf
print("TensorFlow is imported", file=sys.stderr)
import keras_mp
print("keras_mp is imported", file=sys.stderr)
imported = "keras_mp.cli" in sys.modules or "typer" in sys.modules
from keras_mp import hardware
from keras_mp._compat import runtime

keras_mp.detect()
hardware.measure("float16")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras_mp.set_policy("mixed_float16")
before = runtime.runtime_started()
print("the hardware is measured", file=sys.stderr)
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.distribute.MultiWorkerMirroredStrategy()
after = runtime.runtime_started()
print(json.dumps([imported, before, after, len(tf.config.list_logical_devices("CPU"))]))
"""


def test_tensorflow_can_be_configured_afterwards_and_nothing_is_logged():
    # Without the level that the suite sets, as a user has it.
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-c", CONFIGURED_LATER]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [False, False, True, 2]
    lines = ran.stderr.splitlines()
    start, imported, measured = (
        lines.index(mark) for mark in ("TensorFlow is imported", "keras_mp is imported", "the hardware is measured")
    )
    assert lines[start + 1 : imported] == []
    # TensorFlow says once that a session runs without MLIR, and that this CPU has no float16 instructions.
    said_by_tensorflow = ("MLIR V1 optimization pass is not enabled", "oneDNN supports DT_HALF only")
    others = [line for line in lines[imported + 1 : measured] if not any(words in line for words in said_by_tensorflow)]
    assert others == []
