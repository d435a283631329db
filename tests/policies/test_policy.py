import contextlib
import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp._compat import runtime
from keras_mp.errors import KerasMPWarning, PolicyError
from tests.helpers.derivatives import executed_products

cpu_only = pytest.mark.skipif(bool(keras_mp.detect().accelerators), reason="concerns machines without GPU and TPU")


def quietly(policy):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KerasMPWarning)
        return keras_mp.set_policy(policy)


def float16_map():
    return keras.dtype_policies.DTypePolicyMap(
        keras.DTypePolicy("float32"), {"encoder/.*": keras.DTypePolicy("mixed_float16")}
    )


# Setting


@pytest.mark.parametrize(
    ("name", "compute", "variable"),
    [
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("mixed_float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("int8_from_mixed_bfloat16", "bfloat16", "float32"),
    ],
)
def test_set_policy_by_name(name, compute, variable):
    policy = quietly(name)
    layer = keras.layers.Dense(1)
    assert policy is keras.config.dtype_policy()
    assert (layer.dtype_policy.name, layer.compute_dtype, layer.variable_dtype) == (name, compute, variable)


@pytest.mark.parametrize("make", [lambda: keras.DTypePolicy("mixed_bfloat16"), float16_map], ids=["policy", "map"])
def test_set_policy_by_object(make):
    policy = make()
    assert quietly(policy) is policy
    assert keras.config.dtype_policy() is policy


def test_auto_is_what_the_hardware_is_best_at_and_warns_of_nothing():
    keras.config.set_dtype_policy("float64")
    assert keras_mp.set_policy("auto").name == keras_mp.detect().recommended_policy


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("mixed_fp16", "mixed_float16"),
        ("fp16", "mixed_float16"),
        ("half", "mixed_float16"),
        ("16-mixed", "mixed_float16"),
        ("MIXED_FLOAT16", "mixed_float16"),
        ("flaot16", "mixed_float16"),
        ("mixed_float", "mixed_float16"),
        ("bf16", "mixed_bfloat16"),
        ("mixed_bf16", "mixed_bfloat16"),
        ("bflaot16", "mixed_bfloat16"),
        ("float23", "float32"),
        ("fp32", "float32"),
        ("double", "float64"),
        ("Auto", "auto"),
    ],
)
def test_a_misspelt_name_is_answered_with_what_was_meant(given, meant):
    with pytest.raises(PolicyError) as caught:
        keras_mp.set_policy(given)
    assert str(caught.value) == (
        f'Unknown dtype policy {given!r}. Did you mean "{meant}"? Expected one of auto, float32, mixed_bfloat16, '
        'mixed_float16, bfloat16, float16, float64, for example keras_mp.set_policy("auto").'
    )


@pytest.mark.parametrize("given", ["", "int32", "uint16", "bool", "complex64", "int8", "zzz"])
def test_no_guess_is_made_where_nothing_is_close(given):
    with pytest.raises(PolicyError) as caught:
        keras_mp.set_policy(given)
    assert str(caught.value).startswith(f"Unknown dtype policy {given!r}. Expected one of auto, float32, ")


@pytest.mark.parametrize(
    "given",
    [
        keras.DTypePolicy("int32"),
        keras.dtype_policies.DTypePolicyMap(keras.DTypePolicy("float32"), {"a": keras.DTypePolicy("int32")}),
    ],
    ids=["policy", "map"],
)
def test_a_policy_object_must_be_floating_point(given):
    with pytest.raises(PolicyError, match="Unknown dtype policy 'int32'"):
        keras_mp.set_policy(given)


@pytest.mark.parametrize(
    ("given", "type_name"), [(None, "NoneType"), (16, "int"), (tf.float16, "DType"), (tf.zeros(2).numpy(), "ndarray")]
)
def test_what_is_no_policy_is_refused_with_its_type(given, type_name):
    with pytest.raises(PolicyError) as caught:
        keras_mp.set_policy(given)
    assert str(caught.value).startswith("Expected the name of a dtype policy or a keras.DTypePolicy, received ")
    assert f"of type {type_name}. Expected one of auto, float32," in str(caught.value)


def test_an_error_leaves_everything_as_it_was():
    keras_mp.set_policy("float64")
    for given in ("mixed_fp16", None):
        with pytest.raises(PolicyError):
            keras_mp.set_policy(given)
        with pytest.raises(ValueError, match="policy"), keras_mp.policy_scope(given):
            pass
    assert keras.config.dtype_policy().name == "float64"
    assert runtime.remapper_enabled()


# Scope


def test_scope_yields_and_restores():
    outside = keras_mp.set_policy("float32")
    with keras_mp.policy_scope("float64") as outer:
        assert keras.config.dtype_policy() is outer
        with keras_mp.policy_scope(keras.DTypePolicy("float32")):
            inner_layer = keras.layers.Dense(1)
        outer_layer = keras.layers.Dense(1)
    assert keras.config.dtype_policy() is outside
    assert (inner_layer.compute_dtype, outer_layer.compute_dtype) == ("float32", "float64")


def test_scope_restores_after_an_exception():
    keras_mp.set_policy("float32")
    with pytest.raises(KeyError), keras_mp.policy_scope("float64"):
        raise KeyError
    assert keras.config.dtype_policy().name == "float32"


def test_scope_restores_what_was_set_inside_it():
    keras_mp.set_policy("float32")
    with keras_mp.policy_scope("float64"):
        keras.config.set_dtype_policy("bfloat16")
    assert keras.config.dtype_policy().name == "float32"


