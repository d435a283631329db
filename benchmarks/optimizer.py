"""The optimizer's step alone, with loss scaling and without, against stock Keras: `python -m benchmarks.optimizer`.

The gradients exist before the step, in float32 and times the loss scale, as after a backward pass.
"""

import functools
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

import keras_mp
from benchmarks.harness import Case, Comparison, Group, command

__all__ = ["GROUPS", "make_step"]

SCALE = 2.0**15
NEVER = 10**9

# Four layers of 2048 and ten classes: 14.7 million weights.
_MLP = [(1024, 2048), *[(2048, 2048)] * 3, (2048, 10)]
MLP_SHAPES = [shape for rows, columns in _MLP for shape in ((rows, columns), (columns,))]
# The biases and normalization weights of a deep network.
SMALL_SHAPES = [(64,), (256,), (128,), (512,)] * 100


def make_step(
    optimizer: keras.optimizers.Optimizer,
    shapes: Sequence[tuple[int, ...]],
    *,
    jit_compile: bool = False,
    bad: bool = False,
) -> Callable[[], None]:
    """Returns one step of an optimizer on new variables, as a function without arguments.

    Args:
        optimizer: with loss scaling or without.
        shapes: shapes of the variables.
        jit_compile: whether XLA compiles the step as a whole.
        bad: whether one gradient has an infinite value.
    """
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    variables = [keras.Variable(_values(shape, 0, 0.05), name=f"weight_{n}") for n, shape in enumerate(shapes)]
    gradients = _gradients(tuple(shapes), SCALE if scaled else 1.0, bad)
    optimizer.build(variables)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step() -> tf.Tensor:
        if scaled:
            optimizer.scale_loss(tf.ones([]))
        optimizer.apply([gradient.read_value() for gradient in gradients], variables)
        return tf.convert_to_tensor(optimizer.iterations.value)

    return lambda: step().numpy()


@functools.cache
def _gradients(shapes: tuple[tuple[int, ...], ...], scale: float, bad: bool) -> list[tf.Variable]:
    # In variables, because TensorFlow would compute with constants ahead of time.
    gradients = [tf.Variable(scale * _values(shape, 1, 1e-3)) for shape in shapes]
    if bad:
        last = gradients[-1]
        last.assign(tf.where(tf.range(last.shape[0]) == 0, np.inf, last))
    return gradients


def _values(shape: tuple[int, ...], seed: int, size: float) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def _adam(clips: bool = False) -> keras.optimizers.Adam:
    return keras.optimizers.Adam(1e-5, global_clipnorm=1.0 if clips else None)


def _stock(clips: bool = False) -> keras.optimizers.Optimizer:
    return keras.optimizers.LossScaleOptimizer(_adam(clips), dynamic_growth_steps=NEVER)


def _ours(jit_compile: "bool | str" = "auto", clips: bool = False) -> keras_mp.LossScaleOptimizer:
    return keras_mp.LossScaleOptimizer(
        _adam(clips), dynamic_growth_steps=NEVER, max_consecutive_skips=NEVER, jit_compile=jit_compile
    )


PLAIN, PLAIN_XLA = "Adam, no loss scaling", "Adam, no loss scaling, XLA"
STOCK, STOCK_XLA = "Keras's wrapper", "Keras's wrapper, XLA"
OURS, OURS_PLAIN, OURS_XLA = "ours", "ours, jit_compile=False", "ours, XLA around it"
OURS_FORCED = "ours, jit_compile=True"


def _large(clips: bool = False) -> list[Case]:
    step = functools.partial(make_step, shapes=MLP_SHAPES)
    return [
        Case(PLAIN, step(_adam(clips))),
        Case(PLAIN_XLA, step(_adam(clips), jit_compile=True)),
        Case(STOCK, step(_stock(clips))),
        Case(STOCK_XLA, step(_stock(clips), jit_compile=True)),
        Case(OURS, step(_ours(clips=clips))),
        Case(OURS_PLAIN, step(_ours(False, clips))),
        Case(OURS_XLA, step(_ours(clips=clips), jit_compile=True)),
    ]


def _skipped() -> list[Case]:
    step = functools.partial(make_step, shapes=MLP_SHAPES)
    return [
        Case(OURS, step(_ours())),
        Case(f"{OURS}, skipped", step(_ours(), bad=True)),
        Case(OURS_XLA, step(_ours(), jit_compile=True)),
        Case(f"{OURS_XLA}, skipped", step(_ours(), jit_compile=True, bad=True)),
        Case(f"{STOCK}, skipped", step(_stock(), bad=True)),
        Case(f"{STOCK_XLA}, skipped", step(_stock(), jit_compile=True, bad=True)),
    ]


def _small() -> list[Case]:
    # Keras's wrapper in XLA is left out: over a minute to compile, and slower than without.
    step = functools.partial(make_step, shapes=SMALL_SHAPES)
    return [
        Case(PLAIN, step(_adam())),
        Case(STOCK, step(_stock())),
        Case(OURS, step(_ours())),
        Case(OURS_PLAIN, step(_ours(False))),
        Case(OURS_FORCED, step(_ours(True))),
        Case(OURS_XLA, step(_ours(), jit_compile=True)),
    ]


_LARGE = [
    Comparison(OURS, (STOCK, STOCK_XLA), 0.55),
    Comparison(OURS, (PLAIN_XLA,), 1.3),
    Comparison(OURS_PLAIN, (STOCK,)),
    Comparison(OURS_XLA, (STOCK, STOCK_XLA), 0.55),
    Comparison(OURS_XLA, (PLAIN_XLA,), 1.3),
]

GROUPS = [
    Group("14.7M weights", _large, _LARGE),
    Group("14.7M weights, global_clipnorm=1.0", functools.partial(_large, clips=True), _LARGE),
    Group(
        "14.7M weights, one gradient infinite",
        _skipped,
        [
            Comparison(f"{OURS}, skipped", (OURS,), 1.0),
            Comparison(f"{OURS_XLA}, skipped", (OURS_XLA,), 1.0),
            Comparison(f"{OURS}, skipped", (f"{STOCK}, skipped", f"{STOCK_XLA}, skipped")),
        ],
    ),
    Group(
        "400 small variables",
        _small,
        [
            Comparison(OURS, (STOCK,), 1.0),
            Comparison(OURS_PLAIN, (STOCK,)),
            Comparison(OURS_FORCED, (STOCK,)),
            Comparison(OURS_XLA, (STOCK,)),
        ],
        rounds=60,
    ),
]

if __name__ == "__main__":
    command("optimizer", GROUPS)()
