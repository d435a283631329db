import pytest

from keras_mp.hardware import Device, parse_cpuinfo, parse_sysctl

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
