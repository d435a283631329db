"""Attention with queries and keys in blocks, so that memory grows linearly with the length.

Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021, https://arxiv.org/abs/2112.05682; Dao et al.,
"FlashAttention", 2022, https://arxiv.org/abs/2205.14135. The running maximum and sum of each row are kept, the
sum as its logarithm: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
https://arxiv.org/abs/1805.02867. The output of each block is normalized before it is added, so that no sum of values
leaves float16.

Shapes are written as in `dot_product`.
"""

import functools
from typing import Any

import tensorflow as tf

from keras_mp.ops import fusion
from keras_mp.ops.attention.float_range import wide_dtype
from keras_mp.ops.attention.heads import size_of
from keras_mp.ops.attention.masks import Settings
from keras_mp.ops.attention.probabilities import backward_of, forward_of
from keras_mp.ops.attention.products import gathered, products, weighted

__all__ = ["in_blocks"]

# On two CPU cores, blocks of 512 were as fast as any from 256 to 2048.
BLOCK = 512


def in_blocks(q: Any, k: Any, v: Any, hides: dict[str, Any], settings: Settings, fused: bool) -> tuple[Any, Any]:
    """Queries and keys in blocks; keeps q, k, v, the output and one number a row."""

    @fusion.custom_gradient
    def attention(q: Any, k: Any, v: Any) -> Any:
        blocks = _Blocks(q, k, v, hides, settings)
        outputs, log_sums = _blocks_forward(blocks, fused)

        def gradient(upstream: Any, _: Any) -> Any:
            backward = functools.partial(_blocks_backward, blocks, outputs, log_sums, fused=fused)
            return _no_second_derivative(backward)(upstream)

        return (blocks.joined_queries(outputs, v.shape[-1]), blocks.joined_queries(log_sums, 2)), gradient

    return attention(q, k, v)


def _no_second_derivative(function: Any) -> Any:
    """The function, with a gradient that says why there is none: what the forward pass kept would count as constant."""

    @fusion.custom_gradient
    def first(upstream: Any) -> Any:
        def second(*_: Any) -> Any:
            raise NotImplementedError(
                "Attention in blocks has no second derivative. For a gradient of gradients, as in a gradient penalty, "
                "pass flash_attention=False to the attention layer."
            )

        return function(upstream), second

    return first


