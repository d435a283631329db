"""Softmax attention over 16-bit products that keeps one 16-bit matrix for the backward pass, or none.

With one block the probabilities of all pairs are kept in 16 bits for the backward pass. From a length where it pays,
queries and keys are taken in blocks, and memory grows linearly with the length: Rabe and Staats, "Self-attention Does
Not Need O(n^2) Memory", 2021, https://arxiv.org/abs/2112.05682; Dao et al., "FlashAttention", 2022,
https://arxiv.org/abs/2205.14135. The running maximum and sum of each row, from Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018, https://arxiv.org/abs/1805.02867, are kept, the sum as its logarithm, and the
output of each block is normalized before it is added, so that no sum of values leaves float16.

Shapes are written with B batch, G groups of heads that share keys and values, R query heads in each, T queries, S keys,
D features; a block has P queries and Q keys.
"""

import functools
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["Masks", "attend", "attend_with_scores", "wide_dtype"]

# On two CPU cores, blocks of 512 were as fast as any from 256 to 2048, and below 1024 keys one block was faster.
BLOCK = 512
BLOCKWISE_FROM = 1024


class Masks(NamedTuple):
    """Which query sees which key; what is None or False hides nothing.

    Args:
        causal: query i sees keys 0 to i.
        window: query i sees the keys less than so many steps away.
        query: bool, of shape (B, T), False for queries that see nothing.
        key: bool, of shape (B, S), False for keys that nothing sees.
        pairs: bool, broadcastable to (B, heads, T, S).
    """

    causal: bool = False
    window: int | None = None
    query: Any = None
    key: Any = None
    pairs: Any = None

    def may_hide_rows(self) -> bool:
        """Whether there can be a query that sees no key."""
        return self.window is not None or any(mask is not None for mask in (self.query, self.key, self.pairs))


class _Settings(NamedTuple):
    """What the functions of a block need to know besides tensors; hashable, as `tf.function` asks for."""

    scale: float
    causal: bool
    window: int | None
    rate: float


def attend(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    masks: Masks,
    *,
    scale: float,
    rate: float = 0.0,
    seed: Any = None,
    blockwise: bool | None = None,
    hidden_rows_average: bool = True,
) -> tf.Tensor:
    """softmax(scale * query @ key^T) @ value for each head.

    Args:
        query: of shape (B, T, heads, D).
        key: of shape (B, S, groups, D), where the heads are a multiple of the groups; head h reads group
            h // (heads / groups).
        value: of shape (B, S, groups, D of the output).
        masks: which query sees which key.
        scale: what the products are multiplied by.
        rate: share of the probabilities that is dropped.
        seed: int32, of shape (2,); needed where `rate` is not 0.
        blockwise: whether to take queries and keys in blocks; None: where the length is `BLOCKWISE_FROM` or unknown.
        hidden_rows_average: whether a query that sees no key gets the mean of all values, or else zeros.

    Returns:
        Tensor of shape (B, T, heads, D of the output), in the dtype of `value`.
    """
    if blockwise is None:
        lengths = query.shape[1], key.shape[1]
        blockwise = None in lengths or min(lengths) >= BLOCKWISE_FROM
    outputs, seen, _ = _attend(query, key, value, masks, scale, rate, seed, blockwise=blockwise)
    return _join_heads(_without_hidden_rows(outputs, value, seen, hidden_rows_average))


