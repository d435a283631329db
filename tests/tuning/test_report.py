"""Which candidate is recommended, and how a tuning reads."""

import io

import pytest
from rich.console import Console

from keras_mp.tuning.report import Candidate, Tuning, recommend, why_recommended


def candidate(policy="float32", jit_compile=False, steps=1, ratio=1.0, **facts):
    facts = {"step_ms": None if ratio is None else 10 * ratio, "agrees": True, **facts}
    return Candidate(policy, jit_compile, steps, ratio=ratio, **facts)


CURRENT = candidate(current=True)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([candidate("mixed_bfloat16", ratio=0.5)], ("mixed_bfloat16", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.96)], ("float32", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.8, noise=0.15)], ("float32", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.8, noise=0.05)], ("mixed_bfloat16", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.5, agrees=False)], ("float32", False, 1)),
        ([candidate("mixed_bfloat16", ratio=None)], ("float32", False, 1)),
        (
            [candidate("mixed_float16", ratio=0.50), candidate("mixed_bfloat16", ratio=0.51)],
            ("mixed_bfloat16", False, 1),
        ),
        (
            [candidate("mixed_float16", ratio=0.40), candidate("mixed_bfloat16", ratio=0.50)],
            ("mixed_float16", False, 1),
        ),
        ([candidate("mixed_bfloat16", ratio=0.5), candidate(jit_compile=True, ratio=0.51)], ("float32", True, 1)),
        ([candidate(jit_compile=True, ratio=0.5), candidate(ratio=0.5, steps=16)], ("float32", False, 16)),
    ],
)
def test_the_fastest_that_agrees_is_recommended_unless_a_simpler_one_is_as_fast(others, expected):
    for order in ([CURRENT, *others], [*others, CURRENT]):
        chosen = recommend(order)
        assert (chosen.policy, chosen.jit_compile, chosen.steps_per_execution) == expected


def test_what_is_recommended_is_itself_faster_than_the_model_as_it_is():
    unsure = candidate(
        "mixed_bfloat16", ratio=0.9, noise=0.4
    )  # neither slower than the fastest nor faster than float32
    fast = candidate("mixed_float16", ratio=0.5)
    assert recommend([CURRENT, unsure, fast]) is fast
    assert recommend([CURRENT, unsure]) is CURRENT


def test_what_was_dropped_is_not_recommended():
    dropped = candidate("mixed_bfloat16", ratio=0.5, why="dropped: over 1.5 times the fastest")
    assert recommend([CURRENT, dropped, candidate("mixed_float16", ratio=0.3)]).policy == "mixed_float16"


def test_a_model_in_16_bits_is_left_as_it_is_within_noise_of_float32():
    own = candidate("mixed_bfloat16", ratio=1.02, current=True)
    assert recommend([candidate(), own]) is own
    assert recommend([candidate(ratio=1.0), candidate("mixed_bfloat16", ratio=1.2, current=True)]).policy == "float32"


def test_nothing_is_recommended_where_nothing_agrees():
    assert recommend([candidate(agrees=False), candidate(ratio=None)]) is None


@pytest.mark.parametrize(
    ("chosen", "others", "words"),
    [
        (CURRENT, [], ["Leave the model as it is", "10.00 ms", "nothing else was timed"]),
        (
            CURRENT,
            [candidate("mixed_bfloat16", ratio=2.0)],
            ["mixed_bfloat16 with jit_compile=False (20.00 ms)", "is not"],
        ),
        (CURRENT, [candidate("mixed_bfloat16", ratio=0.97)], ["(9.70 ms)", "not faster by more than 5%"]),
        (
            candidate("mixed_bfloat16", ratio=0.5, error=0.003, converted=True),
            [CURRENT],
            [
                "2.00 times as fast as the model as it is (10.00 ms)",
                "3.0e-03",
                "2.00 times as fast as the fastest in float32, float32 with jit_compile=False (10.00 ms)",
                'model = keras_mp.convert(model, "mixed_bfloat16"), model.jit_compile = False and '
                "model.steps_per_execution = 1",
            ],
        ),
        (candidate(jit_compile=True, ratio=0.5), [CURRENT], ["Type model.compile(..., jit_compile=True"]),
        (
            # What several steps gain in float32 as well is no gain of the dtype's.
            candidate("mixed_bfloat16", steps=16, ratio=0.5, converted=True),
            [CURRENT, candidate(steps=16, ratio=0.6)],
            ["1.20 times as fast as the fastest in float32, float32 with jit_compile=False, steps_per_execution=16"],
        ),
    ],
)
def test_the_reason_says_what_to_type(chosen, others, words):
    text = why_recommended(chosen, [chosen, *others])
    for each in words:
        assert each in text


def test_a_tuning_prints_as_a_table_with_its_sentences():
    others = [candidate("mixed_float16", ratio=None, agrees=None, why="failed: no such thing")]
    others.append(candidate("mixed_bfloat16", ratio=0.5, error=0.4, agrees=False))
    others.append(candidate("mixed_bfloat16", ratio=1.3, converted=True))
    text = str(Tuning("float32", False, 1, "Because.", (CURRENT, *others), ["Firstly [this]."]))
    lines = [line.rstrip().split(maxsplit=6) for line in text.replace("*", "").splitlines()]
    assert [line for line in lines if line and line[0] in ("float32", "mixed_bfloat16", "mixed_float16")][-4:] == [
        ["float32", "no", "1", "10.00", "1.00", "-", "as it is"],
        ["mixed_float16", "no", "1", "-", "-", "-", "failed"],
        ["mixed_bfloat16", "no", "1", "5.00", "0.50", "4.0e-01", "outputs disagree"],
        ["mixed_bfloat16", "no", "1", "13.00", "1.30", "-", "by convert"],
    ]
    assert sum("*" in line for line in text.splitlines()) == 1
    assert "over float32: the median over all rounds" in " ".join(text.split())
    assert text.endswith("Because.\nFirstly [this].")


def test_a_table_fits_a_terminal_of_80_columns():
    others = [candidate("mixed_bfloat16", jit_compile=True, steps=16, ratio=123.4, error=0.4, converted=True)]
    text = io.StringIO()
    Console(file=text, width=80).print(Tuning("float32", False, 1, "Because.", (CURRENT, *others), []).table())
    (row,) = [line for line in text.getvalue().splitlines() if "mixed_bfloat16" in line]
    assert row.split() == ["mixed_bfloat16", "yes", "16", "1234.00", "123.40", "4.0e-01", "by", "convert"]
