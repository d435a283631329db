"""Each layer forward and backward, time and memory, against the stock layer: `python -m benchmarks.layers`.

A time covers one layer: its outputs, and the gradients to its inputs and weights, in one graph. The batch has no static
size, as in `fit`. Inputs have the dtype that a layer before would return under the policy: a 16-bit one under a mixed
policy.

Memory covers a chain of four layers. Tensors for the backward pass are there four times, temporaries once. The output
of a pooling or an attention layer does not fit the next input. So each layer gets the input times a number made from
the output before it. A layer may keep this scaled input, and its gradient makes the backward passes wait for one
another. The chain adds the same memory to ours and to stock, so a ratio here is nearer to 1 than the layers' own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_mp
from benchmarks.harness import Case, Comparison, Group, command

__all__ = [
    "DEPTH",
    "INPUT_DTYPES",
    "WORKLOADS",
    "Workload",
    "case_name",
    "find",
    "group",
    "make_cases",
    "make_step",
    "runner",
    "stacked",
]

DEPTH = 4
INPUT_DTYPES = {"float32": "float32", "mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
SEQUENCE = (16, 512, 512)
IMAGE = (32, 56, 56, 64)
VOLUME = (4, 16, 56, 56, 32)
ATTENTION = (4, 256, 512)
HEADS: dict[str, Any] = {"num_heads": 8, "key_dim": 64}
SMALL_IMAGE = (16, 28, 28, 64)
PHOTOGRAPH = (32, 112, 112, 3)
WORDS = 8192
CONVOLUTION: dict[str, Any] = {"kernel_size": 3, "padding": "same"}
LARGE_KERNEL: dict[str, Any] = {"kernel_size": 5, "padding": "same"}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A layer and its inputs.

    Args:
        name: name of the workload.
        path: path of the class or function under `keras_mp`: "layers.Softmax".
        shapes: shapes of the inputs, the batch first.
        settings: arguments of the class. None where `path` is a function of tensors already.
        call: maps the layer (or function) and its inputs to its output.
        masks, labels: how many inputs there are beside `shapes`: masks of the first's shape without its last axis, and
            class numbers below the first's last axis.
        stock_path: the same under `keras`. Empty where it equals ours.
        float16: whether to time it in float16 too. Not where TensorFlow has no kernel for that on a CPU.
    """

    name: str
    path: str
    shapes: tuple[tuple[int, ...], ...]
    settings: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    call: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)
    masks: int = 0
    labels: int = 0
    stock_path: str = ""
    float16: bool = True

    def small(self) -> "Workload":
        """Returns the same with tiny sizes, to try it out."""
        shapes = tuple((2, *(min(8, size) for size in shape[1:-1]), min(64, shape[-1])) for shape in self.shapes)
        return dataclasses.replace(self, shapes=shapes)


def _layer(
    path: str,
    *shapes: tuple[int, ...],
    name: str = "",
    call: Callable[..., Any] | None = None,
    masks: int = 0,
    float16: bool = True,
    **settings: Any,
) -> Workload:
    given: dict[str, Any] = {} if call is None else {"call": call}
    return Workload(name or path, f"layers.{path}", shapes, settings, masks=masks, float16=float16, **given)


def _in_training(layer: Any, x: Any) -> Any:
    return layer(x, training=True)


def _of_list(layer: Any, *inputs: Any) -> Any:
    return layer(list(inputs))


def _to_itself(layer: Any, x: Any) -> Any:
    return layer(x, x)


def _masked(layer: Any, x: Any, mask: Any) -> Any:
    return layer(x, mask=mask)


def _causally(layer: Any, x: Any) -> Any:
    return layer(x, x, use_causal_mask=True)


