"""The core of attention against a plain float64 one: masks, blocks, dropout, range, memory and second derivatives."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mp import layers
from keras_mp.ops.attention import blocks as in_blocks
from keras_mp.ops.attention import dot_product
from keras_mp.ops.attention.dot_product import attend, attend_with_scores
from keras_mp.ops.attention.masks import Masks
from tests.contract.layer_contract import assert_close

DTYPES = ("float64", "float32", "float16", "bfloat16")
# Of the largest value: the scores, the probabilities, the output and each gradient are rounded to 16 bits on their way.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
EVERYTHING = (
    {"blockwise": False},
    {"blockwise": True},
    {"scores": True},
)
SEED = tf.constant([3, 4])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(in_blocks, "BLOCK", 4)


def problem(dtype, batch=2, queries=9, keys=7, groups=2, repeats=2, features=3, outputs=5, size=1.0, seed=0):
    """Query, key, value and the upstream gradient, rounded to the dtype."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, queries, groups * repeats, features),
        (batch, keys, groups, features),
        (batch, keys, groups, outputs),
        (batch, queries, groups * repeats, outputs),
    )
    return [tf.cast(size * rng.normal(size=shape), dtype) for shape in shapes]


def visible(masks, query, key):
    """Which query sees which key, as a matrix of pairs for each head."""
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    sees = np.ones((batch, heads, queries, keys), bool)
    for i in range(queries):
        for j in range(keys):
            if masks.causal and j > i:
                sees[:, :, i, j] = False
            if masks.window is not None and abs(i - j) >= masks.window:
                sees[:, :, i, j] = False
    if masks.query is not None:
        sees &= np.asarray(masks.query)[:, None, :, None]
    if masks.key is not None:
        sees &= np.asarray(masks.key)[:, None, None, :]
    if masks.pairs is not None:
        sees &= np.asarray(masks.pairs)
    return sees


def plain(query, key, value, sees, *, scale, kept=1.0, average=True):
    """Attention with every matrix in float64, and the probabilities before dropout; `kept` is what dropout multiplies.

    With NumPy's or TensorFlow's numbers; differentiable by the latter.
    """
    repeats = query.shape[2] // key.shape[2]
    key, value = (tf.repeat(x, repeats, axis=2) for x in (key, value))
    logits = scale * tf.einsum("bthd,bshd->bhts", query, key)
    seen = sees.any(-1, keepdims=True)
    peak = np.where(seen, np.where(sees, logits, -np.inf).max(-1, keepdims=True), 0.0)
    exponentials = tf.where(sees, tf.exp(tf.where(sees, logits - peak, 0.0)), 0.0)
    p = exponentials / tf.where(seen, tf.reduce_sum(exponentials, -1, keepdims=True), 1.0)
    hidden = np.where(seen, 0.0, average / key.shape[1])
    return tf.einsum("bhts,bshe->bthe", p * kept + hidden, value), p


def expected_of(tensors, masks, **arguments):
    """The output of `plain`, its gradients to query, key and value, and the probabilities, from the same numbers."""
    query, key, value, upstream = (tf.cast(x, "float64") for x in tensors)
    sees = visible(masks, query, key)
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        y, p = plain(query, key, value, sees, **arguments)
    return [y, *tape.gradient(y, [query, key, value], upstream)], p


def actual_of(query, key, value, upstream, masks, *, scores=False, scale, average=True, **arguments):
    """The output of ours, its gradients, and the probabilities if asked for."""
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        if scores:
            y, p = attend_with_scores(query, key, value, masks, scale=scale, hidden_rows_average=average, **arguments)
        else:
            y, p = attend(query, key, value, masks, scale=scale, hidden_rows_average=average, **arguments), None
    return [y, *tape.gradient(y, [query, key, value], upstream)], p


