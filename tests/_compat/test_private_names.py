"""What rests on private names of TensorFlow and Keras: each test fails with the name when one of them moves."""

import json
import logging
import os
import pickle
import subprocess
import sys
import threading

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp._compat import (
    execution,
    graph_errors,
    keras_files,
    keras_hooks,
    keras_layers,
    keras_losses,
    keras_models,
    keras_optimizers,
    keras_variables,
    litert,
    runtime,
    tf_graphs,
    tf_replicas,
)
from tests.helpers.derivatives import with_two_derivatives


def raising(error):
    @tf.function
    def program(x):
        tf.cond(x > 0, lambda: graph_errors.raise_from_graph(lambda x: error(f"x is {x}"), [x]), tf.no_op)
        return x

    return program


def test_in_xla_context_tells_who_compiles():
    """Rests on `tensorflow.python.ops.control_flow_util.GraphOrParentsInXlaContext`."""
    seen = {}

    def look(name):
        seen[name] = execution.in_xla_context()

    look("eager")
    tf.function(lambda: look("graph"))()
    tf.function(lambda: look("xla"), jit_compile=True)()
    tf.function(lambda: tf.function(lambda: look("inside xla"))(), jit_compile=True)()
    tf.function(lambda: tf.function(lambda: look("xla inside"), jit_compile=True)())()
    assert seen == {"eager": False, "graph": False, "xla": True, "inside xla": True, "xla inside": True}


def test_the_optimization_barrier_changes_no_number():
    """Rests on `tensorflow.compiler.tf2xla.python.xla.optimization_barrier`."""
    triple = with_two_derivatives(lambda x: (3 * tf.square(execution.optimization_barrier(x)),), jit_compile=True)
    y, slope, curvature = triple(tf.constant([1.0, -2.0]))
    assert y.numpy().tolist() == [3.0, 12.0]
    assert slope.numpy().tolist() == [6.0, -12.0]
    assert curvature.numpy().tolist() == [6.0, 6.0]
    hlo = triple.experimental_get_compiler_ir(tf.zeros([2]))(stage="hlo")
    assert "opt-barrier" in hlo


def test_raise_from_graph_raises_the_very_type_with_its_text():
    """Rests on TensorFlow making a `tf.errors.UnknownError` by calling the class."""

    class ThisError(ValueError):
        pass

    program = raising(ThisError)
    assert int(program(tf.constant(0))) == 0
    for x in (1, 2):
        with pytest.raises(ThisError) as raised:
            program(tf.constant(x))
        assert str(raised.value) == f"x is {x}"
        assert isinstance(raised.value, tf.errors.UnknownError)
        assert raised.value.args == (f"x is {x}",)


def test_without_remat_leaves_the_scopes_mode_as_it_was():
    """Rests on `keras.Operation._remat_mode`."""
    with keras.RematScope(mode="full"):
        inputs = keras.Input((2,))
        model = keras.Model(inputs, keras.layers.Dense(2, name="d")(inputs) + 1)
    call = tf.function(lambda x: model(x, training=False))
    with keras_models.without_remat(model):
        call(tf.ones((1, 2)))
    assert model.get_layer("d")._remat_mode.mode == "full"
    with pytest.raises(ValueError, match="keywords"):  # the day Keras mends it there is no need of it
        tf.function(lambda x: model(x, training=False))(tf.ones((1, 2)))


def test_litert_files_are_read_and_written_as_objects():
    """Rests on `tensorflow.lite.python.schema_py_generated` and `tensorflow.lite.tools.flatbuffer_utils`."""
    schema = litert.lite_schema()
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT(), schema.BufferT()]
    model.buffers[1].data = np.arange(4, dtype=np.uint8)
    read = litert.lite_model(litert.lite_bytes(model))
    assert (read.version, bytes(read.buffers[1].data)) == (3, bytes(range(4)))
    assert (schema.TensorType.FLOAT16, schema.BuiltinOperator.DEQUANTIZE) == (1, 6)


