"""Normalization of features by statistics that are known before training, in float32, to 16-bit tensors."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layer_parts
from keras_mp.ops import fusion

__all__ = ["Normalization"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Normalization(keras.layers.Normalization):
    """Feature-wise normalization by given or adapted statistics, computed in float32.

    A drop-in for `keras.layers.Normalization`, with the same arguments and weights. Neither the data nor the statistics
    are cast to the compute dtype first: incomes above 65504, or years that bfloat16 would round to multiples of 8, come
    out as they should. `adapt` adds up in float64, and takes data sets under any dtype policy.

    Args:
        axis: int, tuple of ints, or None, the axes that keep statistics of their own; None for one mean and variance of
            all elements. Defaults to -1.
        mean, variance: numbers or arrays that broadcast to the kept axes, in the unit of the input and its square; both
            or neither. Defaults to None, for those that `adapt` finds.
        invert: bool, whether to turn normalized numbers back into original ones. Defaults to False.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape whose kept axes are static; float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        ValueError: if only one of `mean` and `variance` is given, they do not fit the axes, an axis is out of bounds or
            has no static size, or data to adapt to has another shape than the layer was built for or has no batch.
        TypeError: if `adapt` gets what is neither an array, a tensor, a data set nor an iterable.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> incomes = np.array([[30000.0], [70000.0], [140000.0]], "float32")
        >>> layer = keras_mp.layers.Normalization(dtype="mixed_float16")
        >>> layer.adapt(incomes)
        >>> [round(float(y), 2) for y in layer(incomes)[:, 0]]  # float16 ends at 65504
        [-1.1, -0.22, 1.32]

    Statistics of batches are put together as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances", 1979.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Calls the layer, without Keras's cast to the compute dtype of what comes from a `tf.data` pipeline."""
        return keras.layers.Layer.__call__(self, inputs, **kwargs)

    def build(self, input_shape: Any) -> None:
        """Creates the weights, or spreads the `mean` and `variance` that were given over the kept axes."""
        super().build(input_shape)
        if input_shape is not None and self.input_mean is not None:
            self.mean, self.variance = (
                self._constant(np.broadcast_to(np.asarray(value, "float64"), keras_layer_parts.kept_shapes(self)[0]))
                for value in (self.input_mean, self.input_variance)
            )

    def adapt(self, data: Any) -> None:
        """Sets the weights to the mean and variance of data.

        Args:
            data: array, tensor, `tf.data.Dataset`, `keras.utils.PyDataset` or iterable of batches; of tuples the first
                item counts. A data set of single numbers is put into batches.
        """
        # Keras's layer checks shapes and types, and computes in float64 where it gets float64 arrays; its own sum over
        # the batches of a data set is in the compute dtype, and fails where that is not float32.
        of_batch = keras.layers.Normalization(axis=self.axis, dtype="float64")
        if self.built:
            of_batch.build(keras_layer_parts.shape_built_for(self))
        total, mean, variance = 0, np.zeros([]), np.zeros([])
        for batch in _batches(data):
            array = batch if batch.dtype == np.float64 else batch.astype("float64")
            if not array.size:
                continue
            of_batch.adapt(array)
            batch_mean, batch_variance = of_batch.adapt_mean.numpy(), of_batch.adapt_variance.numpy()
            count = math.prod(array.shape[axis] for axis in keras_layer_parts.reduced_axes(of_batch))
            total += count
            share = count / total
            apart = batch_mean - mean
            mean = mean + share * apart
            variance = (1 - share) * variance + share * (batch_variance + (1 - share) * apart**2)
            if not self.built:
                self.build(keras_layer_parts.shape_built_for(of_batch))
        if not total:
            raise ValueError(
                "adapt() received an empty iterable (no batches). Expected at least one batch. Pass a non-empty "
                "iterable of arrays or tensors, e.g. layer.adapt([x]) or layer.adapt(list_of_batches)."
            )
        self.adapt_mean.assign(mean)
        self.adapt_variance.assign(variance)
        self.finalize_state()

    def finalize_state(self) -> None:
        """Makes constants of the weights, which is what `call` reads, so that a `tf.data` pipeline holds no weights."""
        if self.input_mean is None and self.built:
            self.mean, self.variance = (
                self._constant(weight.numpy()) for weight in (self.adapt_mean, self.adapt_variance)
            )

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the weights, and what `call` reads."""
        super().set_weights(weights)
        self.finalize_state()

    def call(self, inputs: Any) -> Any:
        """Normalizes `inputs`; see the class."""
        if self.mean is None:
            raise ValueError("You must call `.build(input_shape)` on the layer before using it.")
        x = tf.convert_to_tensor(inputs)
        dtype = keras.backend.result_type(x.dtype, self.compute_dtype, "float32")
        mean = tf.cast(self.mean, dtype)
        deviation = tf.maximum(tf.sqrt(tf.cast(self.variance, dtype)), tf.cast(keras.config.epsilon(), dtype))
        return _affine(
            x if x.dtype.is_floating else tf.cast(x, dtype),
            mean,
            deviation,
            invert=self.invert,
            dtype=dtype,
            output_dtype=self.compute_dtype,
        )

    def _constant(self, statistic: Any) -> Any:
        """A statistic of the kept axes as a constant that broadcasts to the input, wide enough for any of them."""
        with tf.init_scope():  # the layer may be built inside a function's graph, and outlives it
            return tf.constant(np.reshape(statistic, keras_layer_parts.kept_shapes(self)[1]), "float64")


def _batches(data: Any) -> Iterator[Any]:
    """The batches of what `adapt` takes, as arrays."""
    if isinstance(data, np.ndarray) or tf.is_tensor(data):
        data = [data]
    elif isinstance(data, tf.data.Dataset):
        spec = data.element_spec[0] if isinstance(data.element_spec, tuple) else data.element_spec
        if spec.shape.rank == 1:
            data = data.batch(128)  # single numbers, as Keras takes them
    elif isinstance(data, keras.utils.PyDataset):
        data = map(data.__getitem__, range(data.num_batches or 0))
    elif not isinstance(data, Iterable):
        raise TypeError(
            f"Unsupported data type: {type(data)}. `adapt` supports `np.ndarray`, backend tensors, "
            "`tf.data.Dataset`, `keras.utils.PyDataset`, and iterables of batches (e.g. list, generator)."
        )
    for batch in data:
        first = batch[0] if isinstance(batch, tuple) else batch
        if not hasattr(first, "shape"):
            raise TypeError(
                "adapt() expects an iterable that yields arrays or tensors with a `.shape` attribute (e.g. numpy "
                f"arrays or backend tensors). Got an element of type {type(first).__name__}. Ensure each yielded "
                "element is array-like with a `.shape` attribute."
            )
        yield np.asarray(first)


def _affine_forward(x: Any, mean: Any, deviation: Any, *, invert: bool, dtype: str, output_dtype: str) -> Any:
    x = tf.cast(x, dtype)
    return tf.cast(mean + x * deviation if invert else (x - mean) / deviation, output_dtype)


def _affine_backward(
    x: Any, mean: Any, deviation: Any, upstream: Any, *, invert: bool, dtype: str, output_dtype: str
) -> Any:
    del mean, output_dtype
    g = tf.cast(upstream, dtype)
    return tf.cast(g * deviation if invert else g / deviation, x.dtype), None, None


_affine = fusion.operation(_affine_forward, _affine_backward)
