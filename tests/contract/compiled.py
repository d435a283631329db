"""The part of the contract that traces and compiles: XLA, replicas, and forward mode."""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tests.contract.case import Subject, assert_all_close, assert_close, gradients_of, stock_twin


def check_compiled(subject: Subject, strategy: tf.distribute.Strategy) -> None:
    """Asserts that graphs, XLA, replicas and forward accumulators find the numbers of eager code.

    Args:
        subject: the layer, its stock twin and its inputs.
        strategy: of two replicas.
    """
    _check_xla(subject)
    _check_replicas(subject, strategy)
    _check_forward_mode(subject)


def _check_xla(subject: Subject) -> None:
    """XLA finds the numbers and the moved weights of a plain graph of unknown batch size."""
    case, layer = subject.case, subject.layer
    before = layer.get_weights()
    arguments = subject.given, subject.pulled
    results, after = {}, {}
    for jit_compile in (False, True):
        signature = tf.nest.map_structure(
            lambda tensor: tf.TensorSpec(tensor.shape if jit_compile else (None, *tensor.shape[1:]), tensor.dtype),  # noqa: B023
            arguments,
        )
        step = tf.function(
            lambda inputs, upstream: gradients_of(case, layer, inputs, upstream),
            input_signature=signature,
            jit_compile=jit_compile,
        )
        results[jit_compile] = step(*arguments)
        after[jit_compile] = {w.path: w.numpy() for w in layer.weights}
        layer.set_weights(before)
    in_order = {name: results[True][name] for name in results[False]}
    assert_all_close(case, in_order, results[False], case.allows(subject.compute_dtype), "XLA: ")
    for path, value in after[True].items():
        assert_close(value, after[False][path], 1e-5, path)


def _check_replicas(subject: Subject, strategy: tf.distribute.Strategy) -> None:
    """Each of two replicas finds the results of one device for its half of the batch.

    Synchronized layers find together those for the whole batch.
    """
    case, layer = subject.case, subject.layer
    before = layer.get_weights()
    given, pulled = subject.given, subject.pulled
    batch = given[0].shape[0]
    assert batch % 2 == 0, "an odd batch does not divide among two replicas"
    # Masks among the further arguments are divided with the batch.
    masks = {name: value for name, value in case.call.items() if isinstance(value, np.ndarray) and len(value) == batch}
    halves = [
        ([x[part] for x in given], pulled[part], {name: tf.constant(mask[part]) for name, mask in masks.items()})
        for part in (slice(0, batch // 2), slice(batch // 2, batch))
    ]
    with strategy.scope():
        copy = case.ours()
        case.build(copy)
        copy.set_weights(before)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: halves[context.replica_id_in_sync_group]
    )

    def results_of(
        layer: keras.Layer, inputs: Sequence[tf.Tensor], upstream: tf.Tensor, masks: dict[str, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        return gradients_of(dataclasses.replace(case, call={**case.call, **masks}), layer, inputs, upstream)

    step = tf.function(lambda values: strategy.run(lambda *half: results_of(copy, *half), values))
    results = {name: strategy.experimental_local_results(value) for name, value in step(values).items()}
    tolerance = case.allows(subject.compute_dtype)
    if case.synchronized:
        whole = gradients_of(case, layer, given, pulled)
        for name, parts in results.items():
            joined = tf.concat(parts, 0) if name == "y" or name.startswith("input ") else parts[0] + parts[1]
            assert_close(joined, whole[name], tolerance, f"both replicas: {name}")
        layer.set_weights(before)
        return
    for index, half in enumerate(halves):
        layer.set_weights(before)
        expected = results_of(layer, *half)
        actual = {name: results[name][index] for name in expected}
        assert_all_close(case, actual, expected, tolerance, f"replica {index}: ")
    layer.set_weights(before)


def _check_forward_mode(subject: Subject) -> None:
    """A forward accumulator finds the derivative of the stock layer in float32, in eager code and in a graph."""
    case, layer = subject.case, subject.layer
    inputs, before = subject.inputs, layer.get_weights()
    rng = np.random.default_rng(1)
    tangents = [tf.cast(tf.cast(rng.normal(0.0, 1.0, x.shape), subject.compute_dtype), "float32") for x in inputs]

    def derivative(layer: keras.Layer, inputs: Sequence[tf.Tensor], tangents: tf.Tensor) -> tf.Tensor:
        with tf.autodiff.ForwardAccumulator(list(inputs), list(tangents)) as accumulator:
            y = case(layer, inputs)
        return accumulator.jvp(y)

    stock = stock_twin(case, layer)
    try:
        expected = derivative(stock, inputs, tangents)
    except LookupError:  # kernels for images, whose gradients have none; they are linear
        expected = case(stock, [x + t for x, t in zip(inputs, tangents, strict=True)]) - case(stock, inputs)
    given = [[tf.cast(x, subject.compute_dtype) for x in each] for each in (inputs, tangents)]
    for run in (derivative, tf.function(derivative, autograph=False)):
        layer.set_weights(before)
        assert_close(run(layer, *given), expected, 2 * case.allows(subject.compute_dtype), "forward derivative")
    layer.set_weights(before)