def lines_of_warnings(function):
    """The lines, counted from the head of the function, at which it makes keras_mp warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    assert [each.category for each in caught] == [KerasMPWarning] * len(caught)
    assert {each.filename for each in caught} == {__file__}
    return [each.lineno - inspect.getsourcelines(function)[1] for each in caught]


def test_the_warning_points_at_the_users_line():
    def use():
        keras_mp.set_policy("bfloat16")
        with keras_mp.policy_scope("bfloat16"):
            pass
        decorated = keras_mp.policy_scope("bfloat16")(lambda: None)
        decorated()

    assert lines_of_warnings(use) == [1, 2, 5]


# The float16 cliff


@cpu_only
@pytest.mark.parametrize("given", ["mixed_float16", "float16", float16_map], ids=["mixed", "pure", "map"])
def test_float16_on_a_cpu_switches_the_fusion_off_for_good(given):
    assert runtime.remapper_enabled()
    quietly(given if isinstance(given, str) else given())
    assert not runtime.remapper_enabled()
    keras_mp.set_policy("float32")
    assert not runtime.remapper_enabled()


@cpu_only
def test_a_scope_leaves_the_fusion_off_for_the_model_made_in_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KerasMPWarning)
        with keras_mp.policy_scope("mixed_float16"):
            pass
    assert not runtime.remapper_enabled()


@pytest.mark.parametrize("given", ["float32", "mixed_bfloat16", "auto"])
def test_the_fusion_stays_on_for_other_dtypes(given):
    quietly(given)
    assert runtime.remapper_enabled()


@cpu_only
def test_the_fusion_is_gone_from_functions_traced_before(tmp_path):
    weights, bias, inputs = tf.ones((64, 64)), tf.zeros(64), tf.ones((16, 64))

    @tf.function
    def dense(inputs):
        return tf.nn.relu(tf.nn.bias_add(tf.matmul(inputs, weights), bias))

    before = executed_products(dense, inputs, tmp_path / "before")
    quietly("mixed_float16")
    after = executed_products(dense, inputs, tmp_path / "after")
    assert any("Fused" in op for op in before), before
    assert after, "no product seen"
    assert not any("Fused" in op for op in after), after


# Models


def dense(*dtypes, model_policy="float32"):
    layers = [keras.layers.Dense(2, dtype=dtype) for dtype in dtypes]
    model = keras.Sequential([keras.Input((2,)), *layers])
    model.dtype_policy = model_policy
    return model


class Nested(keras.Model):
    """Holds a float16 layer where no list of layers shows it."""

    def __init__(self):
        super().__init__()
        self.blocks = {"first": [keras.layers.TimeDistributed(keras.layers.Dense(2, dtype="mixed_float16"))]}


@pytest.mark.parametrize(
    ("make", "needed"),
    [
        (lambda: dense("float32", "float32"), False),
        (lambda: dense("mixed_bfloat16"), False),
        (lambda: dense("float32", "mixed_float16"), True),
        (lambda: dense("float16"), True),
        (lambda: dense("float32", model_policy="mixed_float16"), False),  # the model itself multiplies nothing
        (Nested, True),
        (lambda: keras.layers.Dense(2, dtype="mixed_float16"), True),
        (lambda: keras.layers.Bidirectional(keras.layers.LSTM(2, dtype="mixed_float16")), True),
        (lambda: keras.layers.Dense(2, dtype=float16_map()), False),
    ],
)
def test_needs_loss_scaling_asks_every_layer(make, needed):
    assert keras_mp.needs_loss_scaling(make()) is needed


def test_needs_loss_scaling_sees_what_a_map_gave_to_a_layer():
    keras_mp.set_policy(keras_mp.PolicyMap("float32", {".*hidden": "mixed_float16"}))
    layers = [keras.layers.Dense(2, name=name) for name in ("hidden", "other")]
    model = keras.Sequential([keras.Input((2,)), *layers])
    assert [layer.compute_dtype for layer in layers] == ["float16", "float32"]
    assert keras_mp.needs_loss_scaling(model)


def test_needs_loss_scaling_takes_layers_alone():
    with pytest.raises(TypeError, match="Expected a Keras model or layer, received 'model' of type str"):
        keras_mp.needs_loss_scaling("model")


def augmented(scope):
    """Images and labels from a pipeline under mixed_float16, whose layers are made in a scope."""
    keras_mp.set_policy("mixed_float16")
    with scope:
        layers = [keras.layers.Rescaling(1 / 255), keras.layers.MixUp(seed=0), keras.layers.CutMix(seed=0)]
    images = np.arange(4 * 8 * 8 * 3, dtype="float32").reshape(4, 8, 8, 3) % 256
    labels = np.eye(4, dtype="float32")
    data = tf.data.Dataset.from_tensor_slices({"images": images, "labels": labels}).batch(4)
    rescale, *mixes = layers
    data = data.map(lambda batch: {"images": rescale(batch["images"]), "labels": batch["labels"]})
    for mix in mixes:
        data = data.map(mix)
    return next(iter(data))


def test_preprocessing_stays_in_float32_in_its_scope():
    batch = augmented(keras_mp.preprocessing_scope())
    assert (batch["images"].dtype, batch["labels"].dtype) == (tf.float32, tf.float32)
    # 255 steps a unit: float16 keeps one in four apart near 1, float32 all.
    assert float(tf.reduce_max(batch["images"])) == 1.0
    assert keras.config.dtype_policy().name == "mixed_float16"


@pytest.mark.stock_defect
def test_stock_preprocessing_under_a_mixed_policy():
    try:
        batch = augmented(contextlib.nullcontext())
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        raise AssertionError(str(error)) from None
    assert batch["images"].dtype == tf.float32
