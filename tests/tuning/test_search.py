"""Real searches over small models."""

import random
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp._compat import execution, keras_models, runtime
from keras_mp.errors import ArgumentError, ConversionError, DistributionError, PolicyError
from keras_mp.tuning.report import Candidate, recommend
from keras_mp.tuning.search import _Search

# Real searches. Without XLA and with one step in a call they take a few seconds each.
# Nothing here takes so long; on a machine that does other work, a candidate must not be left out for want of time.
QUICK = {"jit_compile": False, "steps_per_execution": 1, "budget": 120}


def batch(rows=8, inputs=4, outputs=2):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, inputs)), rng.standard_normal((rows, outputs))


def small_model(*layers):
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    model.compile("adam", "mse", metrics=["mae"])
    return model


def everything_of(model):
    values = [variable.numpy() for variable in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
    values += [variable.numpy() for variable in keras_models.seed_states(model)]
    settings = model.jit_compile, model.steps_per_execution, model.train_function, model.optimizer
    everywhere = keras.config.dtype_policy().name, runtime.remapper_enabled(), random.getstate()
    return values, settings, everywhere, np.random.get_state()[1].tolist()


def test_a_model_is_tuned_and_left_as_it_was_bit_by_bit():
    model = small_model(keras.layers.Dense(16, "gelu"), keras.layers.Dropout(0.5), keras.layers.LayerNormalization())
    model.fit(*batch(), verbose=0)
    before = everything_of(model)
    tuning = keras_mp.tune(model, batch(), **QUICK)
    after = everything_of(model)
    assert len(before[0]) == len(after[0]) > 20
    for value, other in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(value, other)
    assert before[1:] == after[1:]

    assert [each.policy for each in tuning.candidates[:1]] == ["float32"]
    assert {each.policy for each in tuning.candidates} == {"float32", "mixed_bfloat16", "mixed_float16"}
    for each in tuning.candidates:
        assert each.agrees
        assert each.step_ms > 0
        assert each.ratio > 0
        assert each.current == (each.policy == "float32") == (not each.converted)
        assert (each.error == 0) == (each.policy == "float32")
    assert tuning.candidates[0].ratio == 1
    chosen = recommend(tuning.candidates)
    assert (tuning.policy, tuning.jit_compile, tuning.steps_per_execution) == (chosen.policy, False, 1)
    told = " ".join(tuning.findings)
    assert "in bfloat16 (" in told
    assert "By estimate" in told
    assert "2 of 2 matmuls" in told
    assert tuning.reason in str(tuning).replace("\n", " ").replace("  ", " ")


def test_a_stock_model_in_16_bits_is_compared_with_its_conversion():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small_model(keras.layers.LayerNormalization())
    tuning = keras_mp.tune(model, batch(), policies=["mixed_bfloat16"], **QUICK)
    assert [(each.policy, each.current, each.converted) for each in tuning.candidates] == [
        ("float32", False, True),
        ("mixed_bfloat16", True, False),
        ("mixed_bfloat16", False, True),
    ]
    assert keras.config.dtype_policy().name == "mixed_bfloat16"


@keras.saving.register_keras_serializable("test_tune")
class Cancelling(keras.layers.Layer):
    """Loses in 16 bits what it is given."""

    def call(self, x):
        return (x + 4096) - 4096


@keras.saving.register_keras_serializable("test_tune")
class InPython(keras.layers.Layer):
    """Runs Python in the graph, which XLA cannot."""

    def call(self, x):
        return tf.ensure_shape(tf.numpy_function(lambda value: value, [x], x.dtype, stateful=False), x.shape)


def test_what_disagrees_with_float32_is_not_recommended():
    tuning = keras_mp.tune(
        small_model(keras.layers.Dense(4), Cancelling()), batch(), policies="mixed_bfloat16", **QUICK
    )
    float32, bfloat16 = tuning.candidates
    assert (float32.agrees, bfloat16.agrees) == (True, False)
    assert bfloat16.error > 0.05
    assert tuning.policy == "float32"
    assert "outputs disagree" in str(tuning)


def test_what_16_bits_make_of_a_level_is_compared_with_what_varies():
    """Targets of 1000 +- 1, as from years or prices: in bfloat16 their steps are 4."""
    model = small_model(Raised())
    tuning = keras_mp.tune(model, batch(64), policies="mixed_bfloat16", **QUICK)
    float32, bfloat16 = tuning.candidates
    assert (float32.agrees, bfloat16.agrees) == (True, False)
    assert bfloat16.error > 0.5


@keras.saving.register_keras_serializable("test_tune")
class Raised(keras.layers.Layer):
    """Adds a level that 16 bits have few steps at."""

    def call(self, x):
        return x + 1000


@keras.saving.register_keras_serializable("test_tune")
class Sampling(keras.layers.Layer):
    """Draws from what it is told the mean and the variance of, at inference too."""

    def __init__(self, how="keras", **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.generator = keras.random.SeedGenerator(1)

    def get_config(self):
        return {**super().get_config(), "how": self.how}

    def call(self, z):
        mean, log_variance = keras.ops.split(z, 2, -1)
        shape = keras.ops.shape(mean)
        if self.how == "tf":
            drawn = tf.random.normal(shape, dtype=mean.dtype)
        elif self.how == "float32":  # which 16 bits cannot be multiplied with
            drawn = tf.random.normal(shape)
            return tf.add(mean, tf.exp(0.5 * log_variance) * drawn)
        else:
            seed = self.generator if self.how == "generator" else None
            drawn = keras.random.normal(shape, dtype=mean.dtype, seed=seed)
        return mean + keras.ops.exp(0.5 * log_variance) * drawn


@pytest.mark.parametrize(
    "how", ["keras", "float32", *(pytest.param(how, marks=pytest.mark.slow) for how in ("generator", "tf"))]
)
def test_a_model_that_samples_is_tuned_and_said_to_sample(how):
    inputs = keras.Input((16,))
    outputs = keras.layers.Dense(16, "sigmoid")(Sampling(how)(keras.layers.Dense(8)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "binary_crossentropy")
    x = (np.random.default_rng(0).random((32, 16)) > 0.5).astype("float32")
    tuning = keras_mp.tune(model, (x, x), policies=["float32", "mixed_bfloat16"], **QUICK)
    assert [each.agrees for each in tuning.candidates if not each.why.startswith("failed")] in ([True], [True] * 2)
    (said,) = [each for each in tuning.findings if "samples" in each]
    assert "two float32 runs" in said


@pytest.mark.parametrize("what", ["wrong", "nan"])
def test_a_candidate_that_draws_wrong_numbers_is_ruled_out(what):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(Failing16(what)(Sampling()(keras.layers.Dense(4)(inputs)))))
    model.compile("sgd", "mse")
    tuning = keras_mp.tune(model, batch(32), policies="mixed_bfloat16", **QUICK)
    assert [each.agrees for each in tuning.candidates] == [True, False]


def test_a_model_that_samples_what_is_not_a_number_is_said_to():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Lambda(keras.ops.log)(Sampling()(keras.layers.Dense(4)(inputs))))
    model.compile("sgd", "mse")
    with pytest.raises(ArgumentError, match="outputs are not finite"):
        keras_mp.tune(model, batch(32), **QUICK)


@keras.saving.register_keras_serializable("test_tune")
class Failing16(keras.layers.Layer):
    """Right in float32 alone."""

    def __init__(self, what, **kwargs):
        super().__init__(**kwargs)
        self.what = what

    def get_config(self):
        return {**super().get_config(), "what": self.what}

    def call(self, x):
        if keras.backend.standardize_dtype(x.dtype) == "float32":
            return x
        return x * float("nan") if self.what == "nan" else x + 30


def test_a_candidate_that_fails_is_reported_with_the_reason():
    model = keras.Sequential([keras.Input((4,)), InPython(), keras.layers.Dense(2)])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    tuning = keras_mp.tune(model, batch(), policies="float32", steps_per_execution=1, budget=30)
    plain, compiled = tuning.candidates
    assert (plain.jit_compile, plain.why) == (False, "")
    assert compiled.jit_compile
    assert compiled.step_ms is None
    assert compiled.why.startswith("failed: ")
    assert "PyFunc" in compiled.why or "XLA" in compiled.why
    assert tuning.jit_compile is False


NOTES = set()


@keras.saving.register_keras_serializable("test_tune")
class Noting(keras.layers.Layer):
    """Notes, when a step is traced, what it computes in and whether grappler may fuse."""

    def call(self, x, training=False):
        if training and execution.recording():
            NOTES.add((self.compute_dtype, runtime.remapper_enabled()))
        return x


def test_float16_on_a_cpu_does_without_the_fusion_that_others_are_timed_with():
    runtime.set_remapper(True)
    NOTES.clear()
    policies = ["mixed_float16", "mixed_bfloat16"]
    keras_mp.tune(small_model(keras.layers.Dense(4), Noting()), batch(), policies=policies, **QUICK)
    on_cpu = not keras_mp.detect().accelerators
    assert {("float32", True), ("bfloat16", True), ("float16", not on_cpu)} <= NOTES
    assert ("bfloat16", False) not in NOTES
    assert ("float32", False) not in NOTES
    assert runtime.remapper_enabled()


def test_a_slow_dataset_is_found_to_be_the_bottleneck():
    def slowly(x, y):
        def wait(value):
            time.sleep(0.05)
            return value

        return tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype), x.shape), y

    x, y = batch(rows=24)
    dataset = tf.data.Dataset.from_tensor_slices((x.astype("float32"), y.astype("float32"))).batch(8).map(slowly)
    model = keras.Sequential([keras.layers.Dense(3, "relu"), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    tuning = keras_mp.tune(model, dataset, policies="float32", **QUICK)
    assert "The input pipeline is the bottleneck" in tuning.findings[0]
    assert "num_parallel_calls=tf.data.AUTOTUNE" in tuning.findings[0]
    assert not model.built


def test_dictionaries_and_weights_go_in_as_fit_takes_them():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((3,), name="b")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    outputs = {"c": keras.layers.Dense(2, name="c")(joined), "d": keras.layers.Dense(1, name="d")(joined)}
    model = keras.Model(inputs, outputs)
    model.compile("adam", {"c": "mse", "d": "mae"})
    x = {"a": np.ones((8, 4)), "b": np.ones((8, 3))}
    y = {"c": np.ones((8, 2)), "d": np.ones((8, 1))}
    weights = {"c": np.ones(8), "d": np.ones(8)}
    model.fit(x, y, sample_weight=weights, verbose=0)
    tuning = keras_mp.tune(model, (x, y, weights), policies="mixed_float16", **QUICK)
    assert [each.policy for each in tuning.candidates] == ["float32", "mixed_float16"]
    assert all(each.agrees and each.step_ms for each in tuning.candidates)


def test_within_no_time_the_answer_is_a_partial_one():
    tuning = keras_mp.tune(small_model(), batch(), budget=0.001)
    assert (tuning.policy, tuning.jit_compile, tuning.steps_per_execution) == ("float32", False, 1)
    assert tuning.candidates[0].step_ms > 0
    assert all(each.why.startswith("not timed") for each in tuning.candidates[1:])
    (told,) = [each for each in tuning.findings if each.startswith("Not timed within 0.001 seconds")]
    assert "mixed_bfloat16 with jit_compile=True" in told


def compiled(**settings):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse", **settings)
    return model


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (
            lambda: (keras.Sequential([keras.layers.Dense(2)]), batch()),
            {},
            ArgumentError,
            'model.compile("adam", loss)',
        ),
        (lambda: (compiled(run_eagerly=True), batch()), {}, ArgumentError, "run_eagerly=False"),
        (lambda: ("model.keras", batch()), {}, ArgumentError, "keras_mp.load_model(path)"),
        (lambda: (compiled(), batch()[0]), {}, ArgumentError, "float64(8, 4). For a model that takes x alone"),
        (lambda: (compiled(), batch() * 2), {}, ArgumentError, "(x, y) or (x, y, sample_weight)"),
        (lambda: (compiled(), (batch()[0], batch(rows=6)[1])), {}, ArgumentError, "(8, 4), (6, 2)"),
        (lambda: (compiled(), batch(inputs=5)), {}, ArgumentError, "cannot be trained on this batch"),
        (lambda: (compiled(), batch(rows=0)), {}, ArgumentError, "has no rows"),
        (lambda: (compiled(), (batch()[0], np.array(["a"] * 8))), {}, ArgumentError, "such as ['a']"),
        (lambda: (compiled(), [each.tolist() for each in batch()]), {}, ArgumentError, "np.array(x)"),
        (lambda: (compiled(), batch(rows=32)[0].tolist()), {}, ArgumentError, "dataset[0] or next(generator)"),
        (lambda: (compiled(), (batch()[0] * np.nan, batch()[1])), {}, ArgumentError, "outputs are not finite"),
        (lambda: (compiled(), (batch()[0], batch()[1] * np.nan)), {}, ArgumentError, "loss is not finite"),
        (lambda: (compiled(), tf.data.Dataset.from_tensor_slices(batch()).take(0)), {}, ArgumentError, "has no batch"),
        (lambda: (compiled(), batch()), {"policies": "mixed_flot16"}, PolicyError, 'Did you mean "mixed_float16"?'),
        (lambda: (compiled(), batch()), {"policies": []}, ArgumentError, "at least one"),
        (lambda: (compiled(), batch()), {"jit_compile": "auto"}, ArgumentError, "(True, False)"),
        (lambda: (compiled(), batch()), {"steps_per_execution": 0}, ArgumentError, "from 1 on"),
        (lambda: (compiled(), batch()), {"budget": 0}, ArgumentError, "budget=60"),
        (lambda: (compiled(), batch()), {"budget": "a"}, ArgumentError, "budget=60"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_words(arguments, options, error, words):
    policy = keras.config.dtype_policy()
    with pytest.raises(error) as raised:
        keras_mp.tune(*arguments(), **options)
    assert words in str(raised.value)
    assert keras.config.dtype_policy() == policy


@pytest.mark.parametrize("optimizer", ["sgd", "ours"])
def test_steps_that_diverge_on_the_one_batch_leave_the_others_timed(optimizer):
    """What `fit` never meets, for it never takes hundreds of steps on one batch."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64), keras.layers.Dense(2)])
    sgd = keras.optimizers.SGD(1.0)
    model.compile(sgd if optimizer == "sgd" else keras_mp.LossScaleOptimizer(sgd), "mse")
    x, y = batch()
    tuning = keras_mp.tune(model, (3 * x, 3 * y), **QUICK)
    assert tuning.candidates[0].step_ms is not None
    # What multiplies faster here is tried first.
    assert sorted(each.policy for each in tuning.candidates) == ["float32", "mixed_bfloat16", "mixed_float16"]


def test_a_candidate_that_overflows_is_ruled_out_and_the_others_are_timed():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(1e-12), "mse")
    x, y = batch()
    tuning = keras_mp.tune(model, (1e6 * x, y), **QUICK)
    by_policy = {each.policy: each for each in tuning.candidates}
    assert by_policy["mixed_float16"].agrees is False
    assert by_policy["float32"].agrees
    assert by_policy["mixed_bfloat16"].step_ms is not None


def test_heads_of_attention_are_one_size_with_their_width():
    inputs = keras.Input((8, 16))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(4, 8)(inputs, inputs))
    model.compile("sgd", "mse")
    x = np.ones((8, 8, 16), "float32")
    tuning = keras_mp.tune(model, (x, x), policies="float32", **QUICK)
    assert not any("multiples of 8" in each for each in tuning.findings)


def test_a_model_with_replicas_is_refused(mirrored):
    with mirrored(2).scope():
        model = compiled()
    with pytest.raises(DistributionError, match="outside strategy.scope"):
        keras_mp.tune(model, batch())


def test_a_dataset_that_fails_after_its_first_batch_is_told():
    def batches():
        yield np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
        raise ValueError("the second batch is not there")

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    signature = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 2)))
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    tuning = keras_mp.tune(model, dataset, policies="float32", jit_compile=False, steps_per_execution=1, budget=30)
    assert tuning.policy == "float32"
    (told,) = [finding for finding in tuning.findings if "failed after its first batch" in finding]
    assert "the second batch is not there" in told


def test_what_cannot_be_trained_is_told_whole():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ArgumentError, match=r"label value of 7 which is outside the valid range of \[0, 2\)"):
        keras_mp.tune(model, (np.ones((8, 4)), np.full(8, 7)), policies="float32", budget=10)


def test_a_metric_that_cannot_be_copied_is_named():
    class Needy(keras.metrics.Mean):
        def __init__(self, what):
            super().__init__()

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse", metrics=[Needy(1)])
    with pytest.raises(ConversionError, match="of class Needy cannot be made again"):
        keras_mp.tune(model, (np.ones((8, 4)), np.ones((8, 2))), policies="float32", budget=10)


def test_a_dropped_candidate_is_not_tried_again_with_several_steps(monkeypatch):
    search = object.__new__(_Search)
    search.steps, search.running = None, {0: types.SimpleNamespace(copy="copy")}
    search.candidates = [
        Candidate("float32", False, step_ms=1.0, ratio=1.0, agrees=True),
        Candidate("mixed_bfloat16", False, step_ms=0.5, ratio=2.0, agrees=True, why="dropped"),
    ]
    tried = []
    monkeypatch.setattr(_Search, "_try", lambda self, policy, *others: tried.append(policy))
    search._try_several_steps()
    assert tried == ["float32"]
