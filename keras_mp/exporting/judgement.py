"""What an export's errors against its model mean: nothing, a warning, or that it is not published."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np

from keras_mp.errors import ExportError, KerasMPWarning
from keras_mp.exporting.comparison import ADVICE, comparable, compare, differing_share, limit_of, measure
from keras_mp.exporting.storage import far_beyond
from keras_mp.exporting.traced import Graph
from keras_mp.policies.policy import stacklevel

__all__ = ["judge"]

Arrays = Mapping[str, Mapping[str, np.ndarray]]


def judge(
    graph: Graph,
    found: Arrays,
    expected: Arrays,
    dtypes: "set[str]",
    cause: Callable[[str, float], "str | None"],
    *,
    refuse: bool,
) -> dict[str, dict[str, dict[str, float]]]:
    """Compares an export with the model itself.

    Where the model's own output is not finite there is nothing to compare with, which a warning says.

    Args:
        graph: what is exported.
        found: for each signature what the export returned, by name.
        expected: likewise what the model returned.
        dtypes: those that both compute in and store weights in.
        cause: from a signature and a limit of the error to where it comes from.
        refuse: whether an error far beyond rounding is one; else it is a warning.

    Returns:
        For each signature and output the largest error and the relative one.

    Raises:
        ExportError: an error far beyond rounding, and which layer it comes from.

    Warns:
        KerasMPWarning: for an error beyond rounding, and for a model that is not finite.
    """
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for signature, outputs in expected.items():
        errors[signature] = {}
        for name, own in outputs.items():
            array, got = comparable(found[signature][name], own), found[signature][name]
            _warn_of_nonfinite(graph, signature, name, got, own, cause)
            rounding = limit_of(array, dtypes)
            is_float = np.issubdtype(array.dtype, np.floating)
            limit = far_beyond(dtypes) if is_float else differing_share(dtypes)
            if refuse:
                try:
                    compare(name, got, array, limit, rounding, lambda: "")
                except ExportError as error:
                    model, origin = graph.models[signature].name, cause(signature, rounding) or ADVICE
                    raise ExportError(
                        f"The export of {model!r} differs from the model far beyond rounding, so it was not published. "
                        f"{str(error).strip()} {origin} Where that is what you want, type verify=False."
                    ) from error
            report = measure(got, array)
            errors[signature][name] = {"largest": report.largest_error, "relative": report.relative_error}
            if not report.relative_error <= rounding:
                warnings.warn(
                    f"Output {name!r} of {signature!r} differs from the model's by {report.relative_error:.2g} of its "
                    f"largest value; rounding explains {rounding:g}. Verify it with rows of your own: "
                    "keras_mp.verify_export(path, model, batch).",
                    KerasMPWarning,
                    stacklevel=stacklevel(),
                )
    return errors


def _warn_of_nonfinite(
    graph: Graph,
    signature: str,
    name: str,
    found: np.ndarray,
    own: np.ndarray,
    cause: Callable[[str, float], "str | None"],
) -> None:
    """Infinities that both return are meant, as in logits that are masked."""
    if not np.issubdtype(own.dtype, np.floating) or found.shape != own.shape:
        return
    bad = np.isnan(own) | (~np.isfinite(own) & (found != own))
    if bad.any():
        where = cause(signature, far_beyond({"bfloat16"})) or ""
        warnings.warn(
            f"Output {name!r} of the model itself is not finite in {bad.mean():.2g} of its values for these rows, and "
            f"there is nothing to compare with there. {where} Give rows that it works with: export(..., batch=rows).",
            KerasMPWarning,
            stacklevel=stacklevel(),
        )
