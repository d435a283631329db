"""Attention of several heads that share keys and values in groups, with the softmax in float32."""

import math
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layer_parts
from keras_mp.layers.attention.checks import check_call, require_steps
from keras_mp.layers.attention.heads import attend_projected, masks_of, project_by_matrices

__all__ = ["GroupedQueryAttention"]

# Of Keras's layer, the projections and settings have no public names. The contract's tests fail when one of them moves.


@keras.saving.register_keras_serializable(package="keras_mp")
class GroupedQueryAttention(keras.layers.GroupQueryAttention):
    """Grouped-query attention, as `MultiHeadAttention` here, whose keys and values are not repeated for each head.

    A drop-in for `keras.layers.GroupQueryAttention`, the public name of Keras's class `GroupedQueryAttention`, with the
    same arguments and weights.

    Args:
        head_dim: int, size of each head.
        num_query_heads: int, number of query heads.
        num_key_value_heads: int, number of key and value heads; divides `num_query_heads`.
        dropout: float, share of the probabilities to drop. Defaults to 0.0.
        use_bias: bool, whether the projections add biases. Defaults to True.
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
        attention_mask: bool, of shape `(B, T, S)` or `(B, num_query_heads, T, S)`, or broadcastable to it.
        return_attention_scores: bool, whether to return the probabilities as well, `(B, num_query_heads, T, S)`.
        training: bool, whether to drop.
        use_causal_mask: bool, whether each query sees only keys up to its own position.

    Returns:
        Tensor of shape `(B, T, dim)` in the compute dtype, and the probabilities if asked for.

    Raises:
        ValueError: if the numbers of heads do not divide, the masks do not fit, or scores are asked for with
            `flash_attention=True`.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.GroupedQueryAttention(4, num_query_heads=4, num_key_value_heads=2)
        >>> x = np.ones((1, 8, 16), "float32")
        >>> layer(x, x).shape
        TensorShape([1, 8, 16])

    Ainslie et al., "GQA", 2023, https://arxiv.org/abs/2305.13245.
    """

    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        *args: Any,
        flash_attention: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(head_dim, num_query_heads, num_key_value_heads, *args, **kwargs)
        self.flash_attention = flash_attention

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Creates the projections."""
        require_steps(self, query_shape, value_shape)
        super().build(query_shape, value_shape, key_shape)
        project_by_matrices(self)

    def compute_output_spec(self, query: Any, value: Any, key: Any = None, **kwargs: Any) -> Any:
        """The output as a symbolic tensor."""
        self.compute_output_shape(query.shape, value.shape, None if key is None else key.shape)
        check_call(self, query, value, self.num_query_heads, kwargs)
        return super().compute_output_spec(query, value, key, **kwargs)

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
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
        check_call(self, query, value, self.num_query_heads, masks | given)
        # Without the masks that the tensors carry, which the projections would complain of.
        query, value = tf.identity(query), tf.identity(value)
        key = value if key is None else tf.identity(key)
        parts = keras_layer_parts.projections(self)
        outputs, scores = attend_projected(
            self,
            parts.query(query),
            parts.key(key),
            parts.value(value),
            masks_of(
                self.sliding_window,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                use_causal_mask=use_causal_mask,
            ),
            scale=1.0 / math.sqrt(self.head_dim),
            dropout=self.dropout,
            training=training,
            return_attention_scores=return_attention_scores,
        )
        if parts.gate is not None:
            outputs *= parts.gate(query)
        outputs = parts.output(outputs)
        return (outputs, scores) if return_attention_scores else outputs

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "flash_attention": self.flash_attention}
