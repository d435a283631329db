"""Replaces functions of TensorFlow and Keras so that their own tracebacks stay as they were."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["around", "drop_frame", "replaced"]


def around(
    function: Callable[..., Any],
    before: Callable[..., None] | None = None,
    after: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns a function that calls another one, and has no frame in the traceback of its errors.

    Args:
        function: the function to call.
        before: gets the arguments before the call.
        after: gets the result and the arguments. It returns the result to pass on.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            drop_frame(error)
            raise  # a bare `raise` adds no frame
        return result if after is None else after(result, *args, **kwargs)

    return call


def drop_frame(error: BaseException) -> None:
    """Removes the caller's frame from the traceback of an error that the caller has just caught."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


_lock = threading.Lock()

# For each function that is replaced now: how many blocks need it so, and the function to put back. None stands for an
# inherited function.
_in_place: dict[tuple[Any, str], tuple[int, Any]] = {}


@contextlib.contextmanager
def replaced(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Replaces functions of a module or class inside a `with` block. Threads may run such blocks at the same time.

    The replacement is in place for all threads, so it must ask a context variable whether its own block runs.

    Args:
        owner: the module or class.
        **functions: the replacements by name, the same ones in each block.
    """
    with _lock:
        for name, function in functions.items():
            count, original = _in_place.get((owner, name), (0, vars(owner).get(name)))
            _in_place[owner, name] = count + 1, original
            setattr(owner, name, function)
    try:
        yield
    finally:
        with _lock:
            for name in functions:
                count, original = _in_place.pop((owner, name))
                if count > 1:
                    _in_place[owner, name] = count - 1, original
                elif original is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)
