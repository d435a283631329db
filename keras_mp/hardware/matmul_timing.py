"""The time of a matmul in float32 and in a 16-bit dtype on a device of this machine."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf

__all__ = ["ProductTimes", "settle", "time_matmuls"]

# Below this gain of a bare matmul, the casts of a training step use it up.
_WORTHWHILE = 1.2

_SIZE = 768
_CHAIN = 2

# Rounds at least, and at most where the ratio is near the threshold. A device that needs seconds for them gets fewer.
_ROUNDS = 7
_ROUNDS_AT_MOST = 61
_SECONDS_AT_MOST = 2.0

# The least distance of one round's ratio from the threshold, as a logarithm, that counts as clear. For n rounds it is
# less by the square root of n. It is over three standard errors of the median where each time varies by a tenth.
_MARGIN = 0.6


@dataclasses.dataclass(frozen=True)
class ProductTimes:
    """The time of one matmul in float32 and in a 16-bit dtype.

    Args:
        device: `"CPU"`, `"GPU"` or `"TPU"`.
        size: rows and columns of both factors.
        dtype: the 16-bit dtype.
        float32_ms: median time of the matmul in float32, in milliseconds.
        dtype_ms: median time of the matmul in `dtype`, in milliseconds.
        clear: whether the ratio is far enough from the threshold to be the same in another run.
    """

    device: str
    size: int
    dtype: str
    float32_ms: float
    dtype_ms: float
    clear: bool = True

    @property
    def ratio(self) -> float:
        """How many times faster the 16-bit matmul is than the float32 one."""
        return self.float32_ms / self.dtype_ms

    @property
    def gains(self) -> bool:
        """Whether a training step gains from the 16-bit matmul. False where the ratio is not clear."""
        return self.clear and self.ratio >= _WORTHWHILE

    def __str__(self) -> str:
        """Both times in words, as the second half of a sentence."""
        close = "" if self.clear else f", too close to {_WORTHWHILE}x to tell"
        return (
            f"a matmul of two {self.size} x {self.size} matrices takes {self.float32_ms:.2f} ms in float32 and "
            f"{self.dtype_ms:.2f} ms in {self.dtype} ({self.ratio:.1f}x{close})"
        )


def settle(rounds: Iterable[tuple[float, float]]) -> tuple[float, float, bool]:
    """Takes rounds until their medians tell on which side of the threshold the ratio is, or there are enough.

    So the result is the same from run to run, and only a ratio near the threshold is timed for longer.

    Args:
        rounds: for each round, milliseconds of a matmul in float32 and in the 16-bit dtype. At least one.

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


def time_matmuls(dtype: str, device: str) -> ProductTimes:
    """Times a matmul in float32 and in a 16-bit dtype, in turns.

    Args:
        dtype: `"bfloat16"` or `"float16"`.
        device: a kind of device that is here. `"CPU"` is timed without starting TensorFlow's eager runtime.
    """
    factors = _factors(dtype)
    times = _interleaved(factors) if device == "CPU" else _interleaved_eager(factors, device)
    return ProductTimes(device, _SIZE, dtype, *times)


def _factors(dtype: str) -> dict[str, np.ndarray]:
    # Scaled so that a chain of matmuls keeps its magnitude: neither overflow nor subnormal numbers are timed.
    factor = np.random.default_rng(0).standard_normal((_SIZE, _SIZE)) / _SIZE**0.5
    return {each: factor.astype(tf.as_dtype(each).as_numpy_dtype) for each in ("float32", dtype)}


def _interleaved(factors: dict[str, np.ndarray]) -> tuple[float, float, bool]:
    # In a session, because the first eager op would start the runtime, which could not be configured later.
    graph = tf.Graph()
    with graph.as_default():
        chains = {}
        for dtype in factors:
            factor = tf.compat.v1.placeholder(dtype, (_SIZE, _SIZE))
            chains[dtype] = factor, _chain(factor).op
    config = tf.compat.v1.ConfigProto(
        device_count={"GPU": 0},
        intra_op_parallelism_threads=tf.config.threading.get_intra_op_parallelism_threads(),
        inter_op_parallelism_threads=tf.config.threading.get_inter_op_parallelism_threads(),
    )
    with tf.compat.v1.Session(graph=graph, config=config) as session:
        runs = {
            dtype: functools.partial(session.make_callable(chain, [factor]), factors[dtype])
            for dtype, (factor, chain) in chains.items()
        }
        return settle(_rounds(runs))


def _interleaved_eager(factors: dict[str, np.ndarray], device: str) -> tuple[float, float, bool]:
    with tf.device(f"/device:{device}:0"):
        tensors = {dtype: tf.constant(factor) for dtype, factor in factors.items()}
        # Fetching one number waits for the matmul and copies next to nothing.
        return settle(
            _rounds(
                {
                    dtype: functools.partial(lambda tensor: tf.reduce_sum(_chain(tensor)[:1]).numpy(), tensor)
                    for dtype, tensor in tensors.items()
                }
            )
        )


def _chain(factor: tf.Tensor) -> tf.Tensor:
    result = factor
    for _ in range(_CHAIN):
        result = tf.matmul(result, factor)
    return result


def _rounds(runs: Mapping[str, Callable[[], object]]) -> Iterator[tuple[float, float]]:
    """Yields milliseconds of one matmul of each dtype, taken in turns after a warm-up, until the time is up."""
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
