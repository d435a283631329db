"""What float formats of 16 and of 8 bits lose of numbers, read off a histogram of exponents."""

import dataclasses
import math
from collections.abc import Iterable

from keras_mp.diagnostics.statistics import Statistics

__all__ = ["FORMATS", "Format", "best_loss_scale"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A float format.

    Attributes:
        name: its name in TensorFlow.
        limit: the magnitude from which on a number overflows when it is rounded to nearest.
        normal: exponent of the smallest normal number. Smaller numbers lose digits.
        tiny: exponent of half of the smallest subnormal number. Smaller numbers become zero.
        epsilon: the distance from 1 to the next number.

    The numbers are those of IEEE 754 for float16, of the OCP 8-bit Floating Point Specification for the two float8
    formats, and of float32 with 7 bits of mantissa for bfloat16.

    Example:

    >>> FORMATS["float16"].underflow(Statistics.of(np.array([1e-9, 1.0], "float32")))
    0.5
    """

    name: str
    limit: float
    normal: int
    tiny: int
    epsilon: float

    def overflow(self, found: Statistics, exponent: int = 0) -> float:
        """Returns the share of the numbers other than zero, times `2**exponent`, that overflow.

        The histogram knows numbers to a factor of two. In the octave of the limit, numbers are taken to be spread
        evenly over the logarithm; the largest number, which is known exactly, decides whether there are any.

        Args:
            found: statistics of the numbers.
            exponent: of the loss scale, a power of two.
        """
        largest = found.largest * 2.0**exponent
        if largest < self.limit:
            return 0.0
        octave = math.floor(math.log2(self.limit))
        whole = found.share_from(octave + 1 - exponent)
        inside = found.share_from(octave - exponent) - whole
        part = octave + 1 - math.log2(self.limit)
        return whole + inside * part

    def underflow(self, found: Statistics, exponent: int = 0) -> float:
        """Returns the share of the numbers other than zero, times `2**exponent`, that become zero."""
        return found.share_below(self.tiny - exponent)

    def subnormal(self, found: Statistics, exponent: int = 0) -> float:
        """Returns the share of the numbers other than zero, times `2**exponent`, that lose digits but do not vanish."""
        return found.share_below(self.normal - exponent) - self.underflow(found, exponent)


FORMATS = {
    each.name: each
    for each in (
        Format("float16", 65520.0, -14, -25, 2.0**-10),
        Format("bfloat16", (2 - 2.0**-8) * 2.0**127, -126, -134, 2.0**-7),
        # 464 itself, in the middle between 448 and the 480 that the format lacks, is rounded to 448.
        Format("float8_e4m3fn", 464.0 * (1 + 2.0**-23), -6, -10, 2.0**-3),
        Format("float8_e5m2", 61440.0, -14, -17, 2.0**-2),
    )
}


def best_loss_scale(gradients: Iterable[Statistics], format: Format, largest: int = 24) -> int:
    """Returns the exponent of the loss scale at which no gradient overflows and the fewest become zero.

    One factor of two stays free below the limit, as the gradients of other batches are larger.

    Args:
        gradients: statistics of gradients of the loss, not multiplied by a loss scale.
        format: the format that they are to be kept in.
        largest: the largest exponent to return.

    Example:

    >>> best_loss_scale([Statistics.of(np.array([1e-6, 2.0], "float32"))], FORMATS["float16"])
    13
    """
    found = list(gradients)
    most = max((each.largest for each in found), default=0.0)
    if not most:
        return 0
    room = math.floor(math.log2(format.limit / most)) - 1
    # As high as it goes: a loss scale that starts too low climbs by one factor of two in thousands of steps.
    return int(min(room, largest))
