"""The state machine against a model of it in plain Python, and the norms against float64 NumPy."""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mp.errors import ArgumentError
from keras_mp.optimizers import loss_scale
from keras_mp.optimizers.loss_scale import LossScaleState, LossScaling


@dataclasses.dataclass
class PlainLossScale:
    """The rules as the design words them, one Python `if` each, in float64."""

    scaling: LossScaling

    def __post_init__(self):
        self.scale = self.scaling.initial_scale
        self.finite_in_a_row = 0
        self.budget = self.scaling.hysteresis
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.losses = 0

    def step(self, finite, loss_finite):
        rules = self.scaling
        if finite:
            self.skipped_in_a_row = self.losses = 0
            self.budget = rules.hysteresis
            self.finite_in_a_row += 1
            if self.finite_in_a_row == rules.growth_steps:
                self.finite_in_a_row = 0
                if rules.dynamic:
                    self.scale = min(self.scale * rules.growth_factor, rules.max_scale)
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.losses += not loss_finite
        self.finite_in_a_row = 0
        self.budget -= 1
        if self.budget == 0:
            self.budget = rules.hysteresis
            if rules.dynamic:
                self.scale = max(self.scale * rules.backoff_factor, rules.min_scale)

    def as_tuple(self):
        return (self.scale, self.finite_in_a_row, self.budget, self.skipped, self.skipped_in_a_row, self.losses)


LENGTH = 40


@settings(max_examples=80, deadline=None)
@given(
    finite=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    losses=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    growth_steps=st.integers(1, 5),
    hysteresis=st.integers(1, 4),
    exponents=st.tuples(st.integers(-14, 0), st.integers(0, 6), st.integers(0, 6)),
    growth=st.sampled_from([1.0, 2.0, 4.0, 2.0**64]),
    backoff=st.sampled_from([0.5, 0.25, 2.0**-64]),
    dynamic=st.booleans(),
)
def test_every_sequence_of_steps_equals_the_plain_model(
    finite, losses, growth_steps, hysteresis, exponents, growth, backoff, dynamic
):
    low, middle, high = exponents[0], exponents[0] + exponents[1], exponents[0] + exponents[1] + exponents[2]
    scaling = LossScaling(2.0**middle, growth_steps, growth, backoff, hysteresis, 2.0**low, 2.0**high, dynamic)
    plain, state = PlainLossScale(scaling), scaling.initial_state()
    for good, loss_good in zip(finite, losses, strict=True):
        plain.step(good, loss_good)
        state = scaling.update(state, tf.constant(good), tf.constant(loss_good))
        # Powers of two are exact in float32, so nothing but equality will do.
        assert tuple(float(value) for value in state) == plain.as_tuple()


def test_a_story_of_growth_backoff_floor_and_ceiling():
    scaling = LossScaling(initial_scale=4.0, growth_steps=2, hysteresis=2, min_scale=2.0, max_scale=8.0)
    state = scaling.initial_state()
    story = [
        # finite, scale, steps since, budget, skipped, in a row
        (True, 4, 1, 2, 0, 0),
        (True, 8, 0, 2, 0, 0),
        (True, 8, 1, 2, 0, 0),
        (True, 8, 0, 2, 0, 0),  # the ceiling
        (False, 8, 0, 1, 1, 1),  # hysteresis bears one
        (True, 8, 1, 2, 1, 0),  # and is refilled
        (False, 8, 0, 1, 2, 1),
        (False, 4, 0, 2, 3, 2),
        (False, 4, 0, 1, 4, 3),
        (False, 2, 0, 2, 5, 4),
        (False, 2, 0, 1, 6, 5),
        (False, 2, 0, 2, 7, 6),  # the floor
    ]
    for finite, *expected in story:
        state = scaling.update(state, tf.constant(finite))
        assert [float(value) for value in state[:5]] == expected


@pytest.mark.parametrize("scale", [0.0, math.inf, -math.inf, math.nan, 1e-30, 1e30])
@pytest.mark.parametrize("finite", [True, False])
def test_a_ruined_scale_from_elsewhere_comes_back_inside_the_bounds(scale, finite):
    scaling = LossScaling()
    state = scaling.initial_state()._replace(scale=tf.constant(scale, tf.float32))
    scale = float(scaling.update(state, tf.constant(finite)).scale)
    assert scaling.min_scale <= scale <= scaling.max_scale