def assert_all_close(actual, expected, tolerance, what=""):
    """Each against its reference, relative to that; where it is nothing but rounding, to a tenth of the largest."""
    largest = max(np.abs(x).max() for x in expected)
    for name, value, reference in zip(("y", "query", "key", "value"), actual, expected, strict=True):
        size = max(np.abs(reference).max(), largest / 10)
        difference = np.abs(np.asarray(value, "float64") - reference).max()
        assert difference <= tolerance * size, f"{what}: {name} is off by {difference / size:.2e}"


def assert_attends(tensors, masks, tolerance, ways=EVERYTHING, average=True, **arguments):
    """Asserts that every way of attending gives the output, the gradients and the probabilities of `plain`."""
    expected, probabilities = expected_of(tensors, masks, average=average, **arguments)
    for way in ways:
        actual, scores = actual_of(*tensors, masks, average=average, **arguments, **way)
        assert {x.dtype for x in actual} == {tensors[0].dtype}
        assert [x.shape for x in actual] == [x.shape for x in expected]
        assert_all_close(actual, expected, tolerance, f"{way}")
        if scores is not None:
            assert scores.dtype == tensors[0].dtype
            hidden = ~visible(masks, *tensors[:2]).any(-1, keepdims=True)
            assert_close(scores, probabilities + hidden * average / tensors[1].shape[1], tolerance, "scores")


# --- against the plain one -------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    batch, groups, repeats, features, outputs = (draw(st.integers(1, most)) for most in (2, 2, 3, 3, 3))
    queries, keys = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))

    def mask(*shape):
        return tf.constant(rng.random(shape) > draw(st.sampled_from([0.3, 0.8])))

    heads = groups * repeats
    pairs = [draw(st.sampled_from([1, size])) for size in (batch, heads, queries, keys)]
    masks = Masks(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 4)),
        query=mask(batch, queries) if draw(st.booleans()) else None,
        key=mask(batch, keys) if draw(st.booleans()) else None,
        pairs=mask(*pairs) if draw(st.booleans()) else None,
    )
    dtype = draw(st.sampled_from(DTYPES))
    tensors = problem(dtype, batch, queries, keys, groups, repeats, features, outputs, seed=draw(st.integers(0, 1000)))
    return tensors, masks, draw(st.booleans())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems())
def test_any_masks_and_shapes(drawn):
    tensors, masks, average = drawn
    # Twice what the larger problems below need: here a few roundings may not average out.
    assert_attends(tensors, masks, 2 * TOLERANCE[tensors[0].dtype.name], average=average, scale=0.7)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        ("float16", "graph"),
        ("bfloat16", "graph"),
        ("float32", "unknown sizes"),
        ("float32", "XLA"),
    ],
)
def test_every_way_of_running_it(dtype, mode):
    """With all masks at once; a graph of known sizes has functions that XLA compiles, one of unknown sizes has none."""
    tensors = problem(dtype)
    rng = np.random.default_rng(0)
    hides = [rng.random(shape) > 0.2 for shape in [(2, 9), (2, 7), (2, 4, 9, 7)]]
    hides = [tf.constant(mask) for mask in hides]

    def masks_of(hides):
        return Masks(True, 6, *hides)

    def run(tensors, hides):
        return [actual_of(*tensors, masks_of(hides), scale=0.7, **way)[0] for way in EVERYTHING]

    if mode == "unknown sizes":
        specs = [tf.TensorSpec([None, None, *x.shape[2:]], dtype) for x in tensors]
        masks = [tf.TensorSpec(shape, "bool") for shape in [(None, None), (None, None), (None, 4, None, None)]]
        step = tf.function(run, input_signature=[specs, masks])
    else:
        step = tf.function(run, jit_compile=mode == "XLA")
    expected, _ = expected_of(tensors, masks_of(hides), scale=0.7)
    for way, actual in zip(EVERYTHING, step(tensors, hides), strict=True):
        assert_all_close(actual, expected, TOLERANCE[dtype], f"{way}")
    if mode == "unknown sizes":  # other sizes, in the same graph
        tensors, masks = problem(dtype, batch=1, queries=5, keys=8), [mask[:1, ..., :5] for mask in hides[:1]]
        masks += [tf.ones((1, 8), bool), tf.ones((1, 4, 5, 8), bool)]
        expected, _ = expected_of(tensors, masks_of(masks), scale=0.7)
        for way, actual in zip(EVERYTHING, step(tensors, masks), strict=True):
            assert_all_close(actual, expected, TOLERANCE[dtype], f"{way}")