def attend_with_scores(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    masks: Masks,
    *,
    scale: float,
    rate: float = 0.0,
    seed: Any = None,
    hidden_rows_average: bool = False,
    scores_after_dropout: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The same in one block, with the probabilities, of shape (B, heads, T, S), as a second answer."""
    heads = query.shape[2]
    outputs, seen, probabilities = _attend(query, key, value, masks, scale, rate, seed, with_scores=True)
    if seen is not None and hidden_rows_average:
        even = tf.cast(1.0 / tf.cast(tf.shape(probabilities)[-1], wide_dtype(probabilities.dtype)), probabilities.dtype)
        probabilities = tf.where(seen, probabilities, even)
    elif masks.query is not None:
        probabilities = tf.where(seen, probabilities, tf.zeros([], probabilities.dtype))
    if rate and scores_after_dropout:
        # Those that the outputs are without: of one seed, XLA makes other numbers than TensorFlow.
        drop = _dropped_of(fusion.pays(query, key, value))
        probabilities = drop(probabilities, seed, settings=_Settings(scale, False, None, rate))
    outputs = _join_heads(_without_hidden_rows(outputs, value, seen, hidden_rows_average))
    scores = tf.reshape(probabilities, [-1, heads, *(_size(probabilities, axis) for axis in (3, 4))])
    return outputs, fusion.shaped(scores, [query.shape[0], heads, query.shape[1], key.shape[1]])


def _attend(
    query: Any,
    key: Any,
    value: Any,
    masks: Masks,
    scale: float,
    rate: float,
    seed: Any,
    *,
    blockwise: bool = False,
    with_scores: bool = False,
) -> tuple[Any, Any, Any]:
    """The outputs (B, G, R, T, D), whether each query sees a key (None where all do), and the scores or None."""
    heads, groups = query.shape[2], key.shape[2]
    q = _split_heads(query, groups)
    k, v = _swapped(key), _swapped(value)
    settings = _Settings(scale, masks.causal, masks.window, rate)
    hides = {}
    if masks.key is not None:
        hides["key_mask"] = masks.key[:, None, None, None, :]
    if masks.pairs is not None:
        hides["pair_mask"] = _split_mask(masks.pairs, heads, groups)
    if rate:
        hides["seed"] = seed
    run = _in_blocks if blockwise else functools.partial(_at_once, with_scores=with_scores)
    outputs, log_sums, *scores = run(q, k, v, hides, settings, fusion.pays(query, key, value))
    seen = None
    if masks.may_hide_rows():
        seen = tf.not_equal(log_sums[..., 1:], -float("inf"))
        if masks.query is not None:
            seen &= masks.query[:, None, None, :, None]
    return outputs, seen, scores[0] if scores else None


def _without_hidden_rows(outputs: Any, value: Any, seen: Any, average: bool) -> Any:
    """The outputs with the mean of all values, or zeros, for queries that see no key."""
    if seen is None:
        return outputs
    filling = tf.zeros([], outputs.dtype)
    if average:
        filling = tf.cast(tf.reduce_mean(tf.cast(value, wide_dtype(value.dtype)), axis=1), outputs.dtype)[
            :, :, None, None, :
        ]
    return tf.where(seen, outputs, filling)


# --- heads ----------------------------------------------------------------------------------------------------------


def _swapped(x: Any) -> Any:
    """(B, T, N, D) to (B, N, T, D), and back."""
    if 1 in (x.shape[1], x.shape[2]):  # nothing changes its place
        shape = [_size(x, axis) for axis in (0, 2, 1, 3)]
        return fusion.shaped(tf.reshape(x, shape), [x.shape[axis] for axis in (0, 2, 1, 3)])
    return tf.transpose(x, [0, 2, 1, 3])


def _split_heads(query: Any, groups: int) -> Any:
    """(B, T, heads, D) to (B, G, R, T, D)."""
    x = _swapped(query)
    shape = [_size(x, 0), groups, x.shape[1] // groups, _size(x, 2), x.shape[3]]
    return fusion.shaped(tf.reshape(x, shape), [x.shape[0], *shape[1:3], x.shape[2], x.shape[3]])


def _join_heads(outputs: Any) -> Any:
    """(B, G, R, T, D) to (B, T, heads, D)."""
    _, groups, repeats, length, features = outputs.shape
    shape = [_size(outputs, 0), groups * repeats, _size(outputs, 3), _size(outputs, 4)]
    x = fusion.shaped(tf.reshape(outputs, shape), [outputs.shape[0], groups * repeats, length, features])
    return _swapped(x)


def _split_mask(mask: Any, heads: int, groups: int) -> Any:
    """Broadcastable to (B, heads, T, S), to broadcastable to (B, G, R, T, S)."""
    if mask.shape[1] == 1:
        return mask[:, :, None]
    shape = tf.shape(mask)
    return tf.reshape(mask, [shape[0], groups, heads // groups, shape[2], shape[3]])


def _size(x: Any, axis: int) -> Any:
    """The size of an axis as an int, or as a tensor where it is not known yet."""
    return keras.ops.shape(x)[axis]


def wide_dtype(dtype: Any) -> Any:
    """The dtype to compute in."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def _set_size(x: Any, axis: int, size: int | None) -> Any:
    shape = x.shape.as_list()
    shape[axis] = size
    return fusion.shaped(x, shape)


# --- products -------------------------------------------------------------------------------------------------------


def _products(q: Any, k: Any) -> Any:
    """(B, G, R, P, D) and (B, G, Q, D) to (B, G, R, P, Q)."""
    return _per_group(lambda rows: tf.matmul(rows, k, transpose_b=True), q)


def _weighted(p: Any, v: Any) -> Any:
    """(B, G, R, P, Q) and (B, G, Q, D) to (B, G, R, P, D)."""
    return _per_group(lambda rows: tf.matmul(rows, v), p)


def _gathered(p: Any, x: Any) -> Any:
    """(B, G, R, P, Q) and (B, G, R, P, D) to (B, G, Q, D), summed over R and P."""
    return tf.matmul(_rows(p), _rows(x), transpose_a=True)


def _rows(x: Any) -> Any:
    """(B, G, R, P, D) to (B, G, R * P, D)."""
    shape = [_size(x, 0), x.shape[1], _size(x, 3) * x.shape[2], _size(x, 4)]
    return tf.reshape(x, shape)


def _per_group(function: Any, x: Any) -> Any:
    y = function(_rows(x))
    return tf.reshape(y, [_size(x, 0), x.shape[1], x.shape[2], _size(x, 3), _size(y, 3)])


def _within_range(rows: Any, columns: Any) -> tuple[Any, Any]:
    """Rows scaled so that no product with a column leaves float16, and what to multiply the products by in float32.

    The scale is a power of two, so nothing is rounded, and one but for rows and columns of great length: a product is
    at most the product of the lengths. (B, G, R, P, D) and (B, G, Q, D) to the shape of the former and (B, G, R, P, 1).
    """
    if rows.dtype != tf.float16:
        return rows, tf.ones([], wide_dtype(rows.dtype))
    longest = tf.reduce_max(tf.norm(tf.cast(columns, tf.float32), axis=-1), axis=-1)[:, :, None, None, None]
    bound = tf.norm(tf.cast(rows, tf.float32), axis=-1, keepdims=True) * longest / 2.0**15
    factor = _power_of_two_above(bound)
    return rows * tf.cast(1.0 / factor, tf.float16), factor


def _power_of_two_above(x: Any) -> Any:
    """The least that is not below `x` nor below 1."""
    return tf.where(x > 1.0, tf.pow(2.0, tf.math.ceil(tf.math.log(x) / tf.math.log(2.0))), 1.0)


# --- one block: from products to probabilities, and back --------------------------------------------------------------


def _logits(products: Any, given: dict[str, Any], settings: _Settings) -> Any:
    """The products in float32, scaled, and -inf where they are hidden."""
    dtype = wide_dtype(products.dtype)
    logits = tf.cast(products, dtype) * settings.scale
    if "factor" in given:
        logits *= tf.cast(given["factor"], dtype)
    rows = given.get("first_row", 0) + tf.range(tf.shape(products)[3])[:, None]
    columns = given.get("first_column", 0) + tf.range(tf.shape(products)[4])[None, :]
    conditions = [given[name] for name in ("key_mask", "pair_mask") if name in given]
    if settings.causal:
        conditions.append(columns <= rows)
    if settings.window is not None:
        conditions.append(tf.abs(rows - columns) < settings.window)
    if "length" in given:
        conditions.append(columns < given["length"])
    for condition in conditions:
        logits = tf.where(condition, logits, -float("inf"))
    return logits


def _softmax(logits: Any) -> tuple[Any, Any]:
    """Probabilities of each row, zeros where all is hidden; its largest logit and the logarithm of its sum beside that.

    As one number, the logarithm of the whole sum, the second would be lost beside a first that is large.
    """
    rows = (logits.shape.rank - 1,)
    largest = fusion.largest(logits, rows)
    largest = tf.where(tf.equal(largest, -float("inf")), tf.zeros_like(largest), largest)
    exponentials = tf.exp(logits - largest)
    total = fusion.total(exponentials, rows)
    inverse = 1.0 / tf.where(tf.equal(total, 0.0), tf.ones_like(total), total)
    return exponentials * inverse, tf.concat([largest, tf.math.log(total)], -1)


def _kept(p: Any, given: dict[str, Any], settings: _Settings) -> Any:
    """What dropout multiplies the probabilities by: 0, or 1 over the share that is kept."""
    uniform = tf.random.stateless_uniform(tf.shape(p), given["seed"], dtype=tf.float32)
    return tf.cast(uniform >= settings.rate, p.dtype) / (1.0 - settings.rate)


def _block_forward(products: Any, *tensors: Any, names: tuple[str, ...], settings: _Settings) -> tuple[Any, Any]:
    given = dict(zip(names, tensors, strict=True))
    p, log_sum = _softmax(_logits(products, given, settings))
    if settings.rate:
        p *= _kept(p, given, settings)
    return tf.cast(p, products.dtype), log_sum


def _block_backward(
    products: Any, slopes: Any, *tensors: Any, names: tuple[str, ...], settings: _Settings
) -> tuple[Any, Any]:
    """The probabilities again, for the gradient to the values, and the gradient to the unscaled products.

    `slopes` are the products of the upstream gradient with the values: the gradient to the probabilities.
    """
    given = dict(zip(names, tensors, strict=True))
    logits, sums = _logits(products, given, settings), given["log_sums"]
    largest, log_total = sums[..., :1], sums[..., 1:]
    log_total = tf.where(tf.equal(log_total, -float("inf")), tf.zeros_like(log_total), log_total)
    p = tf.exp((logits - largest) - log_total)
    g = tf.cast(slopes, p.dtype)
    kept = p
    if settings.rate:
        keep = _kept(p, given, settings)
        g, kept = g * keep, p * keep
    to_logits = p * (g - given["average"])
    return tf.cast(kept, products.dtype), tf.cast(settings.scale * to_logits, products.dtype)


_forward_of, _backward_of = fusion.fusible(_block_forward), fusion.fusible(_block_backward)


# --- all at once ----------------------------------------------------------------------------------------------------


def _dropped(p: Any, seed: Any, *, settings: _Settings) -> Any:
    wide = tf.cast(p, wide_dtype(p.dtype))
    return tf.cast(wide * _kept(wide, {"seed": seed}, settings), p.dtype)


def _from_probabilities(
    p: Any, slopes: Any, *tensors: Any, names: tuple[str, ...], settings: _Settings
) -> tuple[Any, ...]:
    """The gradient to the unscaled products, and the probabilities after dropout where there is any.

    As in the softmax of `keras_mp.activations`, the sum of a row's rounded probabilities stands in for 1.
    """
    given, rows = dict(zip(names, tensors, strict=True)), (p.shape.rank - 1,)
    wide = tf.cast(p, wide_dtype(p.dtype))
    g = tf.cast(slopes, wide.dtype) * tf.cast(given["slope_factor"], wide.dtype)
    dropped: tuple[Any, ...] = ()
    if settings.rate:
        keep = _kept(wide, given, settings)
        g, dropped = g * keep, (tf.cast(wide * keep, p.dtype),)
    if "to_scores" in given:
        g += tf.cast(given["to_scores"], wide.dtype) * tf.cast(given["score_factor"], wide.dtype)
    to_logits = wide * (g * fusion.total(wide, rows) - fusion.total(g * wide, rows))
    return tf.cast(settings.scale * to_logits, p.dtype), *dropped


_dropped_of, _from_probabilities_of = fusion.fusible(_dropped), fusion.fusible(_from_probabilities)


def _at_once(
    q: Any, k: Any, v: Any, hides: dict[str, Any], settings: _Settings, fused: bool, with_scores: bool = False
) -> tuple[Any, ...]:
    """One block of everything; keeps q, k, v and the probabilities, which are a third answer where they are asked for.

    Computing the probabilities again in the backward pass would save their memory, at the cost of a product and of
    their exponentials.
    """
    undropped = settings._replace(rate=0.0)
    seed = {"seed": hides["seed"]} if settings.rate else {}
    masks = {name: mask for name, mask in hides.items() if name != "seed"}
    whole = execution.in_xla_context()

    @fusion.custom_gradient
    def attention(q: Any, k: Any, v: Any) -> Any:
        bounded, factor = _within_range(q, k)
        given = masks | {"factor": tf.stop_gradient(factor)}
        p, log_sums = _forward_of(fused)(_products(bounded, k), *given.values(), names=tuple(given), settings=undropped)
        (p,) = fusion.held(whole and execution.recording(), p)
        dropped = _dropped_of(fused)(p, seed["seed"], settings=settings) if settings.rate else p
        kept = q, k, v, p

        def gradient(upstream: Any, _: Any, *to_scores: Any) -> Any:
            q, k, v, p = fusion.held(whole, *kept)
            bounded, factor = _within_range(upstream, v)
            # What goes to the products is at most twice the largest slope: shared out in two factors it fits 16 bits.
            top = _power_of_two_above(2.0 * settings.scale * tf.reduce_max(factor)) if q.dtype == tf.float16 else 1.0
            given = seed | {"slope_factor": tf.stop_gradient(factor / top)}
            if to_scores:
                given |= {"to_scores": to_scores[0], "score_factor": tf.stop_gradient(1.0 / tf.convert_to_tensor(top))}
            to_products, *dropped = _from_probabilities_of(fused)(
                p, _products(bounded, v), *given.values(), names=tuple(given), settings=settings
            )
            to_q, to_k = _weighted(to_products, k), _gathered(to_products, q)
            if q.dtype == tf.float16:
                to_q, to_k = (tf.cast(tf.cast(x, tf.float32) * top, tf.float16) for x in (to_q, to_k))
            return to_q, to_k, _gathered(dropped[0] if dropped else p, upstream)

        return (_weighted(dropped, v), log_sums, *([p] if with_scores else [])), gradient

    return attention(q, k, v)


# --- in blocks ------------------------------------------------------------------------------------------------------


def _in_blocks(q: Any, k: Any, v: Any, hides: dict[str, Any], settings: _Settings, fused: bool) -> tuple[Any, Any]:
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

    def __init__(self, q: Any, k: Any, v: Any, hides: dict[str, Any], settings: _Settings) -> None:
        self.settings = settings
        self.query_shape, self.key_shape = q.shape, k.shape
        self.length, self.keys = _size(q, 3), _size(k, 2)
        self.rows, self.columns = (_smaller(BLOCK, length) for length in (self.length, self.keys))
        self.q = self.of_queries(q)
        self.k, self.v = self.of_keys(k), self.of_keys(v)
        self.row_blocks, self.column_blocks = _size(self.q, 0), _size(self.k, 0)
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
    forward = _forward_of(fused)

    def one_row(row: Any, outputs: Any, log_sums: Any) -> Any:
        q = _exact(blocks.q[row])

        def one_block(column: Any, output: Any, sums_before: Any) -> Any:
            k, v = _exact(blocks.k[column]), _exact(blocks.v[column])
            given = blocks.given(row, column)
            p, sums_now = forward(_products(q, k), *given.values(), names=tuple(given), settings=blocks.settings)
            share_before, share_now, sums = _joined_sums(sums_before, sums_now)
            return column + 1, output * share_before + tf.cast(_weighted(p, v), wide) * share_now, sums

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
    backward = _backward_of(fused)

    def one_row(row: Any, to_q: Any, to_k: Any, to_v: Any) -> Any:
        q, g = _exact(blocks.q[row]), _exact(pulled[row])
        of_row = {"log_sums": log_sums[row], "average": averages[row]}

        def one_block(column: Any, to_row: Any, to_k: Any, to_v: Any) -> Any:
            k, v = _exact(blocks.k[column]), _exact(blocks.v[column])
            given = blocks.given(row, column) | of_row
            p, to_products = backward(
                _products(q, k), _products(g, v), *given.values(), names=tuple(given), settings=blocks.settings
            )
            to_row += tf.cast(_weighted(to_products, k), wide)
            to_k = _add(to_k, column, tf.cast(_gathered(to_products, q), wide))
            to_v = _add(to_v, column, tf.cast(_gathered(p, g), wide))
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
    """The shares of what was there before and of a block in both together, and the sums of both; see `_softmax`."""
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
    """Runs `body(index, *state)`, which answers the next index and state; one iteration at a time, to save memory."""
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
    rank, length = x.shape.rank, _size(x, axis)
    padding = -length % size
    x = tf.pad(x, [[0, padding if a == axis else 0] for a in range(rank)])
    sizes = [_size(x, a) for a in range(rank)]
    x = tf.reshape(x, [*sizes[:axis], (length + padding) // size, size, *sizes[axis + 1 :]])
    return tf.transpose(x, [axis, *range(axis), *range(axis + 1, rank + 1)])


def _join(x: Any, axis: int, length: Any) -> Any:
    """Back from `_cut`."""
    rank = x.shape.rank - 1
    x = tf.transpose(x, [*range(1, axis + 1), 0, *range(axis + 1, rank + 1)])
    sizes = [_size(x, a) for a in range(rank + 1)]
    x = tf.reshape(x, [*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]])
    begin, end = [0] * rank, [-1] * rank
    end[axis] = length
    return tf.slice(x, begin, end)


def _slice_last(x: Any, begin: Any, size: Any) -> Any:
    if x.shape[-1] == 1:
        return x
    # Past the end of a mask that is not padded there are only keys that `length` hides.
    columns = tf.minimum(begin + tf.range(size), _size(x, x.shape.rank - 1) - 1)
    return tf.gather(x, columns, axis=-1)
