import json
import os
import pathlib
import subprocess
import sys

import pytest

from keras_mp.errors import ArgumentError
from keras_mp.hardware import detect, measure, recommend


def test_what_detect_recommends_on_a_cpu_agrees_with_what_it_measures():
    found = detect()
    if not found.accelerators and found.recommended_policy == "mixed_bfloat16":
        assert measure("bfloat16").gains or "amx_bf16" in found.devices[0].features
    elif not found.accelerators and set(found.devices[0].features) & {"avx512_bf16", "bf16"}:
        assert str(measure("bfloat16")) in found.reason


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
    assert detect() == enabled == recommend(enabled.devices, measure=measure)


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
