"""Policies by pattern: which layer gets which, that a map comes back equal, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import keras_mp
from keras_mp.errors import PolicyError

LOGITS_IN_FLOAT32 = {r".*/logits": "float32"}


@pytest.mark.parametrize(
    ("patterns", "path", "expected"),
    [
        ({}, "model/dense", "mixed_float16"),
        (LOGITS_IN_FLOAT32, "model/logits", "float32"),
        # Keras gives the layers of a Functional model their own names alone.
        (LOGITS_IN_FLOAT32, "logits", "float32"),
        (LOGITS_IN_FLOAT32, "model/logits_2", "mixed_float16"),
        ({"logits": "float32"}, "model/head/logits", "float32"),
        ({"head/logits": "float32"}, "model/head/logits", "float32"),
        ({"head/logits": "float32"}, "model/overhead/logits", "mixed_float16"),
        ({"/model/.*": "float32"}, "model/logits", "float32"),
        ({"/encoder/.*": "float32"}, "model/encoder/logits", "mixed_float16"),
        # What is said of a layer holds for those inside it, unless one of them is named itself.
        ({"attention": "float32"}, "model/attention/query", "float32"),
        ({"attention": "float32", "query": "mixed_bfloat16"}, "model/attention/query", "mixed_bfloat16"),
        ({"attention": "float32", "query": "mixed_bfloat16"}, "model/attention/key", "float32"),
        ({"encoder": "float32", r"block_\d": "mixed_bfloat16"}, "model/encoder/block_3/key", "mixed_bfloat16"),
        # Patterns that agree are no ambiguity, and the path itself comes before patterns.
        ({"log.*": "float32", ".*its": "float32"}, "model/logits", "float32"),
        ({"model/logits": "float32", "log.*": "mixed_bfloat16"}, "model/logits", "float32"),
    ],
)
def test_the_nearest_match_decides(patterns, path, expected):
    assert keras_mp.PolicyMap("mixed_float16", patterns)[path].name == expected


def test_patterns_that_disagree_are_refused_with_the_way_out():
    policies = keras_mp.PolicyMap("mixed_float16", {"log.*": "float32", ".*its": "mixed_bfloat16"})
    with pytest.raises(PolicyError) as caught:
        policies["model/logits"]
    assert str(caught.value) == (
        "Patterns with different policies match the path 'model/logits': 'log.*': 'float32', '.*its': "
        "'mixed_bfloat16'. Make them exclude each other, or add 'model/logits' itself, which comes before all patterns."
    )


NAMES = st.sampled_from(["float32", "mixed_float16", "mixed_bfloat16", "float64"])


@given(default=NAMES, patterns=st.dictionaries(st.from_regex(r"[a-z]{1,6}(/\.\*)?", fullmatch=True), NAMES, max_size=5))
def test_a_map_comes_back_equal(default, patterns):
    policies = keras_mp.PolicyMap(default, patterns)
    config = keras.dtype_policies.serialize(policies)
    assert keras.dtype_policies.deserialize(config) == policies
    assert keras_mp.PolicyMap.from_config(policies.get_config()) == policies
    assert (policies == keras_mp.PolicyMap(default, {**patterns, "another": "float32"})) is False


def test_it_changes_neither_the_policies_nor_the_dictionary_it_was_given():
    policy, patterns = keras.DTypePolicy("mixed_bfloat16"), {"a": "float32"}
    policies = keras_mp.PolicyMap(None, patterns)
    policies["b"] = policy
    policies.get_config()
    assert policy.name == "mixed_bfloat16"
    assert patterns == {"a": "float32"}


@pytest.mark.stock_defect
def test_the_stock_map_changes_the_policies_it_was_given():
    policy = keras.DTypePolicy("mixed_bfloat16")
    keras.dtype_policies.DTypePolicyMap(None, {"b": policy}).get_config()
    assert policy.name == "mixed_bfloat16"


def test_the_default_is_the_global_policy_of_the_time():
    with keras_mp.policy_scope("mixed_bfloat16"):
        policies = keras_mp.PolicyMap()
    assert policies["any/path"].name == "mixed_bfloat16"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras_mp.PolicyMap("float32", [("a", "float32")]), "must be a dictionary from patterns to policies"),
        (lambda: keras_mp.PolicyMap("float32", {"*/logits": "float32"}), "'*/logits' is no regular expression"),
        (lambda: keras_mp.PolicyMap("float32", {3: "float32"}), "A pattern is a string"),
        (lambda: keras_mp.PolicyMap("float32", {"a": "float31"}), "Unknown dtype policy 'float31'"),
        (lambda: keras_mp.PolicyMap("mixed_float31"), "Unknown dtype policy 'mixed_float31'"),
        (lambda: keras_mp.PolicyMap("float32", {"a": 16}), "Expected the name of a dtype policy"),
        (lambda: keras_mp.PolicyMap(keras_mp.PolicyMap()), "cannot be a map itself"),
        (lambda: keras_mp.PolicyMap("float32", {"a": keras_mp.PolicyMap()}), "The policy for 'a' is a map itself"),
        (lambda: keras_mp.PolicyMap("float32", {"a": "float32"}).__setitem__("a", "float64"), "has a policy for 'a'"),
    ],
)
def test_what_is_no_map_is_refused(make, message):
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)


def test_patterns_that_match_nothing_are_told_with_what_comes_close():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2, name="logits")], name="net"
    )
    policies = keras_mp.PolicyMap("mixed_float16", {"logits": "float32", "lgits": "float32", "xyz": "float32"})
    assert policies.unmatched(model) == {"lgits": ["net/logits"], "xyz": []}


def test_layers_made_under_a_map_compute_as_it_says():
    keras_mp.set_policy(keras_mp.PolicyMap("mixed_bfloat16", LOGITS_IN_FLOAT32))
    layers = [keras.Input((4,)), keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2, name="logits")]
    model = keras.Sequential(layers)
    assert [layer.compute_dtype for layer in model.layers] == ["bfloat16", "float32"]
    assert model(tf.ones((1, 4))).dtype == "float32"
    assert {weight.dtype for weight in model.weights} == {"float32"}


@pytest.mark.parametrize("make", [lambda layers: keras.Sequential(layers, name="net"), "functional"])
def test_a_model_under_a_map_comes_back_from_a_file(tmp_path, make):
    policies = keras_mp.PolicyMap("mixed_bfloat16", LOGITS_IN_FLOAT32)
    with keras_mp.policy_scope(policies):
        inputs = keras.Input((4,))
        hidden, logits = keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2, name="logits")
        model = keras.Model(inputs, logits(hidden(inputs))) if make == "functional" else make([inputs, hidden, logits])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [layer.compute_dtype for layer in loaded.layers[-2:]] == ["bfloat16", "float32"]
    assert loaded.layers[-1].dtype_policy == policies
    x = np.random.normal(size=(3, 4)).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))