def test_other_unknown_errors_are_what_they_were():
    error = tf.errors.UnknownError(None, None, "something")
    assert type(error) is tf.errors.UnknownError
    assert error.message == "something"

    def fails():
        raise RuntimeError("something else")

    with pytest.raises(tf.errors.UnknownError, match="something else") as raised:
        tf.function(lambda: tf.py_function(fails, [], tf.float32))()
    assert type(raised.value) is tf.errors.UnknownError


def test_raise_from_graph_raises_under_replicas_and_the_next_step_runs(mirrored):
    class ThisError(ValueError):
        pass

    strategy, program = mirrored(2), raising(ThisError)
    step = tf.function(lambda x: strategy.run(program, (x,)))
    for x in (1, 2):
        with pytest.raises(ThisError, match=f"^x is {x}$"):
            step(tf.constant(x))
    results = strategy.experimental_local_results(step(tf.constant(0)))
    assert {int(value) for value in results} == {0}


def test_an_unknown_error_survives_pickling():
    error = pickle.loads(pickle.dumps(tf.errors.UnknownError(None, None, "something")))
    assert type(error) is tf.errors.UnknownError
    assert error.message == "something"


def test_one_device_steps_out_of_the_strategy_and_back(mirrored):
    """Rests on `distribute_lib._push_per_thread_mode`, `keras.Variable._value`, `Optimizer._distribution_strategy`."""
    strategy = mirrored(2)
    with strategy.scope():
        variable, optimizer = keras.Variable(1.0), keras.optimizers.SGD()
    whole = variable.value

    def program():
        def across(strategy):
            for index in range(2):
                with tf_replicas.one_device(index, [variable], [optimizer]):
                    assert not tf.distribute.has_strategy()
                    assert optimizer._distribution_strategy is tf.distribute.get_strategy()
                    assert variable.value is whole.values[index]
                    variable.assign(10.0 + index)

        tf.distribute.get_replica_context().merge_call(across)

    tf.function(lambda: strategy.run(program))()
    assert [float(value) for value in whole.values] == [10.0, 11.0]
    assert variable.value is whole
    assert optimizer._distribution_strategy is strategy
    assert not tf.distribute.has_strategy()


def test_without_all_reduce_takes_sums_as_they_are():
    """Rests on `Optimizer._all_reduce_sum_gradients`, through which Keras's optimizers add up over replicas."""
    variable, optimizer, calls = keras.Variable([0.0]), keras.optimizers.SGD(1.0), []
    keras_own = optimizer._all_reduce_sum_gradients
    optimizer._all_reduce_sum_gradients = lambda pairs: calls.append("Keras's") or keras_own(pairs)
    optimizer.apply([tf.ones([1])], [variable])
    del optimizer._all_reduce_sum_gradients
    with tf_replicas.without_all_reduce([optimizer]):
        assert optimizer._all_reduce_sum_gradients is list
        optimizer.apply([tf.ones([1])], [variable])
    assert optimizer._all_reduce_sum_gradients == keras_own
    assert calls == ["Keras's"]
    assert variable.numpy().tolist() == [-2.0]


