"""The layers and activations here for Keras's own, by which `convert` exchanges them."""

import warnings
from typing import Any

import keras

from keras_mp import activations, layers
from keras_mp._compat import execution, keras_hooks, keras_layers
from keras_mp.errors import KerasMPWarning
from keras_mp.layers.recurrent.conv_lstm import ConvLSTMCell
from keras_mp.policies.policy import stacklevel

__all__: list[str] = []

# From a layer of Keras to the layer here that is safe or faster in half precision, and back.
SAFE: dict[type, type] = {
    getattr(keras.layers, name): getattr(layers, name) for name in layers.__all__ if hasattr(keras.layers, name)
}
SAFE[keras_layers.ConvLSTMCell] = ConvLSTMCell
STOCK: dict[type, type] = {ours: stock for stock, ours in SAFE.items()} | {layers.Head: keras.layers.Dense}
SAFE_ACTIVATIONS: dict[Any, Any] = {
    getattr(keras.activations, name): getattr(activations, name)
    for name in activations.__all__
    if hasattr(keras.activations, name)
}
STOCK_ACTIVATIONS: dict[Any, Any] = {ours: stock for stock, ours in SAFE_ACTIVATIONS.items()}


def _warn_of_slow_convolutions(model: keras.Model) -> None:
    """Warns of Keras's depthwise convolutions that take longer to train in bfloat16 than in float32 on a CPU."""
    slow = [
        path
        for path, layer in keras_layers.layers_by_path(model).items()
        if type(layer) is keras.layers.DepthwiseConv2D
        and layer.compute_dtype == "bfloat16"
        and (max(layer.strides) > 1 or max(layer.kernel_size) > 3)
    ]
    if slow and execution.on_cpu():
        others = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        warnings.warn(
            f"{slow[0]!r}{others} in model {model.name!r}: on a CPU, Keras's DepthwiseConv2D takes longer to train in "
            "bfloat16 than in float32 where it has strides or a kernel larger than 3 x 3. Take "
            'keras_mp.layers.DepthwiseConv2D, or type model = keras_mp.convert(model, "mixed_bfloat16").',
            KerasMPWarning,
            stacklevel=stacklevel(),
        )


keras_hooks.call_before_training(_warn_of_slow_convolutions)