def test_masks_of_pairs_whose_sizes_are_not_known():
    """What broadcasts where the sizes are known does so where they are not."""
    tensors = problem("float32")
    step = tf.function(
        lambda mask: actual_of(*tensors, Masks(pairs=mask), scale=0.7, blockwise=True)[0],
        input_signature=[tf.TensorSpec([None, 1, None, None], "bool")],
    )
    for shape in [(1, 1, 1, 7), (2, 1, 9, 1), (1, 1, 1, 1), (2, 1, 9, 7)]:
        mask = tf.constant(np.random.random(shape) > 0.4)
        expected, _ = expected_of(tensors, Masks(pairs=mask), scale=0.7)
        assert_all_close(step(mask), expected, 1e-5, str(shape))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_gradients_of_the_probabilities(dtype, fused):
    """The probabilities are an answer like another: a loss may be made of them too."""
    query, key, value, upstream = problem(dtype)
    pulled = tf.cast(np.random.default_rng(1).normal(size=(2, 4, 9, 7)), dtype)
    masks = Masks(causal=True)

    def gradients(attend, query, key, value, upstream, pulled):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            y, p = attend(query, key, value)
        return tape.gradient([y, p], [query, key, value], [upstream, pulled])

    def ours(query, key, value):
        return attend_with_scores(query, key, value, masks, scale=0.7)

    def reference(query, key, value):
        return plain(query, key, value, visible(masks, query, key), scale=0.7)

    tensors = query, key, value, upstream, pulled
    expected = gradients(reference, *(tf.cast(x, "float64") for x in tensors))
    actual = (tf.function(gradients) if fused else gradients)(ours, *tensors)
    for value, wanted in zip(actual, expected, strict=True):
        assert_close(value, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("blockwise", [False, True])
def test_rows_that_see_nothing(blockwise):
    """They get the mean of all values, hidden or not, and hand an even share of their gradient to each; or zeros."""
    query, key, value, upstream = problem("float16", size=100.0)
    hidden = np.zeros((2, 9), bool)
    hidden[0, 2] = hidden[1, 8] = True
    rng = np.random.default_rng(0)
    pairs = (rng.random((2, 1, 9, 7)) > 0.3) & ~hidden[:, None, :, None]
    for masks in (Masks(pairs=tf.constant(pairs)), Masks(query=tf.constant(~hidden)), Masks(window=1)):
        hidden = ~visible(masks, query, key).any(-1)[:, 0]
        assert hidden.any()
        mean = np.asarray(value, "float64").mean(1).repeat(2, axis=1)
        at_hidden = upstream * tf.cast(hidden[:, :, None, None], "float16")
        for average in (True, False):
            way = {"scale": 0.01, "blockwise": blockwise, "average": average}
            (y, *_), _ = actual_of(query, key, value, upstream, masks, **way)
            for b, i in np.argwhere(hidden):
                assert_close(y[b, i], mean[b] if average else 0 * mean[b], 1e-3)
            # What comes from these rows alone.
            (_, to_query, to_key, to_value), _ = actual_of(query, key, value, at_hidden, masks, **way)
            assert not np.any(to_query)
            assert not np.any(to_key)
            shares = np.asarray(at_hidden, "float64").reshape(2, 9, 2, 2, 5).sum((1, 3)) / 7 * average
            assert_close(to_value, np.broadcast_to(shares[:, None], to_value.shape), 2e-3)
            way["scale"] = 1e-4
            expected, _ = expected_of([query, key, value, upstream], masks, scale=1e-4, average=average)
            assert_all_close(actual_of(query, key, value, upstream, masks, **way)[0], expected, 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_rows_that_see_nothing(dtype):
    query, key, value, _ = problem(dtype)
    masks = Masks(key=tf.zeros((2, 7), bool))
    for average in (True, False):
        _, scores = attend_with_scores(query, key, value, masks, scale=0.7, hidden_rows_average=average)
        np.testing.assert_allclose(tf.cast(scores, "float64"), np.full((2, 4, 9, 7), average / 7), TOLERANCE[dtype])


@pytest.mark.parametrize("way", EVERYTHING, ids=str)
def test_nan_is_not_taken_for_a_hidden_row(way):
    query, key, value, upstream = problem("float16")
    query = tf.tensor_scatter_nd_update(query, [[0, 0, 0, 0]], [np.nan])
    for masks in (Masks(), Masks(key=tf.ones((2, 7), bool))):
        (y, *_), _ = actual_of(query, key, value, upstream, masks, scale=0.7, **way)
        assert np.isnan(y[0, 0, 0]).all()
        assert np.isfinite(y[0, 1:]).all()


# --- dropout ---------------------------------------------------------------------------------------------------------


def after_dropout(query, key, masks, **arguments):
    """The probabilities that the values are weighed by, (B, heads, T, S): what attention to the unit vectors gives."""
    keys, groups = key.shape[1:3]
    units = tf.tile(tf.eye(keys, dtype=query.dtype)[None, :, None], [query.shape[0], 1, groups, 1])
    with tf.GradientTape() as tape:  # XLA, which compiles what is differentiated, draws other numbers than the kernels
        tape.watch(query)
        if arguments.pop("scores", False):
            y, _ = attend_with_scores(query, key, units, masks, **arguments)
        else:
            y = attend(query, key, units, masks, **arguments)
    return tf.transpose(y, [0, 2, 1, 3])


@pytest.mark.parametrize(
    ("dtype", "mode", "way"),
    [
        *(("float64", "eager", way) for way in EVERYTHING),
        *(("float16", "graph", way) for way in EVERYTHING),
        ("bfloat16", "XLA", {"blockwise": True}),
    ],
    ids=str,
)
def test_dropout_drops_the_same_in_both_passes(dtype, mode, way):
    tensors = problem(dtype)
    masks, rate = Masks(causal=True, key=tf.constant([[True] * 7, [True] * 6 + [False]])), 0.4

    def run(*tensors):
        arguments = {"scale": 0.7, "rate": rate, "seed": SEED, **way}
        actual, scores = actual_of(*tensors, masks, **arguments)
        dropped = after_dropout(*tensors[:2], masks, **arguments)
        return actual, dropped, dropped[:0] if scores is None else scores

    actual, dropped, scores = (run if mode == "eager" else tf.function(run, jit_compile=mode == "XLA"))(*tensors)
    dropped = np.asarray(dropped, "float64")
    _, p = expected_of(tensors, masks, scale=0.7)
    kept = np.where(dropped > 0, 1 / (1 - rate), 0.0)
    assert 0.2 < (dropped == 0)[p > 0].mean() < 0.6
    assert_close(dropped, p * kept, TOLERANCE[dtype])
    expected, _ = expected_of(tensors, masks, scale=0.7, kept=kept)
    assert_all_close(actual, expected, TOLERANCE[dtype])
    if "scores" in way:
        assert_close(scores, p, TOLERANCE[dtype])  # as they were before dropout


@pytest.mark.parametrize("way", EVERYTHING, ids=str)
def test_dropout_keeps_the_mean_and_repeats_with_the_seed_alone(way):
    query, key, *_ = problem("float32", queries=32, keys=32)
    arguments = {"scale": 0.7, "rate": 0.25, **way}
    dropped = after_dropout(query, key, Masks(), seed=SEED, **arguments)
    p = after_dropout(query, key, Masks(), scale=0.7, **way)
    factors = np.asarray(dropped / p)
    kept = factors > 0
    np.testing.assert_allclose(factors[kept], 1 / 0.75, rtol=1e-4)
    # 8,192 numbers of deviation (0.25 / 0.75)^0.5.
    assert abs(factors.mean() - 1) < 4 * (0.25 / 0.75 / 8192) ** 0.5
    # No block, head or element of the batch drops what another one does.
    parts = kept.reshape(8, 8, 4, 8, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16)
    assert len(np.unique(kept.reshape(8, -1), axis=0)) == 8
    assert len(np.unique(parts, axis=0)) > 0.9 * len(parts)
    np.testing.assert_array_equal(after_dropout(query, key, Masks(), seed=SEED, **arguments), dropped)
    other = np.asarray(after_dropout(query, key, Masks(), seed=SEED + 1, **arguments)) > 0
    assert 0.5 < (other == kept).mean() < 0.75  # of two draws, 0.75^2 + 0.25^2 = 0.625 agree


# --- range -----------------------------------------------------------------------------------------------------------


def extreme(sizes, seed=0, **shape):
    """A problem of float16 numbers, uniform between plus and minus a size each for query, key, value and upstream."""
    rng = np.random.default_rng(seed)
    return [
        tf.cast(size * rng.uniform(-1, 1, x.shape), "float16")
        for size, x in zip(sizes, problem("float16", **shape), strict=True)
    ]


# Query, key, value, upstream gradient, and the scale, so that all that is expected is inside float16's range.
EXTREMES = {
    "query and key": (6e4, 6e4, 6e4, 1.0, 6e4**-2),
    "query and key, one maximum": (6e4, 6e4, 1.0, 1.0, 0.5),
    "all, one maximum": (6e4, 6e4, 6e4, 2e4, 0.5),
    "query": (6e4, 1e-3, 1.0, 1e-2, 0.05),
    "key": (1e-3, 6e4, 1.0, 1e-2, 0.05),
    "value": (1.0, 1.0, 6e4, 1.0, 0.5),
    "upstream": (1.0, 1.0, 1.0, 6e4, 0.5),
    "value and upstream": (1e-4, 1e-4, 2e4, 2e4, 0.5),
    "all": (6e4, 6e4, 6e4, 2e4, 6e4**-2),
}


@pytest.mark.parametrize("way", EVERYTHING, ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_range_of_float16(name, way):
    """What float64 makes of the same numbers, where that is inside the range of float16."""
    *sizes, scale = EXTREMES[name]
    tensors = extreme(sizes, queries=6, keys=5, outputs=4)
    expected, _ = expected_of(tensors, Masks(), scale=scale)
    assert max(np.abs(x).max() for x in expected) < 65504
    actual, _ = actual_of(*tensors, Masks(), scale=scale, **way)
    assert all(np.isfinite(x).all() for x in actual)
    for value, reference in zip(actual, expected, strict=True):
        assert_close(value, reference, 2e-2) if np.abs(reference).max() > 1e-4 else None


@pytest.mark.parametrize("way", EVERYTHING, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", [30.0, 1000.0, 60000.0])
def test_keys_that_are_alike_share_whatever_their_scores(size, dtype, way):
    """Scores of 1e10, of which float32 cannot tell the logarithm of their sum from that of one of them."""
    query, key, value, upstream = problem(dtype)
    query, key = size * tf.ones_like(query), size * tf.ones_like(key)
    actual, _ = actual_of(query, key, value, upstream, Masks(), scale=1.0, **way)
    mean = np.asarray(value, "float64").mean(1, keepdims=True).repeat(2, axis=2)
    assert_close(actual[0], np.broadcast_to(mean, upstream.shape), TOLERANCE[dtype])
    shares = np.asarray(upstream, "float64").reshape(2, 9, 2, 2, 5).sum((1, 3))[:, None] / 7
    assert_close(actual[3], np.broadcast_to(shares, value.shape), TOLERANCE[dtype])


@pytest.mark.parametrize("way", EVERYTHING, ids=str)
def test_gradients_to_values_that_cancel(way):
    """The first half of the queries pulls one way as much as the second half does the other."""
    pulled = np.where(np.arange(16) < 8, 60000.0, -60000.0)[None, :, None, None]
    tensors = [tf.cast(x, "float16") for x in (np.ones((1, 16, 1, 1)), np.ones((1, 2, 1, 1)), np.ones((1, 2, 1, 1)))]
    (_, *gradients), _ = actual_of(*tensors, tf.cast(pulled, "float16"), Masks(), scale=1.0, **way)
    for gradient in gradients:  # of keys and values that are alike, none goes to query and key
        np.testing.assert_allclose(gradient, np.zeros(gradient.shape), atol=60000 * 2e-2)


# --- memory ----------------------------------------------------------------------------------------------------------


def tensors_of(graph, inside_xla):
    """(elements, bytes, dtypes, name) of each tensor in a graph and in the functions and loops that it calls.

    Args:
        graph: a function's graph.
        inside_xla: whether to count the tensors in functions that XLA compiles, most of which it never makes.
    """
    definition = graph.as_graph_def(add_shapes=True)
    functions = {function.signature.name: function for function in definition.library.function}
    visited = set()

    def of(nodes):
        for node in nodes:
            shapes = node.attr["_output_shapes"].list.shape
            assert len(shapes) or "_output_shapes" in node.attr, f"the shapes of {node.name} are not told"
            types = [
                list(attribute.list.type) or [attribute.type]
                for name, attribute in node.attr.items()
                if name in ("Tout", "T", "dtype", "SrcT", "DstT", "element_dtype")
            ]
            for index, shape in enumerate(map(tf.TensorShape, shapes)):
                dtypes = {tf.as_dtype(each[index if len(each) > 1 else 0]).name for each in types if each != [0]}
                if node.op == "BroadcastGradientArgs":  # a few axes
                    continue
                assert shape.is_fully_defined(), f"the shape of {node.name} is not known"
                size = shape.num_elements()
                yield size, size * max((tf.as_dtype(each).size or 1 for each in dtypes), default=1), dtypes, node.name
            for attribute in node.attr.values():
                for name in [attribute.func.name, *(each.name for each in attribute.list.func)]:
                    if name in functions and name not in visited:
                        visited.add(name)
                        if inside_xla or not functions[name].attr["_XlaMustCompile"].b:
                            yield from of(functions[name].node_def)

    return list(of(definition.node))


def step_graph(queries, keys, policy, layer_arguments, **call):
    """The graph of a training step of the layer, of one example."""
    layer = layers.MultiHeadAttention(2, 8, dtype=policy, **layer_arguments)
    layer.build((1, queries, 8), (1, keys, 8))
    dtype = layer.compute_dtype

    def step(query, value, query_mask, value_mask):
        with tf.GradientTape() as tape:
            tape.watch([query, value])
            outputs = layer(query, value, query_mask=query_mask, value_mask=value_mask, training=True, **call)
            y, *scores = outputs if isinstance(outputs, tuple) else [outputs]
        return tape.gradient(y, [query, value, *layer.trainable_variables]), scores

    specs = [tf.TensorSpec((1, length, 8), dtype) for length in (queries, keys)]
    specs += [tf.TensorSpec((1, length), "bool") for length in (queries, keys)]
    return tf.function(step).get_concrete_function(*specs).graph


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"return_attention_scores": True}], ids=str)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_no_matrix_of_scores_is_held_in_float32(policy, call):
    tensors = tensors_of(step_graph(48, 64, policy, {"dropout": 0.1}, **call), inside_xla=False)
    whole = [each for each in tensors if each[0] >= 48 * 64]
    assert whole  # in 16 bits it is
    assert [each for each in whole if "float32" in each[2]] == []


def test_no_matrix_of_scores_is_held_from_the_length_where_it_pays(monkeypatch):
    monkeypatch.setattr(in_blocks, "BLOCK", 128)
    size = dot_product.BLOCKWISE_FROM
    largest, total = {}, {}
    for arguments in ({}, {"dropout": 0.1}):
        for length in (2 * size, 4 * size):
            graph = step_graph(length, length, "mixed_bfloat16", arguments, use_causal_mask=True)
            tensors = tensors_of(graph, inside_xla=True)
            assert [each for each in tensors if each[0] >= length * length // 8] == []
            largest[length], total[length] = (function(each[1] for each in tensors) for function in (max, sum))
        # Twice the length, twice the memory.
        assert largest[4 * size] <= 2.2 * largest[2 * size]
        assert total[4 * size] <= 2.2 * total[2 * size]


@pytest.mark.parametrize(
    ("queries", "keys", "blocks"), [(1023, 2048, False), (1024, 1024, True), (2048, 1023, False), (None, 64, True)]
)
def test_blocks_are_taken_from_a_length_on(queries, keys, blocks):
    assert dot_product.BLOCKWISE_FROM == 1024
    specs = [tf.TensorSpec([1, size, 1, 2], "float32") for size in (queries, keys, keys)]
    for blockwise in (None, True, False):
        step = tf.function(lambda *x: attend(*x, Masks(), scale=1.0, blockwise=blockwise))  # noqa: B023
        types = {op.type for op in step.get_concrete_function(*specs).graph.get_operations()}
        assert bool({"While", "StatelessWhile"} & types) == (blocks if blockwise is None else blockwise)


# --- second derivatives ----------------------------------------------------------------------------------------------


def penalty(attend, query, key, value, upstream):
    """The squared gradients of a loss, and their own gradients to query, key, value and upstream gradient."""
    tensors = [query, key, value, upstream]
    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(tensors)
            loss = tf.reduce_sum(tf.sin(attend(query, key, value)) * upstream)
        squares = sum(tf.reduce_sum(tf.square(x)) for x in inner.gradient(loss, tensors[:3]))
    return [squares, *outer.gradient(squares, tensors)]


@pytest.mark.parametrize("way", [{"blockwise": False}, {"scores": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "mode", "tolerance"),
    [("float64", "eager", 1e-12), ("float32", "XLA", 1e-5), ("float32", "graph", 1e-5), ("bfloat16", "graph", 6e-2)],
)
def test_second_derivatives(dtype, tolerance, way, mode):
    tensors = problem(dtype)
    masks = Masks(causal=True, key=tf.constant([[True] * 6 + [False]] * 2))

    def ours(query, key, value):
        if "scores" in way:
            return attend_with_scores(query, key, value, masks, scale=0.7)[0]
        return attend(query, key, value, masks, scale=0.7, **way)

    def reference(query, key, value):
        return plain(query, key, value, visible(masks, query, key), scale=0.7)[0]

    expected = penalty(reference, *(tf.cast(x, "float64") for x in tensors))
    run = penalty if mode == "eager" else tf.function(penalty, jit_compile=mode == "XLA")
    for value, wanted in zip(run(ours, *tensors), expected, strict=True):
        assert_close(value, wanted, tolerance)


@pytest.mark.parametrize("graph", [False, True])
def test_blocks_say_that_they_have_no_second_derivative(graph):
    tensors = problem("float32")
    run = tf.function(penalty) if graph else penalty
    with pytest.raises(NotImplementedError, match=r"no second derivative.*pass flash_attention=False"):
        run(lambda *x: attend(*x, Masks(), scale=0.7, blockwise=True), *tensors)
