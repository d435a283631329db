"""The statistics of a tensor that every tool here starts from: a histogram of exponents, extremes, a sum of squares.

A float32 number is `mantissa * 2**exponent`. How many numbers have each exponent tells what any 16-bit or 8-bit format
would lose, at any loss scale, and histograms add up over steps, replicas and workers.
"""

import dataclasses

import numpy as np
import tensorflow as tf

__all__ = ["BINS", "LENGTH", "Statistics", "statistics"]

# Biased exponents of float32. Bin 0 holds float32's own subnormal numbers, bin 255 stays empty.
BINS = 256
_ZEROS, _INFINITIES, _NANS = BINS, BINS + 1, BINS + 2
# What `statistics` returns: the counts, then the largest and smallest magnitude and the sum of squares.
_COUNTS = BINS + 3
LENGTH = _COUNTS + 3

_BIAS = 127
# XLA has a slow loop for a scatter on a CPU, and one matmul of one-hot rows for parts of this size.
_PART = 1 << 14


def statistics(x: tf.Tensor, in_xla: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the statistics of a tensor, computed in the graph.

    Args:
        x: float tensor of any shape and dtype. float64 is rounded to float32.
        in_xla: whether XLA compiles the function that is being traced.

    Returns:
        Counts, int32 of shape (259,): one for each exponent, then zeros, infinities and NaN. Values, float32 of shape
        (3,): the largest and the smallest magnitude of the finite numbers other than zero, and the sum of their
        squares. Without such numbers they are 0, infinity and 0.

    Example:

    >>> counts, values = statistics(tf.constant([0.0, 1.5, -3.0]), in_xla=False)
    >>> int(counts[127]), int(counts[128]), int(counts[256]), values.numpy().tolist()
    (1, 1, 1, [3.0, 1.5, 11.25])
    """
    x = tf.abs(tf.reshape(tf.cast(tf.stop_gradient(x), tf.float32), [-1]))
    bits = tf.bitcast(x, tf.int32)
    exponents = tf.bitwise.right_shift(bits, 23)
    # By bits, because XLA on a CPU takes float32's subnormal numbers for zeros.
    kinds = tf.where(
        bits == 0, _ZEROS, tf.where(exponents == 255, tf.where(bits == 0x7F800000, _INFINITIES, _NANS), exponents)
    )
    counts = _count_by_matmul(kinds) if in_xla else tf.math.bincount(kinds, minlength=_COUNTS, maxlength=_COUNTS)
    counted = kinds < BINS
    largest = tf.reduce_max(tf.where(counted, x, 0.0)) if x.shape[0] != 0 else tf.constant(0.0)
    smallest = tf.reduce_min(tf.where(counted, x, np.inf))
    squares = tf.reduce_sum(tf.where(counted, x * x, 0.0))
    return tf.cast(counts, tf.int32), tf.stack([tf.maximum(largest, 0.0), smallest, squares])


def _count_by_matmul(kinds: tf.Tensor) -> tf.Tensor:
    """Counts by one matmul of two one-hot matrices, 17 kinds of the first digit times 16 of the second."""
    size = tf.size(kinds) if kinds.shape[0] is None else kinds.shape[0]
    parts = -(-size // _PART)
    # What fills up the last part is of a kind of its own.
    kinds = tf.pad(kinds, [[0, parts * _PART - size]], constant_values=_COUNTS)
    kinds = tf.reshape(kinds, [parts, _PART])
    first = tf.one_hot(tf.bitwise.right_shift(kinds, 4), 17, dtype=tf.float32)
    second = tf.one_hot(tf.bitwise.bitwise_and(kinds, 15), 16, dtype=tf.float32)
    # Counts of one part are whole numbers below 2**24, which float32 adds up without an error.
    counts = tf.reduce_sum(tf.cast(tf.matmul(first, second, transpose_a=True), tf.int32), 0)
    return tf.reshape(counts, [-1])[:_COUNTS]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics that were read from a graph, as NumPy values.

    Attributes:
        counts: int64 of shape (259,), as `statistics` returns them.
        largest: the largest finite magnitude.
        smallest: the smallest magnitude other than zero; infinity without one.
        squares: the sum of squares of the finite numbers.
    """

    counts: np.ndarray
    largest: float
    smallest: float
    squares: float

    @classmethod
    def of(cls, x: np.ndarray) -> "Statistics":
        """Returns the statistics of an array."""
        counts, values = statistics(tf.convert_to_tensor(x), in_xla=False)
        return cls(counts.numpy().astype(np.int64), *(float(value) for value in values.numpy()))

    @property
    def exponents(self) -> np.ndarray:
        """How many numbers have each exponent from -127 (float32's subnormal numbers) to 127."""
        return self.counts[: BINS - 1]

    @property
    def size(self) -> int:
        """How many numbers were counted."""
        return int(self.counts.sum())

    @property
    def zeros(self) -> int:
        """How many numbers are zero."""
        return int(self.counts[_ZEROS])

    @property
    def infinities(self) -> int:
        """How many numbers are infinite."""
        return int(self.counts[_INFINITIES])

    @property
    def nans(self) -> int:
        """How many numbers are NaN."""
        return int(self.counts[_NANS])

    @property
    def nonfinite(self) -> int:
        """How many numbers are infinite or NaN."""
        return self.infinities + self.nans

    @property
    def rms(self) -> float:
        """The root of the mean square of the finite numbers."""
        finite = self.size - self.nonfinite
        return float(np.sqrt(self.squares / finite)) if finite else 0.0

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.counts + other.counts,
            max(self.largest, other.largest),
            min(self.smallest, other.smallest),
            self.squares + other.squares,
        )

    def scaled(self, exponent: int) -> "Statistics":
        """Returns the statistics of the same numbers times `2**exponent`, in numbers that know no limits.

        The histogram keeps its length: what leaves it stands in its first or last bin.
        """
        exponents = np.zeros(BINS - 1, np.int64)
        places = np.clip(np.arange(BINS - 1) + exponent, 0, BINS - 2)
        np.add.at(exponents, places, self.exponents)
        factor = 2.0**exponent
        counts = np.concatenate([exponents, self.counts[BINS - 1 :]])
        return Statistics(counts, self.largest * factor, self.smallest * factor, self.squares * factor * factor)

    def share_below(self, exponent: int) -> float:
        """Returns the share of the finite numbers other than zero whose magnitude is below `2**exponent`."""
        return self._share(self.exponents[: max(exponent + _BIAS, 0)])

    def share_from(self, exponent: int) -> float:
        """Returns the share of the finite numbers other than zero whose magnitude is at least `2**exponent`."""
        return self._share(self.exponents[max(exponent + _BIAS, 0) :])

    def _share(self, exponents: np.ndarray) -> float:
        total = self.exponents.sum()
        return float(exponents.sum() / total) if total else 0.0
