"""How long a matrix product takes in float32 and in 16 bits on a device that is here."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from keras_mp import backend

__all__ = ["ProductTimes", "time_products"]

# The gain in a bare product below which the casts of a training step leave nothing of it.
_WORTHWHILE = 1.2

_SIZE = 768
_CHAIN = 2
_ROUNDS = 7
_BUDGET_SECONDS = 0.3

# What TensorFlow logs when a session is made, and once for float16 on a CPU without instructions for it.
_LOG_LINES = ("absl::InitializeLog()", "mlir_graph_optimization_pass.cc:", "oneDNN supports DT_HALF only")


@dataclasses.dataclass(frozen=True)
class ProductTimes:
    """How long one matrix product takes in float32 and in a 16-bit dtype.

    Args:
        device: `"CPU"`, `"GPU"` or `"TPU"`.
        size: rows and columns of both factors.
        dtype: the 16-bit dtype.
        float32_ms: median time of the product in float32, in milliseconds.
        dtype_ms: median time of the product in `dtype`, in milliseconds.
    """

    device: str
    size: int
    dtype: str
    float32_ms: float
    dtype_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster the 16-bit product is than the float32 one."""
        return self.float32_ms / self.dtype_ms

    @property
    def gains(self) -> bool:
        """Whether the 16-bit product is so much faster that a training step gains from it."""
        return self.ratio >= _WORTHWHILE

    def __str__(self) -> str:
        """Both times in words, as the second half of a sentence."""
        return (
            f"a product of two {self.size} x {self.size} matrices takes {self.float32_ms:.2f} ms in float32 and "
            f"{self.dtype_ms:.2f} ms in {self.dtype} ({self.ratio:.1f}x)"
        )


def time_products(dtype: str, device: str) -> ProductTimes:
    """Times the product of two matrices in float32 and in a 16-bit dtype, in turns.

    Args:
        dtype: `"bfloat16"` or `"float16"`.
        device: a kind of device that is here. `"CPU"` is timed without starting TensorFlow's eager runtime.
    """
    factors = _factors(dtype)
    times = _interleaved(factors) if device == "CPU" else _interleaved_eager(factors, device)
    return ProductTimes(device, _SIZE, dtype, times["float32"], times[dtype])


def _factors(dtype: str) -> dict[str, np.ndarray]:
    # Scaled so that a chain of products keeps its magnitude: neither overflow nor subnormal numbers are timed.
    factor = np.random.default_rng(0).standard_normal((_SIZE, _SIZE)) / _SIZE**0.5
    return {each: factor.astype(tf.as_dtype(each).as_numpy_dtype) for each in ("float32", dtype)}


def _interleaved(factors: dict[str, np.ndarray]) -> dict[str, float]:
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
        with backend.without_log_lines(*_LOG_LINES):
            return _medians(runs)


def _interleaved_eager(factors: dict[str, np.ndarray], device: str) -> dict[str, float]:
    with tf.device(f"/device:{device}:0"):
        tensors = {dtype: tf.constant(factor) for dtype, factor in factors.items()}
        # One number is fetched, which waits for the product and copies next to nothing.
        return _medians(
            {
                dtype: functools.partial(lambda tensor: tf.reduce_sum(_chain(tensor)[:1]).numpy(), tensor)
                for dtype, tensor in tensors.items()
            }
        )


def _chain(factor: tf.Tensor) -> tf.Tensor:
    product = factor
    for _ in range(_CHAIN):
        product = tf.matmul(product, factor)
    return product


def _medians(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of one product of each dtype, taken in turns after a warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {dtype: [] for dtype in runs}
    end = time.perf_counter() + _BUDGET_SECONDS
    for done in range(_ROUNDS):
        if done and time.perf_counter() > end:
            break
        for dtype, run in runs.items():
            start = time.perf_counter()
            run()
            times[dtype].append((time.perf_counter() - start) * 1000 / _CHAIN)
    return {dtype: statistics.median(each) for dtype, each in times.items()}