def test_the_state_is_of_scalars_with_the_dtypes_said():
    scaling = LossScaling()
    for state in (scaling.initial_state(), scaling.update(scaling.initial_state(), tf.constant(True))):
        assert isinstance(state, LossScaleState)
        assert [value.dtype for value in state] == [tf.float32] + [tf.int64] * 5
        assert all(value.shape == () for value in state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_scale": 0.0}, "`initial_scale` must be a positive number.*Received: initial_scale=0.0"),
        ({"initial_scale": math.inf}, "between 2.*initial_scale=inf"),
        ({"initial_scale": math.nan}, "initial_scale=nan"),
        ({"initial_scale": "big"}, "initial_scale='big'"),
        ({"initial_scale": True}, "initial_scale=True"),
        ({"max_scale": 2.0**127}, "`max_scale` must be .*2\\*\\*126.*Received: max_scale"),
        ({"min_scale": 2.0**-127}, "`min_scale` must be"),
        ({"min_scale": -1.0}, "`min_scale` must be"),
        ({"initial_scale": 2.0**25}, "must lie between `min_scale` and `max_scale`.*Move the bound"),
        ({"min_scale": 2.0**16}, "must lie between"),
        ({"min_scale": 8.0, "max_scale": 2.0}, "`min_scale` must not be larger than `max_scale`.*8.0.*2.0"),
        ({"growth_factor": 0.5}, "`growth_factor` must be .* at least 1.*growth_factor=0.5"),
        ({"growth_factor": math.inf}, "growth_factor=inf"),
        ({"backoff_factor": 1.0}, "`backoff_factor` must be .* between 0 and 1.*dynamic=False"),
        ({"backoff_factor": 0.0}, "backoff_factor=0.0"),
        ({"backoff_factor": math.nan}, "backoff_factor=nan"),
        ({"growth_steps": 0}, "`dynamic_growth_steps` must be an integer of at least 1.*dynamic_growth_steps=0"),
        ({"growth_steps": 2.5}, "dynamic_growth_steps=2.5"),
        ({"hysteresis": True}, "`hysteresis` must be an integer.*hysteresis=True"),
    ],
)
def test_constants_out_of_range_are_refused_in_words(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        LossScaling(**arguments)


WITNESSES = {"squares": loss_scale.sum_of_squares, "plain": loss_scale.finite_witness}


def finite(gradients, witness):
    return loss_scale.all_finite(gradients, WITNESSES[witness](gradients))


FINITE_CASES = {
    "ordinary": ([[1.0, -2.0]], "float32", True),
    "largest float32": ([[3.4e38, -3.4e38]], "float32", True),
    "largest float16": ([[65504.0] * 50], "float16", True),
    "largest bfloat16": ([[3.3e38] * 50], "bfloat16", True),
    "float64 beyond float32": ([[1e300]], "float64", True),
    "nan": ([[1.0], [math.nan, 2.0]], "float32", False),
    "inf": ([[1.0], [math.inf]], "float16", False),
    "negative inf": ([[-math.inf], [1.0]], "bfloat16", False),
    "inf beside negative inf": ([[math.inf, -math.inf]], "bfloat16", False),
    "nan in bfloat16": ([[1.0] * 999 + [math.nan]], "bfloat16", False),
    "inf beside a large finite one": ([[3.4e38], [math.inf]], "float32", False),
    "empty": ([[]], "float32", True),
    "none": ([], "float32", True),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("witness", WITNESSES)
@pytest.mark.parametrize("case", FINITE_CASES)
def test_finiteness(case, witness, compiled):
    values, dtype, expected = FINITE_CASES[case]
    gradients = [tf.constant(value, dtype) for value in values]
    check = tf.function(lambda *g: finite(g, witness), jit_compile=compiled)
    assert bool(check(*gradients)) is expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("witness", WITNESSES)
def test_finiteness_looks_into_sparse_gradients_and_passes_over_none(witness, dtype):
    bad = tf.IndexedSlices(tf.constant([[1.0, math.nan]], dtype), tf.constant([2]), tf.constant([3, 2]))
    good = tf.IndexedSlices(tf.constant([[1.0, 2.0]], dtype), tf.constant([2]), tf.constant([3, 2]))
    assert not bool(finite([None, bad], witness))
    assert bool(finite([None, good], witness))


def test_bfloat16_is_looked_at_as_it_is():
    """A float32 copy of all gradients takes longer than the rest of the look."""
    found = []
    for witness in WITNESSES.values():
        function = tf.function(lambda g, witness=witness: witness([g]))
        operations = function.get_concrete_function(tf.TensorSpec((8, 4), "bfloat16")).graph.get_operations()
        found.append([each for each in operations if each.type == "Cast" and each.outputs[0].shape == (8, 4)] != [])
    assert found == [True, False]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([[3.0], [4.0]], "float32"),
        ([[3e38, 3e38], [1.0]], "float32"),
        ([[60000.0] * 7], "float16"),
        ([[1e200], [1e200]], "float64"),
        ([[0.0]], "float32"),
    ],
)
def test_the_norm_equals_float64_numpy_where_squares_overflow_too(values, dtype):
    gradients = [tf.constant(value, dtype) for value in values]
    exact = np.sqrt(sum(np.sum(np.square(np.array(g.numpy(), np.longdouble))) for g in gradients))
    if exact > np.finfo(np.float32).max and dtype == "float32":
        exact = np.inf
    np.testing.assert_allclose(
        float(loss_scale.global_norm(gradients, loss_scale.sum_of_squares(gradients))), float(exact), rtol=1e-6
    )