class _Blocks:
    """q, k, v and the masks cut into blocks, with the blocks in front: (blocks, B, G, ...)."""

    def __init__(self, q: Any, k: Any, v: Any, hides: dict[str, Any], settings: Settings) -> None:
        self.settings = settings
        self.query_shape, self.key_shape = q.shape, k.shape
        self.length, self.keys = size_of(q, 3), size_of(k, 2)
        self.rows, self.columns = (_smaller(BLOCK, length) for length in (self.length, self.keys))
        self.q = self.of_queries(q)
        self.k, self.v = self.of_keys(k), self.of_keys(v)
        self.row_blocks, self.column_blocks = size_of(self.q, 0), size_of(self.k, 0)
        self.hides = hides
        self.padded = not isinstance(self.keys, int) or self.keys % self.columns != 0
        self.key_mask = self.pair_mask = None
        if "key_mask" in hides:
            self.key_mask = _cut(hides["key_mask"], 4, self.columns)
        if "pair_mask" in hides:
            mask = hides["pair_mask"]
            if mask.shape[3] is None:
                mask = tf.broadcast_to(mask, tf.concat([tf.shape(mask)[:3], [self.length], tf.shape(mask)[4:]], 0))
            self.pair_mask = _cut(mask, 3, self.rows) if mask.shape[3] != 1 else mask[None]

    def of_queries(self, x: Any) -> Any:
        """(B, G, R, T, D) to (row blocks, B, G, R, P, D)."""
        return _cut(x, 3, self.rows)

    def of_keys(self, x: Any) -> Any:
        """(B, G, S, D) to (column blocks, B, G, Q, D)."""
        return _cut(x, 2, self.columns)

    def joined_queries(self, x: Any, features: int) -> Any:
        """Back from `of_queries`."""
        return fusion.shaped(_join(x, 3, self.length), [*self.query_shape[:-1], features])

    def joined_keys(self, x: Any, features: int) -> Any:
        """Back from `of_keys`."""
        return fusion.shaped(_join(x, 2, self.keys), [*self.key_shape[:-1], features])

    def columns_seen(self, row: Any) -> tuple[Any, Any]:
        """The first block of keys that a block of queries may see, and the one after the last."""
        first, last = 0, self.column_blocks
        window, first_row = self.settings.window, row * self.rows
        last_row = first_row + self.rows - 1
        if self.settings.causal:
            last = tf.minimum(last, last_row // self.columns + 1)
        if window is not None:
            first = tf.maximum(0, first_row - window + 1) // self.columns
            last = tf.minimum(last, (last_row + window - 1) // self.columns + 1)
        return tf.convert_to_tensor(first), tf.convert_to_tensor(last)

    def given(self, row: Any, column: Any) -> dict[str, Any]:
        """What the functions of a block need to know of the block in this row and column."""
        given = {"first_row": row * self.rows, "first_column": column * self.columns}
        if self.padded:
            given["length"] = tf.convert_to_tensor(self.keys)
        if self.key_mask is not None:
            given["key_mask"] = self.key_mask[column]
        if self.pair_mask is not None:
            block = self.pair_mask[tf.minimum(row, tf.shape(self.pair_mask)[0] - 1)]
            given["pair_mask"] = _slice_last(block, column * self.columns, self.columns)
        if "seed" in self.hides:
            given["seed"] = tf.random.experimental.stateless_fold_in(
                self.hides["seed"], row * self.column_blocks + column
            )
        return given


def _blocks_forward(blocks: _Blocks, fused: bool) -> tuple[Any, Any]:
    """The output, (row blocks, B, G, R, P, D), and the logarithm of each row's sum, (row blocks, B, G, R, P, 1)."""
    wide = wide_dtype(blocks.q.dtype)
    shape = tf.concat([tf.shape(blocks.q)[:-1], tf.shape(blocks.v)[-1:]], 0)
    forward = forward_of(fused)

    def one_row(row: Any, outputs: Any, log_sums: Any) -> Any:
        q = _exact(blocks.q[row])

        def one_block(column: Any, output: Any, sums_before: Any) -> Any:
            k, v = _exact(blocks.k[column]), _exact(blocks.v[column])
            given = blocks.given(row, column)
            p, sums_now = forward(products(q, k), *given.values(), names=tuple(given), settings=blocks.settings)
            share_before, share_now, sums = _joined_sums(sums_before, sums_now)
            return column + 1, output * share_before + tf.cast(weighted(p, v), wide) * share_now, sums

        first, last = blocks.columns_seen(row)
        output = tf.zeros(shape[1:], wide)
        sums = tf.fill(tf.concat([shape[1:-1], [2]], 0), tf.constant(-float("inf"), wide))
        _, output, sums = _loop(one_block, first, last, output, sums)
        return row + 1, _put(outputs, row, tf.cast(output, outputs.dtype)), _put(log_sums, row, sums)

    _, outputs, log_sums = _loop(
        one_row,
        tf.constant(0),
        tf.convert_to_tensor(blocks.row_blocks),
        tf.zeros(shape, blocks.v.dtype),
        tf.zeros(tf.concat([shape[:-1], [2]], 0), wide),
    )
    return outputs, log_sums


def _blocks_backward(blocks: _Blocks, outputs: Any, log_sums: Any, upstream: Any, fused: bool) -> tuple[Any, Any, Any]:
    wide = wide_dtype(blocks.q.dtype)
    pulled = blocks.of_queries(upstream)
    # The average slope of a row, weighted by its probabilities: Dao et al., 2022, appendix B.2.
    averages = tf.reduce_sum(tf.cast(pulled, wide) * tf.cast(outputs, wide), axis=-1, keepdims=True)
    backward = backward_of(fused)

    def one_row(row: Any, to_q: Any, to_k: Any, to_v: Any) -> Any:
        q, g = _exact(blocks.q[row]), _exact(pulled[row])
        of_row = {"log_sums": log_sums[row], "average": averages[row]}

        def one_block(column: Any, to_row: Any, to_k: Any, to_v: Any) -> Any:
            k, v = _exact(blocks.k[column]), _exact(blocks.v[column])
            given = blocks.given(row, column) | of_row
            p, to_products = backward(
                products(q, k), products(g, v), *given.values(), names=tuple(given), settings=blocks.settings
            )
            to_row += tf.cast(weighted(to_products, k), wide)
            to_k = _add(to_k, column, tf.cast(gathered(to_products, q), wide))
            to_v = _add(to_v, column, tf.cast(gathered(p, g), wide))
            return column + 1, to_row, to_k, to_v

        first, last = blocks.columns_seen(row)
        _, to_row, to_k, to_v = _loop(one_block, first, last, tf.zeros(tf.shape(q), wide), to_k, to_v)
        return row + 1, _put(to_q, row, tf.cast(to_row, to_q.dtype)), to_k, to_v

    _, to_q, to_k, to_v = _loop(
        one_row,
        tf.constant(0),
        tf.convert_to_tensor(blocks.row_blocks),
        tf.zeros_like(blocks.q),
        tf.zeros(tf.shape(blocks.k), wide),
        tf.zeros(tf.shape(blocks.v), wide),
    )
    return (
        blocks.joined_queries(to_q, blocks.q.shape[-1]),
        tf.cast(blocks.joined_keys(to_k, blocks.k.shape[-1]), blocks.k.dtype),
        tf.cast(blocks.joined_keys(to_v, blocks.v.shape[-1]), blocks.v.dtype),
    )


def _joined_sums(before: Any, now: Any) -> tuple[Any, Any, Any]:
    """The shares of what was there before and of a block in both together, and the sums of both.

    The sums are those of `_softmax` in `probabilities`: two numbers a row.
    """
    nothing = tf.constant(-float("inf"), before.dtype)
    largest = tf.maximum(
        *(tf.where(tf.equal(sums[..., 1:], nothing), nothing, sums[..., :1]) for sums in (before, now))
    )
    largest = tf.where(tf.equal(largest, nothing), tf.zeros_like(largest), largest)
    parts = [tf.exp((sums[..., :1] - largest) + sums[..., 1:]) for sums in (before, now)]
    total = parts[0] + parts[1]
    inverse = 1.0 / tf.where(tf.equal(total, 0.0), tf.ones_like(total), total)
    return parts[0] * inverse, parts[1] * inverse, tf.concat([largest, tf.math.log(total)], -1)


def _exact(x: Any) -> Any:
    """A block in a dtype whose range no product leaves, nor a sum of some blocks that others would cancel."""
    return tf.cast(x, tf.float32) if x.dtype == tf.float16 else x


def _loop(body: Any, first: Any, last: Any, *state: Any) -> Any:
    """Runs `body(index, *state)`, which returns the next index and state; one iteration at a time, to save memory."""
    return tf.while_loop(
        lambda index, *_: index < last,
        body,
        (first, *state),
        shape_invariants=(first.shape, *(tensor.shape for tensor in state)),
        parallel_iterations=1,
    )


def _put(blocks: Any, index: Any, block: Any) -> Any:
    return fusion.shaped(tf.tensor_scatter_nd_update(blocks, [[index]], block[None]), blocks.shape)


def _add(blocks: Any, index: Any, block: Any) -> Any:
    return fusion.shaped(tf.tensor_scatter_nd_add(blocks, [[index]], block[None]), blocks.shape)


def _smaller(block: int, length: Any) -> Any:
    return min(block, length) if isinstance(length, int) else tf.minimum(block, length)


def _cut(x: Any, axis: int, size: Any) -> Any:
    """Pads an axis to a multiple of `size` and cuts it; the blocks come in front."""
    rank, length = x.shape.rank, size_of(x, axis)
    padding = -length % size
    x = tf.pad(x, [[0, padding if a == axis else 0] for a in range(rank)])
    sizes = [size_of(x, a) for a in range(rank)]
    x = tf.reshape(x, [*sizes[:axis], (length + padding) // size, size, *sizes[axis + 1 :]])
    return tf.transpose(x, [axis, *range(axis), *range(axis + 1, rank + 1)])


def _join(x: Any, axis: int, length: Any) -> Any:
    """Back from `_cut`."""
    rank = x.shape.rank - 1
    x = tf.transpose(x, [*range(1, axis + 1), 0, *range(axis + 1, rank + 1)])
    sizes = [size_of(x, a) for a in range(rank + 1)]
    x = tf.reshape(x, [*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]])
    begin, end = [0] * rank, [-1] * rank
    end[axis] = length
    return tf.slice(x, begin, end)


def _slice_last(x: Any, begin: Any, size: Any) -> Any:
    if x.shape[-1] == 1:
        return x
    # Past the end of a mask that is not padded there are only keys that `length` hides.
    columns = tf.minimum(begin + tf.range(size), size_of(x, x.shape.rank - 1) - 1)
    return tf.gather(x, columns, axis=-1)
