"""A wrapper that runs any layer in float32."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras

from keras_mp.errors import ArgumentError

__all__ = ["Float32"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Float32(keras.layers.Wrapper):
    """Runs a layer, and the layers inside it, in float32 whatever the global dtype policy is.

    For a layer that 16 bits do not suit and that has no float32-safe twin here, and for the output of a model. The
    wrapped layer's own dtype policy, and that of every layer inside it, becomes "float32".

    Args:
        layer: a Keras layer or model, not yet built or with float32 weights.
        **kwargs: `name` and the other arguments of a Keras layer; `dtype` can only be "float32".

    Call arguments:
        inputs, *args, **kwargs: those of the wrapped layer. Floating-point tensors among them are cast to float32.

    Returns:
        What the wrapped layer answers, with floating-point tensors in float32.

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

    def __init__(self, layer: Any, **kwargs: Any) -> None:
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
            self._set_policies()  # of layers that only exist once it is built

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer; Keras has cast the arguments to float32 already."""
        outputs = self.layer(inputs, *args, **kwargs)
        return keras.tree.map_structure(_to_float32, outputs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's output shape."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's outputs as symbolic tensors, which also builds a layer of several inputs."""
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """The wrapped layer's mask."""
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
        return x  # untouched, so that a mask attached to it stays
    return keras.ops.cast(x, "float32")


def _with_layers_inside(layer: Any, seen: set[int]) -> Iterator[Any]:
    """`layer` and every layer it holds, at any depth.

    Keras has a public list of a model's layers and none of a layer's; its attributes hold both.
    """
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer
    for value in list(vars(layer).values()):
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, keras.Layer):
                yield from _with_layers_inside(item, seen)
