"""Embeddings: Keras's numbers, gradients of rows alone, and tables that no step reads as a whole."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
INPUTS = {
    "a matrix": np.array([[1, 2, 2], [0, 6, 1]], "int32"),
    "negative": np.array([[-1, 2], [-7, 6]], "int64"),
    "small whole numbers": np.array([3, 4], "uint8"),
    "floats": np.array([[3.0, 4.0]], "float32"),
    "a scalar": np.array(5, "int32"),
    "none": np.zeros((0, 3), "int32"),
}
SETTINGS = {
    "plain": {},
    "mask": {"mask_zero": True},
    "regularizer": {"embeddings_regularizer": "l2"},
    "LoRA": {"lora_rank": 2},
}


def pair(**settings):
    ours, stock = layers.Embedding(7, 4, **settings), keras.layers.Embedding(7, 4, **settings)
    for layer in (ours, stock):
        layer.build()
    stock.set_weights(ours.get_weights())
    return ours, stock


@pytest.mark.parametrize("run_by", [lambda run: run, tf.function, tf.function(jit_compile=True)])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_numbers_and_gradients_are_keras(settings, policy, run_by):
    keras.config.set_dtype_policy(policy)

    def step(layer, name):
        with tf.GradientTape() as tape:
            y = layer(tf.constant(INPUTS[name]))
            loss = tf.add_n([tf.reduce_sum(tf.cast(y, "float32") ** 2), *layer.losses])
        return y, [tf.convert_to_tensor(g) for g in tape.gradient(loss, layer.trainable_variables)]

    # All inputs in one function, which is compiled once.
    results = [
        run_by(lambda layer=layer: [step(layer, name) for name in INPUTS])() for layer in pair(**SETTINGS[settings])
    ]
    for ours, stock in zip(*map(tf.nest.flatten, results), strict=True):
        assert ours.dtype == stock.dtype
        np.testing.assert_allclose(tf.cast(ours, "float32"), tf.cast(stock, "float32"), rtol=1e-6)


def test_a_quantized_layer_is_keras():
    ours, stock = pair()
    for layer in (ours, stock):
        layer.quantize("int8", type_check=False)
    np.testing.assert_array_equal(ours(INPUTS["negative"]), stock(INPUTS["negative"]))


def test_ragged_numbers_are_keras():
    ours, stock = pair()
    rows = tf.ragged.constant([[1, 2], [3]])
    np.testing.assert_array_equal(ours(rows).to_tensor(), stock(rows).to_tensor())


def test_masks_and_files(tmp_path):
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(7, 4, mask_zero=True, name="words")])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is layers.Embedding
    np.testing.assert_array_equal(loaded(INPUTS["a matrix"]), model(INPUTS["a matrix"]))
    np.testing.assert_array_equal(loaded.layers[0].compute_mask(INPUTS["a matrix"]), INPUTS["a matrix"] != 0)


def recommender(make=layers.Embedding, model=keras_mp.Model, **settings):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,), dtype="int32")
    table = make(50, 4, name="table", **settings)
    rows = keras.layers.Flatten()(table(inputs))
    made = model(inputs, keras.layers.Dense(1)(rows))
    return made, table


def train(made, optimizer, jit_compile=False, steps=3, copies=1):
    made.compile(optimizer, "mse", jit_compile=jit_compile)
    x, y = np.arange(24).reshape(-1, 2) % 50, np.arange(12.0)[:, None]
    x, y = np.tile(x, (copies, 1)), np.tile(y, (copies, 1))
    for _ in range(steps):
        made.train_on_batch(x, y)
    return made.get_weights()


@pytest.mark.parametrize(
    ("optimizer", "policy"),
    [
        (keras.optimizers.SGD, "float32"),
        (keras.optimizers.Adagrad, "mixed_bfloat16"),
        (keras.optimizers.Adam, "mixed_bfloat16"),
        pytest.param(keras.optimizers.SGD, "mixed_bfloat16", marks=pytest.mark.slow),
        pytest.param(keras.optimizers.Adagrad, "float32", marks=pytest.mark.slow),
        pytest.param(keras.optimizers.Adam, "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", ["plain", "regularizer", "XLA", "strategy"])
def test_training_is_that_of_keras(case, optimizer, policy, mirrored):
    keras.config.set_dtype_policy(policy)
    settings = {"embeddings_regularizer": "l2"} if case == "regularizer" else {}
    # `train_on_batch` gives each replica all rows, and so each id as often as there are replicas.
    copies = 2 if case == "strategy" else 1
    stock = train(recommender(keras.layers.Embedding, keras.Model, **settings)[0], optimizer(0.1), copies=copies)
    with mirrored(2).scope() if case == "strategy" else tf.device(None):
        ours = train(recommender(**settings)[0], keras_mp.LossScaleOptimizer(optimizer(0.1)), jit_compile=case == "XLA")
    for one, other in zip(ours, stock, strict=True):
        # Between replicas and under XLA the sums are taken in another order.
        np.testing.assert_allclose(one, other, rtol=1e-4 if policy == "float32" else 3e-2, atol=1e-5)


def ops_that_read(made, table, x, y):
    """The ops of a training step, in all its functions, that read rows or a whole of the table's shape."""
    step = tf.function(lambda x, y: made.train_step((x, y)), autograph=False).get_concrete_function(x, y)
    definition = step.graph.as_graph_def(add_shapes=True)
    shapes = tuple(table.embeddings.shape)
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    read = []
    for node in nodes:
        if node.op == "ReadVariableOp" and "_output_shapes" in node.attr:
            sizes = [tuple(d.size for d in shape.dim) for shape in node.attr["_output_shapes"].list.shape]
            read += ["ReadVariableOp"] * (shapes in sizes)
        read += [node.op] * (node.op == "ResourceGather")
    return read


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
def test_no_step_reads_a_table_as_a_whole(ours):
    """In the place of each reading TensorFlow copies a table whose rows are written in place."""
    made, table = recommender() if ours else recommender(keras.layers.Embedding, keras.Model)
    optimizer = keras.optimizers.Adagrad(0.1)
    made.compile(keras_mp.LossScaleOptimizer(optimizer) if ours else optimizer, "mse", jit_compile=False)
    made.optimizer.build(made.trainable_variables)
    read = ops_that_read(made, table, tf.zeros((4, 2), "int32"), tf.zeros((4, 1)))
    assert ("ReadVariableOp" in read) is not ours
    assert ("ResourceGather" in read) is ours


def test_a_number_out_of_range_is_an_error():
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not in"):
        pair()[0](np.array([7]))


def test_convert_puts_it_in_and_takes_it_out():
    made, _ = recommender(keras.layers.Embedding, keras.Model)
    converted = keras_mp.convert(made, "mixed_bfloat16")
    assert type(converted.get_layer("table")) is layers.Embedding
    assert type(keras_mp.convert(converted, "float32").get_layer("table")) is keras.layers.Embedding
