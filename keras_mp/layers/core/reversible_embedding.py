"""The embedding of a language model that also makes its logits, in float32."""

import functools
import sys

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_layers, keras_variables
from keras_mp.layers.core.embedding import rows_of
from keras_mp.layers.core.quantizing import Quantizing
from keras_mp.ops import matmul

__all__ = ["ReversibleEmbedding", "twin_for_keras_hub"]


@keras.saving.register_keras_serializable(package="keras_mp")
class ReversibleEmbedding(Quantizing, keras.layers.ReversibleEmbedding):
    """An embedding whose logits, with `reverse=True`, are float32 sums of 16-bit products.

    A drop-in for `keras.layers.ReversibleEmbedding`, with the same arguments and weights. It reads rows like
    `keras_mp.layers.Embedding`. In reverse it computes logits like `Head`: the sums are float32 and not rounded, so
    words that bfloat16 cannot tell apart do not tie. `logit_soft_cap` is applied in float32.

    Args:
        input_dim: int, number of words.
        output_dim: int, length of a row.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (..., output_dim) in the compute dtype. In reverse, tensor of shape (..., input_dim) in float32
        (float64 under that policy).

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.ReversibleEmbedding(100, 8, dtype="mixed_bfloat16")
        >>> words = layer(np.array([[1, 2, 3]]))
        >>> words.dtype, layer(words, reverse=True).dtype
        (tf.bfloat16, tf.float32)

    Press and Wolf, "Using the Output Embedding to Improve Language Models", 2016, https://arxiv.org/abs/1608.05859.
    """

    def call(self, inputs: tf.Tensor, reverse: bool = False) -> tf.Tensor:
        """Looks up rows or computes logits; see the class."""
        if not reverse:
            rows = rows_of(self, inputs)
            if rows is None:
                return super().call(inputs)
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            return rows if mask is None else keras_layers.with_mask(rows, mask)
        table = self.embeddings if self.tie_weights else self.reverse_embeddings
        dtype = tf.as_dtype(self.reverse_dtype or self.compute_dtype)
        if dtype.size != 2:
            return tf.cast(super().call(inputs, reverse=True), self._logits_dtype())
        x, table = tf.cast(inputs, dtype), tf.cast(_stored(table), dtype)
        flat = tf.reshape(x, [-1, self.output_dim])
        where = execution.current()
        logits = matmul.with_float32_sums(flat, table, False, self.tie_weights, tf.float32, where)
        logits = tf.reshape(logits, [*keras.ops.shape(x)[:-1], self.input_dim])
        cap = self.logit_soft_cap
        return logits if cap is None else tf.tanh(logits / cap) * cap

    def compute_output_spec(self, inputs: keras.KerasTensor, reverse: bool = False) -> keras.KerasTensor:
        """Returns the symbolic output. Keras would give it the compute dtype also in reverse."""
        spec = super().compute_output_spec(inputs, reverse)
        return keras.KerasTensor(spec.shape, dtype=self._logits_dtype()) if reverse else spec

    def _logits_dtype(self) -> str:
        return str(keras.backend.result_type(self.compute_dtype, "float32"))


def twin_for_keras_hub() -> "tuple[type, type] | None":
    """Returns KerasHub's own `ReversibleEmbedding` and its twin; None if KerasHub is not imported or has no such class.

    KerasHub's models use it in place of Keras's.
    """
    hub = getattr(sys.modules.get("keras_hub"), "layers", None)
    stock = getattr(hub, "ReversibleEmbedding", keras.layers.ReversibleEmbedding)
    return None if stock is keras.layers.ReversibleEmbedding else (stock, _twin(stock))


@functools.cache
def _twin(stock: type) -> type:
    members = {"__doc__": ReversibleEmbedding.__doc__, "__module__": __name__}
    twin = type("ReversibleEmbedding", (ReversibleEmbedding, stock), members)
    return keras.saving.register_keras_serializable("keras_mp", "KerasHubReversibleEmbedding")(twin)


def _stored(weight: "keras.Variable | tf.Tensor") -> "tf.Variable | tf.Tensor":
    return keras_variables.uncast(weight) if isinstance(weight, keras.Variable) else weight
