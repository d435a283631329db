"""One output of an export beside the model's: how far they are apart, and whether rounding explains it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from keras_mp.errors import ExportError
from keras_mp.exporting.storage import tolerance_of

__all__ = ["OutputReport", "comparable", "compare", "differing_share", "limit_of", "measure"]

ADVICE = "Export the model again."


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """What one output of an export was found to be.

    Attributes:
        dtype: the name of its dtype, such as "float32".
        shape: its shape for the batch.
        finite: whether every value is finite.
        largest_error: the largest absolute difference from the model's output; of strings 1 where one differs.
        relative_error: that, over the largest absolute value of the model's output; of integers, booleans and strings
            the share of them that differs.
    """

    dtype: str
    shape: tuple[int, ...]
    finite: bool
    largest_error: float
    relative_error: float


def measure(found: np.ndarray, expected: np.ndarray) -> OutputReport:
    """How far two arrays of one shape are apart. Infinities of one sign are equal, and so are two NaN.

    Args:
        found: what the export returns.
        expected: what it should.

    Example:

    >>> measure(np.array([1.0, np.nan]), np.array([2.0, np.nan])).relative_error
    0.5
    """
    same = found == expected
    if not np.issubdtype(found.dtype, np.floating):
        share = 1 - float(np.mean(same)) if same.size else 0.0
        numbers = np.issubdtype(found.dtype, np.integer)
        error = float(np.max(np.abs(found.astype("float64") - expected), initial=0.0)) if numbers else float(share > 0)
        return OutputReport("string" if found.dtype.kind == "S" else found.dtype.name, found.shape, True, error, share)
    same |= np.isnan(found) & np.isnan(expected)
    with np.errstate(invalid="ignore"):
        error = float(np.max(np.where(same, 0.0, np.abs(found.astype("float64") - expected)), initial=0.0))
    largest = float(np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0))
    relative = error / largest if largest else (0.0 if error == 0 else float("inf"))
    return OutputReport(found.dtype.name, found.shape, bool(np.isfinite(found).all()), error, relative)


def comparable(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """What an export should return, with its own values where the model's is not finite.

    Args:
        found: what the export returns.
        expected: what the model returns.
    """
    if not np.issubdtype(expected.dtype, np.floating) or found.shape != expected.shape:
        return expected
    return np.where(np.isfinite(expected), expected, found).astype(expected.dtype)


def compare(
    name: str,
    found: np.ndarray,
    expected: np.ndarray,
    limit: float,
    rounding: float | None = None,
    cause: Callable[[], str] = lambda: ADVICE,
) -> OutputReport:
    """Compares one output.

    Args:
        name: the output's.
        found: what the export returns.
        expected: what it should.
        limit: largest error relative to the largest value; of integers and strings the share that may differ.
        rounding: what rounding explains, for the message; None for the limit.
        cause: says where the difference comes from and what to do, where there is one.

    Raises:
        ExportError: dtype, shape or values differ.
    """
    strings = found.dtype.kind == expected.dtype.kind == "S"  # their dtype has the length of the longest
    if (found.dtype != expected.dtype and not strings) or found.shape != expected.shape:
        raise ExportError(
            f"Output {name!r} of the export is {found.dtype} of shape {found.shape}; expected {expected.dtype} of "
            f"shape {expected.shape}. {ADVICE}"
        )
    report = measure(found, expected)
    if report.relative_error <= limit:
        return report
    if not np.issubdtype(found.dtype, np.floating):
        raise ExportError(
            f"Output {name!r} of the export differs from the model's in {report.relative_error:.2g} of its values. "
            f"{cause()}"
        )
    if not np.isfinite(report.largest_error):
        ours, theirs = ("export", "model") if np.isfinite(expected).all() else ("model itself", "export")
        raise ExportError(f"Output {name!r} of the {ours} is NaN or infinite where the {theirs}'s is not. {cause()}")
    raise ExportError(
        f"Output {name!r} of the export differs from the model's by {report.largest_error:g}, which is "
        f"{report.relative_error:.2g} of its largest value; rounding explains "
        f"{limit if rounding is None else rounding:g}. {cause()}"
    )


def limit_of(array: np.ndarray, dtypes: "set[str]") -> float:
    """The error of an output that rounding explains, relative to its largest value; of integers the share.

    Args:
        array: the output.
        dtypes: those that are computed in, and the output's own.
    """
    if np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16":
        return tolerance_of(dtypes)
    return differing_share(dtypes)


def differing_share(dtypes: "set[str]") -> float:
    """How many integers of an output may differ: of two scores that 16 bits make equal the largest may be either.

    Args:
        dtypes: those that are computed in.
    """
    return 0.5 if dtypes & {"float16", "bfloat16"} else 0.0