WORKLOADS = [
    _layer("Softmax", SEQUENCE),
    _layer("LayerNormalization", SEQUENCE),
    _layer("RMSNormalization", SEQUENCE),
    _layer("UnitNormalization", SEQUENCE),
    _layer("Normalization", SEQUENCE, axis=None, mean=0.1, variance=2.0),
    _layer("BatchNormalization", IMAGE, call=_in_training),
    _layer("BatchNormalization", (32, 56, 56, 72), name="BatchNormalization, 72 channels", call=_in_training),
    _layer("GroupNormalization", IMAGE, groups=32),
    _layer("Dense", (2048, 1024), float16=False, units=1024),
    _layer("Conv2D", (64, 8, 8, 256), name="Conv2D, small images", float16=False, filters=256, **CONVOLUTION),
    _layer("Conv2D", (16, 7, 7, 2048), name="Conv2D, 1 x 1", float16=False, filters=512, kernel_size=1),
    _layer(
        "Conv2D",
        (8, 56, 56, 64),
        name="Conv2D, a group a channel",
        float16=False,
        filters=64,
        groups=64,
        kernel_size=7,
        padding="same",
    ),
    _layer("DepthwiseConv2D", (16, 14, 14, 672), name="DepthwiseConv2D, 5 x 5", float16=False, **LARGE_KERNEL),
    _layer("DepthwiseConv2D", IMAGE, name="DepthwiseConv2D, strides", float16=False, strides=2, **CONVOLUTION),
    _layer("MultiHeadAttention", ATTENTION, call=_to_itself, **HEADS),
    _layer("MultiHeadAttention", ATTENTION, name="MultiHeadAttention, causal", call=_causally, **HEADS),
    dataclasses.replace(
        _layer(
            "GroupedQueryAttention", ATTENTION, call=_to_itself, head_dim=64, num_query_heads=8, num_key_value_heads=2
        ),
        stock_path="layers.GroupQueryAttention",
    ),
    _layer("Attention", (16, 512, 128), (16, 512, 128), call=_of_list, use_scale=True),
    _layer("AdditiveAttention", (4, 64, 128), (4, 64, 128), call=_of_list),
    _layer("LSTM", (16, 128, 256), units=256),
    _layer("GRU", (16, 128, 256), units=256),
    _layer("GlobalAveragePooling1D", SEQUENCE),
    _layer("GlobalAveragePooling1D", SEQUENCE, name="GlobalAveragePooling1D, masked", call=_masked, masks=1),
    _layer("GlobalAveragePooling2D", IMAGE),
    _layer("GlobalAveragePooling3D", VOLUME),
    _layer("AveragePooling1D", SEQUENCE, pool_size=2),
    _layer("AveragePooling2D", IMAGE, pool_size=2),
    _layer("AveragePooling3D", VOLUME, float16=False, pool_size=2),
    _layer("UpSampling2D", SMALL_IMAGE, name="UpSampling2D, nearest", size=2),
    _layer("UpSampling2D", SMALL_IMAGE, name="UpSampling2D, bilinear", size=2, interpolation="bilinear"),
    _layer("Resizing", PHOTOGRAPH, height=224, width=224),
    Workload("gelu", "activations.gelu", (SEQUENCE,), None),
    Workload("silu", "activations.silu", (SEQUENCE,), None),
    Workload("hard_silu", "activations.hard_silu", (SEQUENCE,), None),
    Workload(
        f"SparseCategoricalCrossentropy, {WORDS} words",
        "losses.SparseCategoricalCrossentropy",
        ((8, 64, WORDS),),
        {"from_logits": True},
        call=lambda loss, logits, labels: loss(labels, logits),
        labels=1,
    ),
]


def find(workload: Workload, ours: bool) -> Any:
    """Returns the class or function of a workload.

    Args:
        workload: the workload.
        ours: whether to take it from `keras_mp`, not from `keras`.
    """
    path = workload.path if ours else workload.stock_path or workload.path
    return functools.reduce(getattr, path.split("."), keras_mp if ours else keras)


def _make(workload: Workload, what: Any, policy: str) -> Any:
    if workload.settings is None:
        return what
    # A loss has no policy. Its dtype is float32 for every dtype of predictions.
    given = {"dtype": policy} if issubclass(what, keras.layers.Layer) else {}
    return what(**workload.settings, **given)


@functools.cache
def _variable(shape: tuple[int, ...], kind: str, seed: int, batch_is_static: bool) -> tf.Variable:
    # In variables, because TensorFlow would compute with constants ahead of time.
    generator = np.random.default_rng(seed)
    if kind == "bool":
        value: Any = generator.random(shape) < 0.8
    elif kind.startswith("int"):
        value = generator.integers(0, int(kind[3:]), shape)
    else:
        value = tf.cast(generator.standard_normal(shape).astype("float32"), kind)
    known = shape if batch_is_static else (None, *shape[1:])
    return tf.Variable(value, trainable=False, shape=known if shape else ())