def test_runtime_started_tells_without_starting_it():
    """Rests on `tensorflow.python.eager.context.context()._initialized`."""
    code = (
        "from keras_mp._compat import runtime\n"
        "import tensorflow as tf\n"
        "before = runtime.runtime_started(), runtime.runtime_started()\n"
        "tf.constant(1) + 1\n"
        "print(before, runtime.runtime_started())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(False, False) True"


def test_log_lines_are_dropped_by_their_marks_and_the_others_passed_on(capfd, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    with runtime.without_log_lines("noise:"):
        os.write(2, b"a noise: line\nsomething that matters\n")
    assert capfd.readouterr().err == "something that matters\n"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    with runtime.without_log_lines("noise:"):
        os.write(2, b"a noise: line\n")
    assert capfd.readouterr().err == "a noise: line\n"


def test_the_remapper_is_switched():
    runtime.set_remapper(False)
    assert not runtime.remapper_enabled()
    runtime.set_remapper(True)
    assert runtime.remapper_enabled()


MISSING = {
    "no tensorflow": (
        "import sys; sys.modules['tensorflow'] = None",
        {},
        ["keras-mp[cpu]", "keras-mp[gpu]", "keras-mp[tpu]", "no `tensorflow` is installed here"],
    ),
    "an old tensorflow": (
        "import sys, types; sys.modules['tensorflow'] = types.SimpleNamespace(__version__='2.16.1')",
        {},
        ["2.16.1 is installed here", "pip install --upgrade"],
    ),
    "a backend that is not installed": ("", {"KERAS_BACKEND": "jax"}, ["Keras runs on 'jax' here"]),
    "another backend": ("", {"KERAS_BACKEND": "numpy"}, ["Keras runs on 'numpy' here", 'KERAS_BACKEND="tensorflow"']),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named_with_what_to_type(case):
    prelude, environment, expected = MISSING[case]
    code = (
        f"{prelude}\ntry:\n    import keras_mp\nexcept ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    assert run.stdout.startswith("MissingTensorFlowError ")
    for text in expected:
        assert text in run.stdout


def test_recording_tells_when_a_tape_watches():
    """Rests on `tensorflow.python.eager.record.could_possibly_record`."""
    seen = {}

    def look(name):
        seen[name] = execution.recording()

    @tf.function
    def program():
        look("graph")
        with tf.GradientTape():
            look("graph, tape")

    look("eager")
    with tf.GradientTape():
        look("eager, tape")
    program()
    assert seen == {"eager": False, "eager, tape": True, "graph": False, "graph, tape": True}


def test_inside_of_a_vectorized_map_nothing_records():
    """Rests on the frames of `tensorflow.python.ops.parallel_for.control_flow_ops`."""
    seen = {}

    def look(name, x):
        seen[name] = execution.recording()
        return x

    rows = tf.ones((2, 3))
    with tf.GradientTape() as tape:
        tape.watch(rows)
        tf.vectorized_map(lambda x: look("eager", x), rows)
        tf.function(lambda rows: tf.vectorized_map(lambda x: look("graph", x), rows))(rows)
        tf.map_fn(lambda x: look("map_fn", x), rows)
        look("outside", rows)
    assert seen == {"eager": False, "graph": False, "map_fn": True, "outside": True}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
def test_uncast_gives_what_is_stored(policy):
    class Reader(keras.layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=(), initializer=lambda shape, dtype: tf.constant(1.0001, dtype))

        def call(self, x):
            return keras_variables.uncast(self.weight), tf.convert_to_tensor(self.weight)

    layer = Reader(dtype=policy)
    stored, seen = layer(tf.zeros([1]))
    assert stored.dtype == layer.variable_dtype
    assert float(stored) == float(tf.constant(1.0001, layer.variable_dtype))
    assert seen.dtype == layer.compute_dtype


def test_keras_attaches_masks_and_logits_where_they_are_looked_for():
    masked = keras.layers.Masking()(np.array([[[1.0], [0.0]]], "float32"))
    np.testing.assert_array_equal(keras_layers.mask_of(masked), [[True, False]])
    logits = tf.constant([[0.0, 30.0]])
    probabilities = keras.activations.softmax(logits)
    assert keras_layers.logits_of(probabilities) is logits
    assert keras_layers.logits_of(logits) is keras_layers.mask_of(logits) is None
    # Keras reads what is attached here: the mask leaves the second entry out, and log(1e-7) is not all that is seen.
    values = keras_layers.with_mask(tf.constant([[[1.0], [5.0]]]), tf.constant([[True, False]]))
    # Keras 3.12 divides by one and an epsilon.
    assert float(keras.losses.MeanAbsoluteError()(tf.zeros((1, 2, 1)), values)) == pytest.approx(1)
    copied = keras_layers.with_logits(tf.identity(probabilities), logits)
    np.testing.assert_allclose(keras.losses.sparse_categorical_crossentropy(np.array([0]), copied), [30.0], rtol=1e-6)


class Scaled(keras.layers.Layer):
    """Has no `get_config`, so that Keras keeps the arguments."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.inside = [keras.layers.Dense(2, name="dense")]

    def build(self, input_shape):
        self.inside[0].build(input_shape)

    def call(self, inputs):
        return self.factor * inputs


def test_the_arguments_that_keras_keeps_are_read_and_set():
    """Rests on `Layer._auto_config` and `keras.src.saving.serialization_lib.SerializableDict`."""
    layer = Scaled(3, name="scaled")
    assert keras_layers.auto_config(layer) == {"factor": 3}
    keras_layers.set_auto_config(layer, {"factor": 5})
    assert layer.get_config() == {"name": "scaled", "factor": 5} | {
        key: value for key, value in layer.get_config().items() if key not in ("name", "factor")
    }
    assert Scaled.from_config(layer.get_config()).factor == 5
    keras_layers.set_auto_config(layer, None)
    assert keras_layers.auto_config(layer) is None
    with pytest.raises(NotImplementedError):
        layer.get_config()


def test_layers_are_found_by_path():
    """Rests on `Layer._layers`."""
    shared = keras.layers.Dense(2, name="shared")
    model = keras.Sequential([keras.Input((2,), name="x"), shared, Scaled(3, name="scaled"), shared], name="model")
    inside = ("/x", "/shared", "/scaled", "/scaled/dense")
    assert set(keras_layers.layers_by_path(model)) == {f"model{path}" for path in ("", *inside)}
    assert keras_layers.layers_by_path(model)["model/scaled/dense"] is model.layers[1].inside[0]
    assert keras_layers.inner_layers(shared) == []


def test_autocasts_tells_of_statistics_and_weights():
    """Rests on `Variable._autocast`."""
    layer = keras.layers.Layer(dtype="mixed_bfloat16")
    assert keras_variables.autocasts(layer.add_weight(shape=(2,)))
    assert not keras_variables.autocasts(layer.add_weight(shape=(2,), autocast=False))


def test_the_maker_of_a_symbolic_tensor_is_found():
    """Rests on `KerasTensor._keras_history`."""
    layer = keras.layers.Dense(2)
    assert keras_models.origin(layer(keras.Input((2,)))) is layer
    assert isinstance(keras_models.origin(keras.ops.exp(keras.Input((2,)))), keras.Operation)


def test_compile_arguments_are_the_objects_that_were_given():
    """Rests on `Model._compile_config`."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    optimizer, loss = keras.optimizers.SGD(), lambda y, p: tf.reduce_sum(y - p)
    model.compile(optimizer, loss, steps_per_execution=3)
    arguments = keras_models.compile_arguments(model)
    assert (arguments["optimizer"], arguments["loss"], arguments["steps_per_execution"]) == (optimizer, loss, 3)


def test_a_graph_runs_with_other_operations():
    """Rests on `Functional._run_through_graph` and its arguments `operation_fn` and `call_fn`."""
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((2,), name="b")}
    layer = keras.layers.Dense(3)
    model = keras.Model(inputs, [layer(keras.layers.Add()([inputs["a"], inputs["b"]]))])
    assert isinstance(model, keras_models.Functional)
    wider = keras.layers.Dense(5)
    (output,) = keras_models.run_through_graph(
        model,
        {name: keras.Input((2,)) for name in inputs},
        lambda operation: wider if operation is layer else operation,
        lambda operation, *args, **kwargs: operation(*args, **kwargs),
    )
    assert output.shape == (None, 5)
    assert keras_models.origin(output) is wider


def test_layers_that_prepare_data_are_told_from_others():
    """Rests on the bases of `Rescaling` and `StringLookup`."""
    classes = keras_models.preprocessing_classes()
    names = ("RandomFlip", "Rescaling", "Resizing", "CenterCrop", "MixUp", "RandAugment", "AutoContrast", "Hashing")
    names += ("IntegerLookup", "StringLookup", "TextVectorization", "CategoryEncoding", "Discretization")
    assert not [name for name in names if not issubclass(getattr(keras.layers, name), classes)]
    others = ("Dense", "Conv2D", "Embedding", "Dropout", "BatchNormalization", "Add")
    assert not [name for name in others if issubclass(getattr(keras.layers, name), classes)]


def test_saving_to_h5_is_told(tmp_path):
    """Rests on `keras.src.saving.keras_saveable` setting `use_legacy_config` while it writes HDF5."""
    seen = []

    @keras.saving.register_keras_serializable(package="tests")
    class Telling(keras.layers.Layer):
        def get_config(self):
            seen.append(keras_files.saving_to_h5())
            return super().get_config()

    model = keras.Sequential([keras.Input((2,)), Telling()])
    model.save(tmp_path / "model.keras")
    assert not any(seen)
    seen.clear()
    logging.disable(logging.WARNING)  # that the format is old
    model.save(tmp_path / "model.h5")
    logging.disable(logging.NOTSET)
    assert any(seen)


def test_losses_are_those_of_a_replicas_rows_inside_share_of_batch():
    """Rests on `reduce_values`, `apply_mask` and the two scalings of `keras.src.losses.loss`."""
    labels, predictions = np.zeros((2, 3)), tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    weights = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    mask = tf.constant([[True, True, True], [True, False, False]])

    class Absolute(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.abs(y_true - y_pred)

    def loss(reduction="sum_over_batch_size", sample_weight=None, masked=False, share=0.25):
        absolute = Absolute(reduction=reduction)
        # This replica has a quarter of the rows, and a tenth of what is not masked, or of the weights.
        with keras_losses.share_of_batch(None if share is None else tf.constant(share), lambda mine: 10 * mine):
            prediction = keras_layers.with_mask(tf.identity(predictions), mask) if masked else predictions
            return float(absolute(labels, prediction, sample_weight))

    assert loss() == 3.5
    assert loss("sum") == 21 * 4  # times the share it is the sum
    assert loss(masked=True) == pytest.approx(10 / 4 / 10 * 4)
    assert loss("mean_with_sample_weight", weights) == pytest.approx(14 / 4 / 10 * 4)
    assert loss(masked=True, share=None) == pytest.approx(10 / 4)  # as Keras has it
    assert loss("sum", share=None) == 21


def test_keras_keeps_the_first_batch_of_a_generator():
    """Rests on `data_adapter._first_batches` of Keras's iterator over epochs."""
    seen = []

    class Seeing(keras.Model):
        def _maybe_symbolic_build(self, iterator=None, data_batch=None):
            seen.append(keras_models.first_of_generator(iterator))

        def call(self, x):
            return x

    model = Seeing()
    model.compile(loss="mse")
    x = np.ones((2, 3), "float32")
    model.evaluate((batch for batch in [(x, x)]), steps=1, verbose=0)
    model.evaluate(x, x, verbose=0)
    assert seen[0][0] is x
    assert seen[1] is None


def test_trackers_of_single_losses_take_means_over_replicas(mirrored):
    """Rests on `unscale_loss_for_distribution`, and that `CompileLoss` looks it up in `keras.src.losses.loss`."""
    from keras.src.losses import loss

    with mirrored(2).scope(), keras_losses.share_of_batch(tf.constant(0.25), tf.identity):
        assert float(loss.unscale_loss_for_distribution(tf.constant(8.0))) == 4.0
        assert float(loss.scale_loss_for_distribution(tf.constant(8.0))) == 8.0


def test_the_outputs_of_an_op_have_places_by_name():
    """Rests on `op_def_registry.get` of `tensorflow.python.framework`."""
    x = tf.ones((2, 4, 4, 3))
    split = tf.function(lambda x: (tf.split(x, 3, axis=3), tf.raw_ops.TopKV2(input=x, k=1)))
    nodes = {node.op: node for node in split.get_concrete_function(x).graph.as_graph_def().node}
    assert tf_graphs.output_places(nodes["Split"]) == {"output": 0}
    assert tf_graphs.output_places(nodes["TopKV2"]) == {"values": 0, "indices": 1}
    unknown = type(nodes["Split"])(op="NoSuchOp")
    assert tf_graphs.output_places(unknown) == {}


def test_forward_mode_tells_whether_an_accumulator_follows():
    """Rests on `tensorflow.python.eager.forwardprop_util.pack_tangents`."""
    x, weight, other = tf.constant(2.0), tf.Variable(3.0), tf.constant(1.0)
    assert not execution.forward_mode(x, other)
    with tf.GradientTape() as tape:
        tape.watch(x)
        assert not execution.forward_mode(x)
    for primal, follow in ((x, lambda: x), (weight, lambda: tf.convert_to_tensor(weight))):
        with tf.autodiff.ForwardAccumulator(primal, tf.constant(1.0)):
            assert execution.forward_mode(other, follow() * 2)
            assert not execution.forward_mode(other)
        assert not execution.forward_mode(follow())


def test_the_cell_of_convolutional_lstms_is_the_class_that_its_layers_make():
    """Rests on `keras.src.layers.rnn.conv_lstm.ConvLSTMCell`."""
    for name in ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"):
        assert type(getattr(keras.layers, name)(1, 1).cell) is keras_layers.ConvLSTMCell


def test_what_is_tracked_is_listed_and_set():
    """Rests on `_tracker` of layers and optimizers: its `config`, `stored_ids`, `locked` and `_lock_violation_msg`."""
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    assert keras_layers.tracked(layer)["trainable_variables"] == [layer.kernel, layer.bias]
    keras_layers.set_tracked(layer, "trainable_variables", [layer.bias, layer.kernel])
    assert layer.weights == [layer.bias, layer.kernel]
    with keras_layers.unlocked(layer):
        layer.other = keras.layers.Dense(1)
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.another = keras.layers.Dense(1)
    open_layer = keras.layers.Dense(2)
    keras_layers.lock_alike(open_layer, layer)
    layer.another = keras.layers.Dense(1)
    optimizer = keras.optimizers.SGD()
    assert optimizer.iterations in keras_layers.tracked(optimizer)["variables"]
    assert keras_layers.is_tracker(optimizer._tracker)
    assert not keras_layers.is_tracker(layer)
    assert keras_layers.tracker_like(optimizer._tracker, list).is_in_store("variables", optimizer.iterations)


def test_attributes_of_keras_and_tensorflow_are_told_from_others():
    """Rests on `_path`, `_dtype_policy`, `_remat_mode` and `_self_unconditional_dependency_names`."""
    with keras.RematScope("full"):
        layer = keras.layers.Dense(2)
    layer.build((None, 3))
    settings = keras_layers.own_settings(layer, vars(keras.layers.Layer()))
    assert settings["_remat_mode"].mode == "full"
    assert settings["built"] is True
    assert "_layers" not in settings
    keras_layers.set_dtype_policy(layer, keras.DTypePolicy("mixed_bfloat16"))
    assert layer.compute_dtype == "bfloat16"
    keras_variables.set_path(layer.kernel, "a/kernel")
    assert layer.kernel.path == "a/kernel"
    layer._self_attention = 3
    assert "_self_attention" not in keras_layers.names_of_tensorflow()
    assert "_self_setattr_tracking" in keras_layers.names_of_tensorflow()
    assert keras_layers.checkpointed(layer, "_kernel")
    assert not keras_layers.checkpointed(layer, "_self_attention")
    keras_layers.without_attribute(layer, "_self_attention")
    assert not hasattr(layer, "_self_attention")


def test_a_copy_of_an_optimizer_knows_the_copies_of_variables():
    """Rests on `_var_key`, `_trainable_variables_indices`, `_exclude_from_weight_decay` and `_trainable_variables`."""
    pairs = {}
    for name in ("kernel", "bias"):
        original = keras.Variable([1.0], name=name)
        pairs[id(original)] = (original, keras.Variable([1.0], name=name))
    (kernel, copied), (bias, _) = pairs.values()
    optimizer, copy = (keras.optimizers.SGD(0.1, weight_decay=1.0) for _ in range(2))
    optimizer.exclude_from_weight_decay([kernel])
    optimizer.build([kernel, bias])
    assert keras_optimizers.trained_by(optimizer) == [kernel, bias]
    keras_optimizers.renumber(optimizer, copy, [kernel, bias], lambda variable: pairs[id(variable)][1])
    assert copy._get_variable_index(copied) == 0
    assert not copy._use_weight_decay(copied)
    with keras_optimizers.built_already(copy):
        copy.build([kernel])
    assert keras_optimizers.trained_by(copy) == []


@pytest.mark.parametrize("dense", [False, True])
def test_tables_are_copied(dense):
    """Rests on `_default_value`, `_empty_key` and `_deleted_key` of lookup tables."""
    if dense:
        table = tf.lookup.experimental.DenseHashTable(tf.int64, tf.float32, -1.0, empty_key=0, deleted_key=-1)
    else:
        table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
    table.insert(tf.constant([5, 6], tf.int64), [1.0, 2.0])
    copy = keras_layers.copy_of_table(table)
    table.insert(tf.constant([5], tf.int64), [9.0])
    assert copy.lookup(tf.constant([5, 6, 7], tf.int64)).numpy().tolist() == [1.0, 2.0, -1.0]


def test_a_symbolic_tensor_tells_its_inputs():
    """Rests on `_keras_history` and `_inbound_nodes`."""
    a, b, _ = keras.Input((2,)), keras.Input((2,)), keras.Input((2,))
    assert {id(each) for each in keras_models.sources(keras.layers.Dense(1)(a + b) + a)} == {id(a), id(b)}


def test_a_variable_is_read_in_another_dtype():
    """Rests on `_autocast` of a variable and `AutocastScope`."""
    variable = keras.Variable([1.0], autocast=False)
    with keras_variables.reading_in("bfloat16", variable):
        assert keras.ops.convert_to_tensor(variable).dtype == tf.bfloat16
    assert keras.ops.convert_to_tensor(variable).dtype == tf.float32


def test_weights_are_filed_as_those_of_another_class(tmp_path):
    """Rests on Keras's `_save_state`, `_load_state`, `_save_container_state` and `_load_container_state`."""
    x = keras.Input((2,))
    model = keras.Model(x, [keras.layers.Dense(1)(x), keras_mp.layers.Head(1)(x), keras.layers.Dense(1)(x)])
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        assert set(file["layers"]) == {"input_layer", "dense", "dense_1", "dense_2"}


def test_layers_by_address_are_those_of_the_file(tmp_path):
    """Rests on `_walk_saveable` of Keras's `saving_lib`, on its `KerasSaveable` and on `naming.to_snake_case`."""
    x = keras.Input((3, 2))
    y = keras.layers.Bidirectional(keras.layers.LSTM(2, return_sequences=True))(x)
    model = keras.Model(x, keras.Sequential([keras.layers.Dense(2), keras_mp.layers.Head(1)])(y))
    model.save_weights(tmp_path / "model.weights.h5")
    filed = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visit(lambda name: filed.append(f"/{name}") if not name.rpartition("/")[2].isdigit() else None)
    assert {name for name in filed if f"{name}/vars" in filed} == keras_files.layers_by_address(model).keys() - {""}


def test_what_is_written_into_files_and_reads_them(tmp_path, monkeypatch):
    """Rests on `_serialize_model_as_json`, `_load_model_from_fileobj` and `_load_model_from_dir` of `saving_lib`."""
    lib = keras_files._saving_lib
    for name in ("_serialize_model_as_json", "_load_model_from_fileobj", "_load_model_from_dir"):
        monkeypatch.setattr(lib, name, getattr(lib, name))
    keras_files.write_into_model_files("more", lambda model: model.name)
    keras_files.read_model_files_by(lambda source, *args: ("read", args))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="this")
    model.save(tmp_path / "model.keras")
    keras.saving.save_model(model, tmp_path / "folder", zipped=False)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["more"] == "this"
    for name in ("model.keras", "folder"):
        assert keras.saving.load_model(tmp_path / name, safe_mode=False) == ("read", (None, True, False))
    with (tmp_path / "model.keras").open("rb") as file:
        np.testing.assert_array_equal(
            keras_files.load_with_keras(file, None, False, True).get_weights()[0], model.get_weights()[0]
        )


def test_load_with_keras_makes_a_model_of_another_configuration(tmp_path):
    """Rests on `_model_from_config` of Keras's `saving_lib`."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="this")
    keras.saving.save_model(model, tmp_path / "folder", zipped=False)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["config"]["name"] = "that"
    assert keras_files.load_with_keras(tmp_path / "folder", None, False, True, config=config).name == "that"


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`:UserWarning")
def test_trusting_reaches_what_keras_makes_inside():
    """Rests on `SafeModeScope` and `in_safe_mode` of Keras's `serialization_lib`."""
    config = keras.saving.serialize_keras_object(lambda x: x)
    with keras_files.trusting(False):
        assert keras.saving.deserialize_keras_object(config)(3) == 3
    with keras_files.trusting(True), pytest.raises(ValueError, match="safe_mode"):
        keras.saving.deserialize_keras_object(config, safe_mode=False)


def test_slots_are_found_for_a_view_in_float32():
    """Rests on `Optimizer._var_key` and `_unique_id`, by which Keras finds the slots of a variable."""
    variable, optimizer = keras.Variable([1.0, 2.0], dtype="float16"), keras.optimizers.SGD(0.5, momentum=0.5)
    optimizer.build([variable])
    view = keras_variables.Float32View(variable.value, optimizer)
    assert optimizer._var_key(view) == optimizer._var_key(variable)
    assert optimizer._get_variable_index(view) == 0
    optimizer.update_step(tf.constant([2.0, -2.0]), view, 0.5)
    assert variable.numpy().tolist() == [0.0, 3.0]
    assert optimizer.momentums[0].numpy().tolist() == [-1.0, 1.0]


def test_functions_that_an_operation_calls_are_found():
    """Rests on `Graph._get_function`."""

    @tf.function
    def inner(x):
        return tf.sin(x)

    def calling(x):
        return tf.cond(x > 0, lambda: tf.cos(x), lambda: tf.while_loop(lambda x: x < 0, lambda x: [inner(x)], [x])[0])

    found = set()

    def visit(graph):
        for op in graph.get_operations():
            found.add(op.type)
            for _, function in tf_graphs.called_functions(op):
                visit(function)

    visit(tf.function(calling).get_concrete_function(tf.constant(1.0)).graph)
    assert {"Cos", "Sin"} <= found


def test_functions_are_called_around_epochs(monkeypatch):
    """Rests on `CallbackList.on_train_begin` and `on_epoch_end`, and on its `model`, which `fit` sets."""
    for name in ("on_train_begin", "on_epoch_end"):
        monkeypatch.setattr(keras.callbacks.CallbackList, name, getattr(keras.callbacks.CallbackList, name))
    seen = []

    class Noting(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append("callback begins")

        def on_epoch_end(self, epoch, logs=None):
            seen.append("callback ends")

    keras_hooks.call_around_epochs(lambda model: seen.append(model), lambda model: seen.append((model, "ends")))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 1)), epochs=2, verbose=0, callbacks=[Noting()])
    end = ["callback ends", (model, "ends")]
    assert seen == [model, "callback begins", *end, *end]


def test_calls_and_losses_are_watched_and_let_go():
    """Rests on `keras.Operation.__call__` and `keras.Layer.add_loss`, which are replaced, and put back."""

    class Losing(keras.layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_sum(x))
            return x

    class Failing(keras.layers.Layer):
        def call(self, x):
            raise NotImplementedError

    losing, failing, seen = Losing(), Failing(), []

    def begins(operation, arguments):
        seen.append(("begins", operation))
        return operation

    inputs = keras.Input((2,))
    model = keras.Model(inputs, losing(inputs) + 1)
    addition = model.operations[-1]
    before = keras.Operation.__call__, keras.Layer.add_loss
    with keras_hooks.watched_calls(
        begins,
        lambda operation, outputs: seen.append(("ends", operation)),
        lambda operation: seen.append(("fails", operation)),
        lambda layer: seen.append(("loses", layer)),
    ):
        model(tf.ones((1, 2)))
        with pytest.raises(NotImplementedError):
            failing(tf.ones((1, 2)))
        thread = threading.Thread(target=lambda: losing(tf.ones((1, 2))))
        thread.start()
        thread.join()
    assert (keras.Operation.__call__, keras.Layer.add_loss) == before
    assert seen == [
        ("begins", model),
        ("begins", losing),
        ("loses", losing),
        ("ends", losing),
        ("begins", addition),
        ("ends", addition),
        ("ends", model),
        ("begins", failing),
        ("fails", failing),
    ]


def test_a_scratch_graph_reads_variables_and_changes_nothing():
    """Rests on `tf.__internal__.FuncGraph`."""
    variable = tf.Variable(1.0)
    graph = tf_graphs.scratch_graph()
    with graph.as_default():
        result = variable.assign_add(1.0) + tf.compat.v1.placeholder(tf.float32, ())
    assert result.graph is graph
    assert "AssignAddVariableOp" in {op.type for op in graph.get_operations()}
    assert float(variable) == 1.0
