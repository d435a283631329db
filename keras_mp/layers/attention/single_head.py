"""The attention layers that are called on a list, without projections, whose softmax is in float32."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp.layers.attention.checks import check_mask
from keras_mp.layers.softmax import Softmax
from keras_mp.ops.attention.additive import additive_scores
from keras_mp.ops.attention.dot_product import attend, attend_with_scores
from keras_mp.ops.attention.float_range import wide_dtype
from keras_mp.ops.attention.masks import Masks
from keras_mp.ops.noise import dropped

__all__ = ["AdditiveAttention", "Attention"]


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
            check_mask(self, name, each, tuple(x.shape[:-1]), (len(x.shape) - 1,), "(batch, steps)")

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
        return_attention_scores: bool, whether to return the probabilities `(B, Tq, Tv)` as well.
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
        return additive_scores(query, key, tf.cast(scale, ones.dtype), weight)


@keras.saving.register_keras_serializable(package="keras_mp")
class AdditiveAttention(_SoftmaxOfScores, keras.layers.AdditiveAttention):
    """Additive attention, Bahdanau-style, summed and normalized in float32.

    A drop-in for `keras.layers.AdditiveAttention`, with the same arguments and weights. In a training step the sums of
    tanh(query + key) are computed in one pass, and again in the backward pass, so that no tensor of shape
    `(B, Tq, Tv, dim)` is held. The scores `(B, Tq, Tv)` are held, in half precision.

    Args:
        use_scale: bool, whether to weigh the features. Defaults to True.
        dropout: float, share of the probabilities to drop. Defaults to 0.0.
        **kwargs: `seed`, `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: list of a query `(B, Tq, dim)`, a value `(B, Tv, dim)` and, if it is not the value, a key
            `(B, Tv, dim)`.
        mask: list of masks of the same, bool, `(B, Tq)` and `(B, Tv)`, or None.
        training: bool, whether to drop.
        return_attention_scores: bool, whether to return the probabilities `(B, Tq, Tv)` as well.
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
        return additive_scores(query, key, tf.ones([1], wide), weight)