def make_step(
    workload: Workload,
    what: Any,
    policy: str,
    *,
    depth: int = 1,
    seed: int | None = None,
    batch_is_static: bool = False,
    between: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
) -> Callable[[], list[tf.Tensor]]:
    """Returns a training step of a layer, or of a chain of layers, as a Python function.

    Args:
        workload: the layer and its inputs.
        what: the class, or the function of tensors.
        policy: the name of the layer's policy.
        depth: number of layers.
        seed: makes repeatable random weights. None keeps the initial weights.
        batch_is_static: whether the graph knows the size of the batch.
        between: a function that each input after the first passes through.

    Returns:
        A function of nothing to the last output, and the gradients to the floating inputs and to the weights.
    """
    first = workload.shapes[0]
    kinds = [
        *((shape, INPUT_DTYPES[policy]) for shape in workload.shapes),
        *[(first[:-1], "bool")] * workload.masks,
        *[(first[:-1], f"int{first[-1]}")] * workload.labels,
    ]
    variables = [_variable(shape, kind, number, batch_is_static) for number, (shape, kind) in enumerate(kinds)]
    layers = [_make(workload, what, policy) for _ in range(depth)]
    for layer in layers:
        output = workload.call(layer, *(variable[:1] for variable in variables))  # makes the weights
    weights = [weight for layer in layers for weight in getattr(layer, "trainable_weights", [])]
    if seed is not None:
        generator = np.random.default_rng(seed)
        for weight in weights:
            weight.assign(0.5 * generator.standard_normal(weight.shape))
    above = (
        _variable((first[0], *output.shape[1:]), output.dtype.name, len(kinds), batch_is_static)
        if output.shape.rank
        else _variable((), output.dtype.name, len(kinds), True)
    )

    def step() -> list[tf.Tensor]:
        inputs = [variable.read_value() for variable in variables]
        sources = [x for x in inputs if x.dtype.is_floating]
        outputs: list[tf.Tensor] = []
        with tf.GradientTape() as tape:
            tape.watch(sources)
            for layer in layers:
                given = inputs
                if outputs:
                    factor = 1 + tf.reduce_mean(outputs[-1]) / 1024
                    given = [between(x * tf.cast(factor, x.dtype)) if x.dtype.is_floating else x for x in inputs]
                outputs.append(workload.call(layer, *given))
        gradients = tape.gradient(
            outputs,
            [*sources, *(weight.value for weight in weights)],
            output_gradients=[above.read_value()] * len(outputs),
        )
        return [outputs[-1], *gradients]

    return step


def runner(step: Callable[[], list[tf.Tensor]]) -> Callable[[], object]:
    """Returns a graph of a step that returns one number of each result. All are computed, none is kept.

    Args:
        step: made by `make_step`.

    Returns:
        A function that runs the graph, and returns when it is done.
    """

    @tf.function(autograph=False)
    def graph() -> tf.Tensor:
        return tf.stack([tf.cast(tf.reshape(result, [-1])[0], tf.float32) for result in step()])

    return lambda: graph().numpy()


def case_name(ours: bool, policy: str) -> str:
    """Returns the name of a case in the tables."""
    return f"{'ours' if ours else 'stock'}, {policy}"


def make_cases(workload: Workload, policies: Sequence[str], depth: int = 1) -> list[Case]:
    """Makes the cases of stock and ours under some policies.

    Args:
        workload: the workload.
        policies: names of policies.
        depth: number of layers.
    """
    return [
        Case(
            case_name(ours, policy),
            runner(make_step(workload, find(workload, ours), policy, depth=depth)),
            "for correctness on a CPU" if policy == "mixed_float16" else "",
        )
        for policy in policies
        for ours in (False, True)
    ]


def stacked(name: str) -> list[Case]:
    """Makes the cases for `memory_in_child`.

    Args:
        name: name of the workload.
    """
    workload = next(workload for workload in WORKLOADS if workload.name == name)
    # float16 needs the memory that bfloat16 needs.
    return make_cases(workload, ["float32", "mixed_bfloat16"], DEPTH)


def group(workload: Workload) -> Group:
    """Makes the group of a workload.

    Args:
        workload: one of `WORKLOADS`.
    """
    policies = [policy for policy in INPUT_DTYPES if policy != "mixed_float16" or workload.float16]
    same = [
        Comparison(case_name(True, policy), (case_name(False, policy),), at_most, memory_at_most=at_most)
        for policy, at_most in zip(policies, (1.0, 1.0, None), strict=False)
    ]
    across = Comparison(case_name(True, "mixed_bfloat16"), (case_name(False, "float32"),))
    shapes = " and ".join("x".join(map(str, shape)) for shape in workload.shapes)
    return Group(
        f"{workload.name}, {shapes}",
        functools.partial(make_cases, workload, policies),
        [*same, across],
        rounds=20,
        memory=("benchmarks.layers:stacked", workload.name),
    )


if __name__ == "__main__":
    command("layers", [group(workload) for workload in WORKLOADS])()
