"""Attention layers whose softmax is in float32 and whose memory holds no matrix of scores longer than it has to."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layer_parts, keras_layers
from keras_mp.errors import ArgumentError
from keras_mp.layers.core.dense import EinsumDense
from keras_mp.layers.softmax import Softmax
from keras_mp.ops import fusion
from keras_mp.ops.attention.dot_product import Masks, attend, attend_with_scores, wide_dtype
from keras_mp.ops.noise import dropped

__all__ = ["AdditiveAttention", "Attention", "GroupedQueryAttention", "MultiHeadAttention"]

# The layers here are Keras's with another computation between the projections and the output. Keras has no public names
# for what that needs: `MultiHeadAttention._compute_attention_mask` and `_compute_attention`, which its `call` runs, and
# the projections and settings of `GroupedQueryAttention`. The contract's tests fail when one of them moves.


@keras.saving.register_keras_serializable(package="keras_mp")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """Attention of several heads with 16-bit products and float32 softmax, in blocks from 1,024 steps on.

    A drop-in for `keras.layers.MultiHeadAttention`, with the same arguments and weights. A training step keeps the
    probabilities in 16 bits for its backward pass; from 1,024 queries and keys on, or where the length is not known in
    advance, it holds no matrix of them. Masks of padding and of causality are applied as such, without a matrix of
    pairs. In float16, products of large vectors do not overflow.

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
        return_attention_scores: bool, whether to answer the probabilities as well, `(B, num_heads, T, S)`.
        training: bool, whether to drop.
        use_causal_mask: bool, whether each query sees only keys up to its own position.

    Returns:
        Tensor of shape `(B, T, output_shape)` in the compute dtype, and the probabilities if asked for. A query that
        sees no key gets what Keras's layer gives it in float32: the mean of all values, or zeros where dropout is set
        or the scores are answered.

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
        _require_steps(self, query_shape, value_shape)
        super().build(query_shape, value_shape, key_shape)
        _project_by_matrices(self)
        # For attention over several axes, which Keras's own computation does.
        axes = range(-len(self.attention_axes), 0)
        self._softmax = Softmax(axis=list(axes), dtype=self.dtype_policy)

    def compute_output_spec(self, query: Any, value: Any, key: Any = None, **kwargs: Any) -> Any:
        """The output as a symbolic tensor."""
        _check_call(self, query, value, self.num_heads, kwargs)
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
        _check_call(self, query, value, self.num_heads, masks | given)
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
        return _masks(keras_layer_parts.head_settings(self)[0], **masks)

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
        return _attend(
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
        return_attention_scores: bool, whether to answer the probabilities as well, `(B, num_query_heads, T, S)`.
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
        _require_steps(self, query_shape, value_shape)
        super().build(query_shape, value_shape, key_shape)
        _project_by_matrices(self)

    def compute_output_spec(self, query: Any, value: Any, key: Any = None, **kwargs: Any) -> Any:
        """The output as a symbolic tensor."""
        self.compute_output_shape(query.shape, value.shape, None if key is None else key.shape)
        _check_call(self, query, value, self.num_query_heads, kwargs)
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
        _check_call(self, query, value, self.num_query_heads, masks | given)
        # Without the masks that the tensors carry, which the projections would complain of.
        query, value = tf.identity(query), tf.identity(value)
        key = value if key is None else tf.identity(key)
        parts = keras_layer_parts.projections(self)
        outputs, scores = _attend(
            self,
            parts.query(query),
            parts.key(key),
            parts.value(value),
            _masks(
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


def _require_steps(layer: keras.Layer, query_shape: Any, value_shape: Any) -> None:
    """Refuses tensors without an axis of steps, at which Keras fails over an axis that it makes itself."""
    if min(len(query_shape), len(value_shape)) < 3:
        raise ArgumentError(
            f"`{type(layer).__name__}` takes tensors of shape (batch, steps, features). Received: "
            f"query.shape={tuple(query_shape)}, value.shape={tuple(value_shape)}. For a single text type x[None]."
        )


def _project_by_matrices(layer: keras.Layer) -> None:
    """Lets the projections, which Keras makes itself and gives no way to choose, compute as `EinsumDense` here."""
    for projection in keras_layers.inner_layers(layer):
        if type(projection) is keras.layers.EinsumDense:
            projection.__class__ = EinsumDense


class _SoftmaxOfScores(keras.layers.Layer):
    """What the two layers share that are called on a list: scores to probabilities to outputs, in float32."""

    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """Attends with the whole matrix of scores, as Keras's layer does."""
        self._validate_inputs(inputs=inputs, mask=mask)
        answer = super().call(
            self._in_one_dtype(inputs),
            mask=mask,
            training=training,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
        )
        return keras.tree.map_structure(lambda x: tf.cast(x, self.compute_dtype), answer)

    def compute_output_spec(self, inputs: Any, mask: Any = None, **kwargs: Any) -> Any:
        """The output as a symbolic tensor."""
        self._validate_inputs(inputs, mask)
        return super().compute_output_spec(inputs, mask, **kwargs)

    def _validate_inputs(self, inputs: Any, mask: Any = None) -> None:
        super()._validate_inputs(inputs, mask)
        for name, x, each in zip(("query_mask", "value_mask"), inputs, mask or [], strict=False):
            _check_mask(self, name, each, tuple(x.shape[:-1]), (len(x.shape) - 1,), "(batch, steps)")

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The query's shape with the value's features."""
        return (*input_shape[0][:-1], input_shape[1][-1])

    def _in_one_dtype(self, inputs: Any) -> list[Any]:
        dtype = keras.backend.result_type(*(x.dtype for x in inputs), self.compute_dtype)
        return [tf.cast(x, dtype) for x in inputs]

    def _apply_scores(self, scores: Any, value: Any, scores_mask: Any = None, training: bool = False) -> Any:
        if scores_mask is not None:
            scores_mask = tf.cast(scores_mask, tf.bool)
            scores_mask = scores_mask[:, None, :] if len(scores_mask.shape) == 2 else scores_mask
        dtype = value.dtype
        if dtype == tf.float16:  # whose gradient to the weights is a product that may leave float16
            scores, value = tf.cast(scores, tf.float32), tf.cast(value, tf.float32)
        weights = Softmax(dtype=keras.backend.standardize_dtype(scores.dtype))(scores, mask=scores_mask)
        if scores_mask is not None:
            seen = tf.reduce_any(scores_mask, axis=-1, keepdims=True)
            even = tf.cast(1.0 / tf.cast(tf.shape(scores)[-1], wide_dtype(scores.dtype)), weights.dtype)
            weights = tf.where(seen, weights, even)
        if training and self.dropout > 0:
            weights = dropped(weights, self.dropout, self.seed_generator)
        return tf.cast(tf.matmul(weights, value), dtype), tf.cast(weights, dtype)


@keras.saving.register_keras_serializable(package="keras_mp")
class Attention(_SoftmaxOfScores, keras.layers.Attention):
    """Dot-product attention, Luong-style, whose softmax is in float32 and finite where all keys are masked.

    A drop-in for `keras.layers.Attention`, with the same arguments and weights. Inputs are not cast down to the compute
    dtype first. With `score_mode="dot"` it computes in blocks from 1,024 steps on, as `MultiHeadAttention` here.

    Args:
        use_scale: bool, whether to multiply the scores by a trained number. Defaults to False.
        score_mode: "dot", or "concat" for sums of tanh(query + key). Defaults to "dot".
        dropout: float, share of the probabilities to drop. Defaults to 0.0.
        seed: int, of the dropout. Defaults to None.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: list of a query `(B, Tq, dim)`, a value `(B, Tv, dim)` and, if it is not the value, a key
            `(B, Tv, dim)`.
        mask: list of masks of the same, bool, `(B, Tq)` and `(B, Tv)`, or None.
        training: bool, whether to drop.
        return_attention_scores: bool, whether to answer the probabilities `(B, Tq, Tv)` as well.
        use_causal_mask: bool, whether each query sees only keys up to its own position.

    Returns:
        Tensor of shape `(B, Tq, dim)` in the compute dtype, zero where the query is masked, and the probabilities if
        asked for. A query that sees no key gets the mean of all values.

    Raises:
        ValueError: if the inputs or masks are not lists of two or three, or a mask does not fit.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Attention(dtype="mixed_float16")
        >>> x = np.ones((1, 3, 2), "float16")
        >>> layer([x, x], mask=[None, np.zeros((1, 3), bool)]).numpy().tolist()  # all masked
        [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]]

    Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015,
    https://arxiv.org/abs/1508.04025.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def build(self, input_shape: Any) -> None:
        """Creates the trained numbers, which Keras would cast down in a mixed policy."""
        self._validate_inputs(input_shape)
        self.scale = self.concat_score_weight = None
        if self.use_scale:
            self.scale = self.add_weight(name="scale", shape=(), initializer="ones", autocast=False)
        if self.score_mode == "concat":
            self.concat_score_weight = self.add_weight(
                name="concat_score_weight", shape=(), initializer="ones", autocast=False
            )

    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: bool = False,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """Attends; see the class for the arguments."""
        self._validate_inputs(inputs=inputs, mask=mask)
        if self.score_mode != "dot" or len(inputs[0].shape) != 3:
            return super().call(inputs, mask, training, return_attention_scores, use_causal_mask)
        inputs = self._in_one_dtype(inputs)
        dtype = inputs[0].dtype
        query, value = inputs[:2]
        key = inputs[2] if len(inputs) > 2 else value
        query_mask, value_mask = (mask[0], mask[1]) if mask else (None, None)
        if self.scale is not None:
            query = tf.cast(tf.cast(self.scale, wide_dtype(dtype)) * tf.cast(query, wide_dtype(dtype)), dtype)
        rate = float(self.dropout) if training else 0.0
        arguments: dict[str, Any] = {
            "scale": 1.0,
            "rate": rate,
            "seed": tf.cast(self.seed_generator.next(), tf.int32) if rate else None,
            "hidden_rows_average": True,
        }
        masks = Masks(causal=use_causal_mask, key=None if value_mask is None else tf.cast(value_mask, tf.bool))
        query, key, value = (x[:, :, None, :] for x in (query, key, value))
        scores = None
        if return_attention_scores:
            outputs, scores = attend_with_scores(query, key, value, masks, scores_after_dropout=True, **arguments)
            scores = tf.cast(scores[:, 0], self.compute_dtype)
        else:
            outputs = attend(query, key, value, masks, **arguments)
        outputs = tf.cast(outputs[:, :, 0, :], self.compute_dtype)
        if query_mask is not None:
            outputs = tf.where(tf.cast(query_mask, tf.bool)[..., None], outputs, tf.zeros([], outputs.dtype))
        return (outputs, scores) if return_attention_scores else outputs

    def _calculate_scores(self, query: Any, key: Any) -> Any:
        if self.score_mode == "dot":
            if query.dtype == tf.float16:
                query, key = tf.cast(query, tf.float32), tf.cast(key, tf.float32)
            scores = tf.matmul(query, key, transpose_b=True)
            return scores if self.scale is None else scores * tf.cast(self.scale, scores.dtype)
        scale = tf.ones([1]) if self.scale is None else tf.reshape(self.scale, [1])
        ones = tf.ones([query.shape[-1]], wide_dtype(query.dtype))
        weight = tf.cast(self.concat_score_weight, ones.dtype) * ones
        return _additive_scores(query, key, tf.cast(scale, ones.dtype), weight)


@keras.saving.register_keras_serializable(package="keras_mp")
class AdditiveAttention(_SoftmaxOfScores, keras.layers.AdditiveAttention):
    """Additive attention, Bahdanau-style, summed and normalized in float32.

    A drop-in for `keras.layers.AdditiveAttention`, with the same arguments and weights. In a training step the sums of
    tanh(query + key) are computed in one pass, and again in the backward pass, so that no tensor of shape
    `(B, Tq, Tv, dim)` is held; the scores `(B, Tq, Tv)` are, in 16 bits.

    Args:
        use_scale: bool, whether to weigh the features. Defaults to True.
        dropout: float, share of the probabilities to drop. Defaults to 0.0.
        **kwargs: `seed`, `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: list of a query `(B, Tq, dim)`, a value `(B, Tv, dim)` and, if it is not the value, a key
            `(B, Tv, dim)`.
        mask: list of masks of the same, bool, `(B, Tq)` and `(B, Tv)`, or None.
        training: bool, whether to drop.
        return_attention_scores: bool, whether to answer the probabilities `(B, Tq, Tv)` as well.
        use_causal_mask: bool, whether each query sees only keys up to its own position.

    Returns:
        Tensor of shape `(B, Tq, dim)` in the compute dtype, and the probabilities if asked for.

    Raises:
        ValueError: if the inputs or masks are not lists of two or three, or a mask does not fit.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.AdditiveAttention(dtype="mixed_bfloat16")
        >>> layer([np.ones((1, 3, 2), "float32"), np.ones((1, 4, 2), "float32")]).shape
        TensorShape([1, 3, 2])

    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2014,
    https://arxiv.org/abs/1409.0473.
    """

    def __init__(self, use_scale: bool = True, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(use_scale=use_scale, dropout=dropout, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def build(self, input_shape: Any) -> None:
        """Creates the weights of the features."""
        self._validate_inputs(input_shape)
        self.scale = None
        if self.use_scale:
            self.scale = self.add_weight(
                name="scale", shape=[input_shape[0][-1]], initializer="glorot_uniform", autocast=False
            )

    def _calculate_scores(self, query: Any, key: Any) -> Any:
        wide = wide_dtype(query.dtype)
        weight = tf.ones([query.shape[-1]], wide) if self.scale is None else tf.cast(self.scale, wide)
        return _additive_scores(query, key, tf.ones([1], wide), weight)


def _tanh_of_sums(query: Any, key: Any, scale: Any) -> Any:
    """Of shape (B, Tq, Tv, dim)."""
    return tf.tanh(scale * (tf.cast(query, scale.dtype)[..., :, None, :] + tf.cast(key, scale.dtype)[..., None, :, :]))


def _additive_scores_forward(query: Any, key: Any, scale: Any, weight: Any) -> Any:
    tanh = _tanh_of_sums(query, key, scale)
    return tf.cast(tf.squeeze(fusion.total(weight * tanh, (tanh.shape.rank - 1,)), -1), query.dtype)


def _additive_scores_backward(query: Any, key: Any, scale: Any, weight: Any, upstream: Any) -> list[Any]:
    tanh = _tanh_of_sums(query, key, scale)
    g = tf.cast(upstream, scale.dtype)[..., None]
    slope = g * weight * (1.0 - tf.square(tanh))
    keys = tanh.shape.rank - 2
    to_query = tf.squeeze(fusion.total(slope, (keys,)), keys)
    to_key = tf.reduce_sum(slope, keys - 1)
    # What the scale multiplies is the query and the key: no third sum over all pairs.
    to_scale = sum(tf.reduce_sum(tf.cast(x, slope.dtype) * to_x) for x, to_x in ((query, to_query), (key, to_key)))
    to_weight = tf.reduce_sum(fusion.total(g * tanh, (keys,)), list(range(keys + 1)))
    return [
        tf.cast(scale * to_query, query.dtype),
        tf.cast(scale * to_key, key.dtype),
        tf.reshape(to_scale, [1]),
        to_weight,
    ]


# sum over d of weight_d * tanh(scale * (query_d + key_d)), for each pair.
_additive_scores = fusion.operation(_additive_scores_forward, _additive_scores_backward)


def _masks(
    window: int | None,
    *,
    query_mask: Any = None,
    value_mask: Any = None,
    key_mask: Any = None,
    attention_mask: Any = None,
    use_causal_mask: bool = False,
) -> Masks:
    """The arguments of a call as `Masks`."""
    query_mask, value_mask, key_mask, pairs = (
        None if mask is None else tf.cast(mask, tf.bool) for mask in (query_mask, value_mask, key_mask, attention_mask)
    )
    if pairs is not None:
        while len(pairs.shape) < 4:
            pairs = pairs[..., None, :, :]
    if value_mask is not None and key_mask is not None:
        key_mask &= value_mask
    return Masks(use_causal_mask, window, query_mask, value_mask if key_mask is None else key_mask, pairs)


def _check_call(layer: Any, query: Any, value: Any, heads: int, call: dict[str, Any]) -> None:
    """Raises Keras's kinds of errors where masks do not fit or blocks are asked for scores."""
    if layer.flash_attention and call.get("return_attention_scores"):
        raise ValueError(
            "Returning attention scores is not supported when flash attention is enabled. Please disable flash "
            "attention to access attention scores."
        )
    if len(query.shape) != 3:
        return
    batch, steps, keys = query.shape[0], query.shape[1], value.shape[1]
    for name, length in (("query_mask", steps), ("value_mask", keys), ("key_mask", keys)):
        _check_mask(layer, name, call.get(name), (batch, length), (2,), "(batch, steps)")
    words = "(batch, queries, keys) or (batch, heads, queries, keys)"
    _check_mask(layer, "attention_mask", call.get("attention_mask"), (batch, heads, steps, keys), (2, 3, 4), words)


def _check_mask(
    layer: Any, name: str, mask: Any, full: tuple[int | None, ...], ranks: Sequence[int], words: str
) -> None:
    """Raises Keras's kind of error for a mask that is none, or does not broadcast to the shape `full`, in `words`."""
    if mask is None:
        return
    mask = mask if hasattr(mask, "shape") else np.asarray(mask)
    shape, kind = tuple(mask.shape), type(layer).__name__
    if "string" in str(mask.dtype) or "<U" in str(mask.dtype):
        raise TypeError(f"The `{name}` of {kind} must be boolean. Received: {name}.dtype={mask.dtype} (string)")
    aligned = (shape[0], None, *shape[1:]) if len(shape) == 3 and len(full) == 4 else shape
    if len(shape) in ranks and all(
        given in (None, 1) or expected is None or given == expected
        for given, expected in zip(aligned[::-1], full[::-1], strict=False)
    ):
        return
    raise ValueError(
        f"The `{name}` of {kind} must be broadcastable to {words}, here {full}. Received: {name}.shape={shape}"
    )


def _attend(
    layer: Any,
    query: Any,
    key: Any,
    value: Any,
    masks: Masks,
    *,
    scale: float,
    dropout: float,
    training: bool | None,
    return_attention_scores: bool,
) -> tuple[Any, Any]:
    """What the two layers of several heads do with projected query, key and value."""
    rate = float(dropout) if training else 0.0
    seed = tf.cast(keras_layer_parts.dropout_seed(layer), tf.int32) if rate else None
    if return_attention_scores:
        return attend_with_scores(query, key, value, masks, scale=scale, rate=rate, seed=seed)
    outputs = attend(
        query,
        key,
        value,
        masks,
        scale=scale,
        rate=rate,
        seed=seed,
        blockwise=layer.flash_attention,
        hidden_rows_average=not dropout,
    )
    return outputs, None
