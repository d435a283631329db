"""A layer, the stock layer it replaces, and the comparison of their results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16", "float64")

# Relative to the largest value: one rounding to the dtype; in float32, the difference of two ways of computing.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-5}


@dataclass(frozen=True)
class Case:
    """A layer, the stock layer it replaces, and what to call both with.

    Args:
        ours: makes the layer.
        stock: makes the layer it replaces.
        shapes: the shapes of the inputs. The first axis is the batch and must be even, for two replicas.
        call: further arguments of the call.
        as_list: whether the inputs are given as one list, as Keras's `Attention` takes them.
        output_dtype: the dtype of the output; None for the compute dtype.
        loads_stock_config: whether the class takes the configuration of the stock layer.
        differentiable: whether finite differences agree with the gradient.
        random: whether two calls in training differ.
        synchronized: whether replicas compute together the results of one device for the whole batch.
        masked: whether to call both layers with a Keras mask, too. Inputs need rank 3 or more.
        weights: the range of the random weights; positive where some are variances.
        vanishing: ends of the paths of weights whose gradient is zero but for rounding.
        scale: the inputs are normally distributed with mean 1 and deviation 2, times this.
        tolerance: by 16-bit dtype, relative to the largest result, where more than the output is rounded. State why.
    """

    ours: Callable[[], keras.Layer]
    stock: Callable[[], keras.Layer]
    shapes: Sequence[tuple[int, ...]]
    call: dict[str, Any] = field(default_factory=dict)
    as_list: bool = False
    output_dtype: str | None = None
    loads_stock_config: bool = True
    differentiable: bool = True
    random: bool = False
    synchronized: bool = False
    masked: bool = True
    weights: tuple[float, float] = (0.5, 1.5)
    vanishing: tuple[str, ...] = ()
    scale: float = 1.0
    tolerance: dict[str, float] = field(default_factory=dict)

    def __call__(self, layer: keras.Layer, inputs: Sequence[tf.Tensor], **call: Any) -> tf.Tensor:
        """Calls a layer in this case's way."""
        arguments = {**self.call, **call}
        return layer(list(inputs), **arguments) if self.as_list else layer(*inputs, **arguments)

    def build(self, layer: keras.Layer) -> None:
        """Builds a layer for this case's shapes."""
        if not layer.built:
            self(layer, [keras.Input(shape[1:], batch_size=shape[0]) for shape in self.shapes])

    def allows(self, dtype: str) -> float:
        """Returns the difference to allow, relative to the largest value."""
        return self.tolerance.get(dtype, TOLERANCE[dtype])


