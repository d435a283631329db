"""Attention of several heads whose softmax is in float32, and that holds no matrix of scores longer than it has to."""

from typing import Any

import keras

from keras_mp._compat import keras_layer_parts
from keras_mp.layers.attention.checks import check_call, require_steps
from keras_mp.layers.attention.heads import attend_projected, masks_of, project_by_matrices
from keras_mp.layers.softmax import Softmax
from keras_mp.ops.attention.masks import Masks

__all__ = ["MultiHeadAttention"]

# The layer is Keras's with another computation between the projections and the output. Keras has no public names for
# what that needs: `MultiHeadAttention._compute_attention_mask` and `_compute_attention`, which its `call` runs. The
# contract's tests fail when one of them moves.


@keras.saving.register_keras_serializable(package="keras_mp")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """Attention of several heads with half-precision matmuls and float32 softmax, in blocks from 1,024 steps on.

    A drop-in for `keras.layers.MultiHeadAttention`, with the same arguments and weights. A training step keeps the
    probabilities in half precision for its backward pass. From 1,024 queries and keys on, or where the length is not
    known in advance, it holds no matrix of them. Masks of padding and of causality are applied as such, without a
    matrix of pairs. In float16, products of large vectors do not overflow.

    Args:
        num_heads: int, number of attention heads.
        key_dim: int, size of each head for query and key.
        value_dim: int, size of each head for value. Defaults to `key_dim`.
        dropout: float, share of the probabilities to drop. Defaults to 0.0.
        use_bias: bool, whether the projections add biases. Defaults to True.
        output_shape: int or tuple of ints, the last axes of the output. Defaults to the query's last axis.
        attention_axes: tuple of ints, the axes to attend over. Defaults to all but the batch and the features. Over
            several axes the matrix of scores is held as a whole.
        flash_attention: bool, whether to compute in blocks: True always, False never, None from 1,024 steps on.
            Defaults to None. Blocks allow dropout here, but no second derivatives.
        **kwargs: `sliding_window`, `use_gate`, `seed` (with and without XLA it drops others), the initializers,
            regularizers and constraints of Keras's layer, `name` and `dtype`.

    Call arguments:
        query: tensor of shape `(B, T, dim)`.
        value: tensor of shape `(B, S, dim)`.
        key: tensor of shape `(B, S, dim)`. Defaults to `value`.
        query_mask, value_mask, key_mask: bool, of shape `(B, T)` or `(B, S)`, False for padding; Keras passes the masks
            of the tensors.
        attention_mask: bool, of shape `(B, T, S)` or `(B, num_heads, T, S)`, or broadcastable to it; False hides a key.
        return_attention_scores: bool, whether to return the probabilities as well, `(B, num_heads, T, S)`.
        training: bool, whether to drop.
        use_causal_mask: bool, whether each query sees only keys up to its own position.

    Returns:
        Tensor of shape `(B, T, output_shape)` in the compute dtype, and the probabilities if asked for. A query that
        sees no key gets what Keras's layer gives it in float32: the mean of all values, or zeros where dropout is set
        or the scores are returned.

    Raises:
        ValueError: if an argument is invalid, the masks do not fit, or scores are asked for with
            `flash_attention=True`.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.MultiHeadAttention(num_heads=2, key_dim=4, dtype="mixed_bfloat16")
        >>> x = np.ones((1, 8, 16), "float32")
        >>> layer(x, x, use_causal_mask=True).shape
        TensorShape([1, 8, 16])

    Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762; in blocks: Dao et al.,
    "FlashAttention", 2022, https://arxiv.org/abs/2205.14135.
    """

    def __init__(self, num_heads: int, key_dim: int, *args: Any, flash_attention: bool | None = None, **kwargs: Any):
        super().__init__(num_heads, key_dim, *args, **kwargs)
        self.flash_attention = flash_attention

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Creates the projections."""
        require_steps(self, query_shape, value_shape)
        super().build(query_shape, value_shape, key_shape)
        project_by_matrices(self)
        # For attention over several axes, which Keras's own computation does.
        axes = range(-len(self.attention_axes), 0)
        self._softmax = Softmax(axis=list(axes), dtype=self.dtype_policy)

    def compute_output_spec(self, query: Any, value: Any, key: Any = None, **kwargs: Any) -> Any:
        """The output as a symbolic tensor."""
        check_call(self, query, value, self.num_heads, kwargs)
        return super().compute_output_spec(query, value, key, **kwargs)

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        # Keras fills in the masks of the tensors where it sees these names.
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Attends; see the class for the arguments."""
        masks = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask}
        given = {"attention_mask": attention_mask, "return_attention_scores": return_attention_scores}
        check_call(self, query, value, self.num_heads, masks | given)
        return super().call(
            query,
            value,
            key,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "flash_attention": self.flash_attention}

    def _compute_attention_mask(self, query: Any, value: Any, **masks: Any) -> Any:
        """What hides keys, for `_compute_attention`: parts rather than a matrix of pairs, where that can be."""
        if len(query.shape) != 3:
            return super()._compute_attention_mask(query, value, **masks)
        return masks_of(keras_layer_parts.head_settings(self)[0], **masks)

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Attends with projected query, key and value, of shape (B, T or S, heads, features)."""
        if not isinstance(attention_mask, Masks):
            return super()._compute_attention(
                query, key, value, attention_mask, training, return_attention_scores, **kwargs
            )
        _, scale, dropout = keras_layer_parts.head_settings(self)
        return attend_projected(
            self,
            query,
            key,
            value,
            attention_mask,
            scale=scale,
            dropout=dropout,
            training=training,
            return_attention_scores=return_attention_scores,
        )
