"""How long a matrix product takes in float32 and in 16 bits on a device that is here."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf

__all__ = ["ProductTimes", "settle", "time_products"]

# The gain in a bare product below which the casts of a training step leave nothing of it.
_WORTHWHILE = 1.2

_SIZE = 768
_CHAIN = 2

# Rounds at least, and at most where the ratio is near the threshold. A device that needs seconds for them gets fewer.
_ROUNDS = 7
_ROUNDS_AT_MOST = 61
_SECONDS_AT_MOST = 2.0

# How far from the threshold, as a logarithm, the ratio of one round has to be for it to be told from it; of n rounds a
# square root of n less. It is over three standard errors of the median where each time varies by a tenth.
_MARGIN = 0.6


@dataclasses.dataclass(frozen=True)
class ProductTimes:
    """How long one matrix product takes in float32 and in a 16-bit dtype.

    Args:
        device: `"CPU"`, `"GPU"` or `"TPU"`.
        size: rows and columns of both factors.
        dtype: the 16-bit dtype.
        float32_ms: median time of the product in float32, in milliseconds.
        dtype_ms: median time of the product in `dtype`, in milliseconds.
        clear: whether the ratio is so far from the threshold that another run would give the same answer.
    """

    device: str
    size: int
    dtype: str
    float32_ms: float
    dtype_ms: float
    clear: bool = True

    @property
    def ratio(self) -> float:
        """How many times faster the 16-bit product is than the float32 one."""
        return self.float32_ms / self.dtype_ms

    @property
    def gains(self) -> bool:
        """Whether the 16-bit product is so much faster that a training step gains from it; no where it is not clear."""
        return self.clear and self.ratio >= _WORTHWHILE

    def __str__(self) -> str:
        """Both times in words, as the second half of a sentence."""
        close = "" if self.clear else f", too close to {_WORTHWHILE}x to tell"
        return (
            f"a product of two {self.size} x {self.size} matrices takes {self.float32_ms:.2f} ms in float32 and "
            f"{self.dtype_ms:.2f} ms in {self.dtype} ({self.ratio:.1f}x{close})"
        )


def settle(rounds: Iterable[tuple[float, float]]) -> tuple[float, float, bool]:
    """Takes rounds until their medians tell on which side of the threshold the ratio is, or there are enough.

    So the answer is the same from run to run, and only what is near the threshold is timed for longer.

    Args:
        rounds: milliseconds of a product in float32 and in 16 bits, of one round after another; one at least.

    Returns:
        Both medians, and whether their ratio is clearly above or below the threshold.

    Example:
    >>> settle([(4.0, 2.0)] * 100)
    (4.0, 2.0, True)
    >>> settle([(2.4, 2.0)] * 100)
    (2.4, 2.0, False)
    """
    taken: list[tuple[float, float]] = []
    float32_ms = dtype_ms = math.nan
    clear = False
    for each in rounds:
        taken.append(each)
        float32_ms, dtype_ms = (statistics.median(times) for times in zip(*taken, strict=True))
        clear = abs(math.log(float32_ms / dtype_ms / _WORTHWHILE)) > _MARGIN / math.sqrt(len(taken))
        if len(taken) >= _ROUNDS_AT_MOST or (clear and len(taken) >= _ROUNDS):
            break
    return float32_ms, dtype_ms, clear


def time_products(dtype: str, device: str) -> ProductTimes:
    """Times the product of two matrices in float32 and in a 16-bit dtype, in turns.

    Args:
        dtype: `"bfloat16"` or `"float16"`.
        device: a kind of device that is here. `"CPU"` is timed without starting TensorFlow's eager runtime.
    """
    factors = _factors(dtype)
    times = _interleaved(factors) if device == "CPU" else _interleaved_eager(factors, device)
    return ProductTimes(device, _SIZE, dtype, *times)


def _factors(dtype: str) -> dict[str, np.ndarray]:
    # Scaled so that a chain of products keeps its magnitude: neither overflow nor subnormal numbers are timed.
    factor = np.random.default_rng(0).standard_normal((_SIZE, _SIZE)) / _SIZE**0.5
    return {each: factor.astype(tf.as_dtype(each).as_numpy_dtype) for each in ("float32", dtype)}


def _interleaved(factors: dict[str, np.ndarray]) -> tuple[float, float, bool]:
    # A session of its own, because the first eager op would start the runtime and so forbid to configure it later.
    graph = tf.Graph()
    with graph.as_default():
        products = {}
        for dtype in factors:
            factor = tf.compat.v1.placeholder(dtype, (_SIZE, _SIZE))
            products[dtype] = factor, _chain(factor).op
    config = tf.compat.v1.ConfigProto(
        device_count={"GPU": 0},
        intra_op_parallelism_threads=tf.config.threading.get_intra_op_parallelism_threads(),
        inter_op_parallelism_threads=tf.config.threading.get_inter_op_parallelism_threads(),
    )
    with tf.compat.v1.Session(graph=graph, config=config) as session:
        runs = {
            dtype: functools.partial(session.make_callable(product, [factor]), factors[dtype])
            for dtype, (factor, product) in products.items()
        }
        return settle(_rounds(runs))


def _interleaved_eager(factors: dict[str, np.ndarray], device: str) -> tuple[float, float, bool]:
    with tf.device(f"/device:{device}:0"):
        tensors = {dtype: tf.constant(factor) for dtype, factor in factors.items()}
        # One number is fetched, which waits for the product and copies next to nothing.
        return settle(
            _rounds(
                {
                    dtype: functools.partial(lambda tensor: tf.reduce_sum(_chain(tensor)[:1]).numpy(), tensor)
                    for dtype, tensor in tensors.items()
                }
            )
        )


def _chain(factor: tf.Tensor) -> tf.Tensor:
    product = factor
    for _ in range(_CHAIN):
        product = tf.matmul(product, factor)
    return product


def _rounds(runs: Mapping[str, Callable[[], object]]) -> Iterator[tuple[float, float]]:
    """Milliseconds of one product of each dtype, taken in turns after a warm-up, for as long as there is time."""
    for run in runs.values():
        run()
    end = time.perf_counter() + _SECONDS_AT_MOST
    while True:
        float32_ms, dtype_ms = (_milliseconds(run) for run in runs.values())
        yield float32_ms, dtype_ms
        if time.perf_counter() > end:
            return


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000 / _CHAIN