def gradients(layer: keras.Layer, x: tf.Tensor, upstream: tf.Tensor, call: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Calls a layer of one input and pulls `upstream` back through it.

    Args:
        layer: a built layer.
        x: its input.
        upstream: gradient to its output, of the output's shape.
        call: further arguments of the call.

    Returns:
        Tensors by name: the output, the gradients to the input and to each trainable weight.
    """
    results = gradients_of(Case(None, None, [x.shape], call), layer, [x], upstream)
    return {"y": results.pop("y"), "x": results.pop("input 0"), **results}


def gradients_of(
    case: Case, layer: keras.Layer, inputs: Sequence[tf.Tensor], upstream: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Does the same for a layer of several inputs, called as a case says."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = case(layer, inputs)
        loss = tf.reduce_sum(tf.cast(y, upstream.dtype) * upstream)
    variables = [weight.value for weight in layer.trainable_weights]
    to_inputs, to_weights = tape.gradient(loss, [list(inputs), variables], unconnected_gradients="zero")
    return (
        {"y": y}
        | {f"input {index}": gradient for index, gradient in enumerate(to_inputs)}
        | {
            # Without the name of the layer, which is another for each copy of it.
            weight.path.partition("/")[2]: tf.convert_to_tensor(gradient)
            for weight, gradient in zip(layer.trainable_weights, to_weights, strict=True)
        }
    )


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Asserts that two arrays differ by at most `tolerance` of the largest expected magnitude."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    largest = max(np.abs(expected).max(initial=0.0), 1e-30)
    np.testing.assert_allclose(actual / largest, expected / largest, rtol=0, atol=tolerance, err_msg=what)


def assert_all_close(case: Case, actual: dict[str, Any], expected: dict[str, Any], tolerance: float, what: str) -> None:
    """Asserts that each result is close to its reference; a vanishing one is compared with the largest of all."""
    largest = max(np.abs(np.asarray(value, "float64")).max(initial=0.0) for value in expected.values())
    for (name, value), reference in zip(actual.items(), expected.values(), strict=True):
        if name.endswith(case.vanishing or ("no such",)):
            np.testing.assert_allclose(value, np.zeros_like(value), atol=tolerance * largest, err_msg=name)
        else:
            assert_close(value, reference, tolerance, f"{what}{name}")


def randomize(case: Case, layer: keras.Layer, rng: np.random.Generator) -> None:
    """Gives the layer random weights."""
    # Counters and the state of random numbers stay what they are.
    layer.set_weights(
        [
            rng.uniform(*case.weights, weight.shape) if weight.dtype.startswith(("float", "bf")) else weight.numpy()
            for weight in layer.weights
        ]
    )


def wide_dtype(dtype: str) -> str:
    """Returns the dtype of the stock layer to compare with."""
    return "float64" if dtype == "float64" else "float32"


def stock_twin(case: Case, layer: keras.Layer) -> keras.Layer:
    """Returns the stock layer with the same weights, in float32 or, under that policy, float64."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(wide_dtype(policy.name))
    try:
        stock = case.stock()
        case.build(stock)
    finally:
        keras.config.set_dtype_policy(policy)
    assert [weight.name for weight in stock.weights] == [weight.name for weight in layer.weights]
    stock.set_weights(layer.get_weights())
    return stock


@dataclass(frozen=True)
class Subject:
    """A layer with random weights under one policy, and the numbers to call it with.

    The inputs and the gradient to the output are float32, with values that the layer's dtypes hold. So the stock layer
    gets the same numbers in float32.
    """

    case: Case
    layer: keras.Layer
    inputs: list[tf.Tensor]
    upstream: tf.Tensor
    compute_dtype: str
    output_dtype: str

    @property
    def given(self) -> list[tf.Tensor]:
        """The inputs in the compute dtype."""
        return [tf.cast(x, self.compute_dtype) for x in self.inputs]

    @property
    def pulled(self) -> tf.Tensor:
        """The gradient to the output, in the output's dtype."""
        return tf.cast(self.upstream, self.output_dtype)


def subject_of(case: Case, policy: str) -> Subject:
    """Makes a layer under a policy, and asserts that symbolic tensors have the dtypes and shapes of real ones."""
    keras.config.set_dtype_policy(policy)
    layer = case.ours()
    compute_dtype = keras.dtype_policies.get(policy).compute_dtype
    output_dtype = case.output_dtype or compute_dtype
    rng = np.random.default_rng(0)
    symbolic = case(layer, [keras.Input(shape[1:], dtype=compute_dtype) for shape in case.shapes])
    inputs = [
        tf.cast(tf.cast(case.scale * rng.normal(1.0, 2.0, shape), compute_dtype), "float32") for shape in case.shapes
    ]
    real = case(layer, [tf.cast(x, compute_dtype) for x in inputs])
    assert symbolic.dtype == output_dtype
    assert keras.backend.standardize_dtype(real.dtype) == output_dtype
    assert symbolic.shape == (None, *real.shape[1:])
    shapes = [list(case.shapes)] if case.as_list else case.shapes
    assert tuple(layer.compute_output_shape(*shapes)) == tuple(real.shape)
    upstream = tf.cast(tf.cast(rng.normal(0.0, 1.0, real.shape), output_dtype), "float32")
    randomize(case, layer, rng)
    return Subject(case, layer, inputs, upstream, compute_dtype, output_dtype)
