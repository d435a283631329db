"""A wrapper that runs any layer in float32."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras

from keras_mp._compat import keras_layers
from keras_mp.errors import ArgumentError

__all__ = ["Float32"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Float32(keras.layers.Wrapper):
    """Runs a layer, and all layers inside it, in float32 under every global dtype policy.

    Use it where half precision does not suit a layer that has no float32-safe twin here, and for a model's output. The
    dtype policy of the wrapped layer, and of every layer inside it, becomes "float32".

    Args:
        layer: a Keras layer or model, not yet built or with float32 weights.
        **kwargs: `name` and other arguments of a Keras layer; `dtype` can only be "float32".

    Call arguments:
        inputs, *args, **kwargs: arguments of the wrapped layer. Floating-point tensors are cast to float32.

    Returns:
        The output of the wrapped layer, with floating-point tensors in float32.

    Raises:
        ValueError: if `layer` is not a Keras layer.
        keras_mp.errors.ArgumentError: if `dtype` is not "float32", or `layer` has weights of fewer bits.

    Example:
        >>> import keras
        >>> import keras_mp
        >>> import numpy as np
        >>> probabilities = keras_mp.layers.Float32(keras.layers.Dense(10, "softmax", dtype="mixed_bfloat16"))
        >>> probabilities(np.ones((2, 4), "float16")).dtype
        tf.float32
    """

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        dtype = keras.dtype_policies.get(kwargs.pop("dtype", None) or "float32")
        if dtype.name != "float32":
            raise ArgumentError(
                f"`Float32` runs its layer in float32 and takes no other dtype. Received: dtype={dtype.name!r}. Leave "
                "`dtype` out, or use the layer without the wrapper."
            )
        super().__init__(layer, dtype=dtype, **kwargs)
        self.supports_masking = layer.supports_masking
        self._set_policies()

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapped layer; one that needs several shapes builds itself when it is called."""
        if len(inspect.signature(self.layer.build).parameters) == 1:
            super().build(input_shape)
            self._set_policies()  # some layers exist only now

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer; Keras has cast the arguments to float32 already."""
        outputs = self.layer(inputs, *args, **kwargs)
        return keras.tree.map_structure(_to_float32, outputs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the wrapped layer's output shape."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the wrapped layer's symbolic outputs, and builds a layer of several inputs."""
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """Returns the wrapped layer's mask."""
        return self.layer.compute_mask(inputs, previous_mask)

    def _set_policies(self) -> None:
        for layer in _with_layers_inside(self.layer, set()):
            narrow = [w.path for w in layer.weights if w.dtype in ("float16", "bfloat16")]
            if narrow:
                raise ArgumentError(
                    f"`Float32` needs float32 weights, and layer {layer.name!r} was built with 16-bit ones: {narrow}. "
                    'Wrap it before it is built, or build it with dtype="float32" and copy the weights.'
                )
            layer.dtype_policy = "float32"


def _to_float32(x: Any) -> Any:
    if not keras.backend.is_float_dtype(x.dtype) or keras.backend.standardize_dtype(x.dtype) == "float32":
        return x  # the same object, so that its mask stays
    return keras.ops.cast(x, "float32")


def _with_layers_inside(layer: keras.Layer, seen: set[int]) -> Iterator[keras.Layer]:
    """Yields `layer` and every layer it holds, at any depth."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer
    for inner in keras_layers.inner_layers(layer):
        yield from _with_layers_inside(inner, seen)
