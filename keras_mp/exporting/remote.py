"""Exports at URLs: made and verified in a local folder, then copied by TensorFlow's file systems."""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

import tensorflow as tf

from keras_mp.errors import ExportError
from keras_mp.exporting.publishing import is_litter, writing

__all__ = ["fetched", "is_url", "staged"]

Place = pathlib.Path | str

# A letter alone is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)


def is_url(path: "str | os.PathLike[str]") -> bool:
    """Whether a path is a URL that is no local file's.

    Args:
        path: what the user gave.

    Raises:
        ExportError: a URL that TensorFlow cannot read or write here.

    Example:

    >>> is_url("ram://models/digits"), is_url("file:///tmp/digits"), is_url("saved_models/digits")
    (True, False, False)
    """
    return isinstance(_place(path), str)


@contextlib.contextmanager
def staged(
    path: "str | os.PathLike[str]", *, file: bool
) -> Iterator[tuple[pathlib.Path, Callable[[pathlib.Path], Place]]]:
    """Where to write an export locally, and what brings it to its place.

    For a local path both are the path itself. A URL is looked at first, so that nothing is made for one that cannot be
    written to. A version that failed its verification stays in the local folder.

    Args:
        path: what the user gave.
        file: whether a file is going to be written, else a version in a folder.

    Raises:
        ExportError: a URL that TensorFlow cannot write to, or a folder there that is not a model's own.
        ExportWriteError: it could not be written.
    """
    place = _place(path)
    if isinstance(place, pathlib.Path):
        yield place, lambda written: written
        return
    with writing(place):
        there = tf.io.gfile.exists(place)  # says where a server is not reached, as a list of files does not
    if not file:
        _check_folder(place, there)
    with writing(tempfile.gettempdir()):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="keras-mp-"))
    try:
        local = folder / place.rsplit("/", 1)[1]
        yield local, lambda written: _copy_file(written, place) if file else _copy_version(written, place)
    finally:
        if not any(folder.glob("*/.failed-*")):  # of which the user is told
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fetched(path: "str | os.PathLike[str]") -> Iterator[pathlib.Path]:
    """A local copy of what stands at a URL; a local path itself.

    Args:
        path: what the user gave.

    Raises:
        ExportError: it cannot be read.
    """
    place = _place(path)
    if isinstance(place, pathlib.Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="keras-mp-", ignore_cleanup_errors=True) as name:
        local = pathlib.Path(name, place.rsplit("/", 1)[1])
        try:
            _fetch(place, local)
        except (tf.errors.OpError, OSError) as error:
            raise ExportError(f"{place!r} could not be read: {_first_line(error)}") from error
        yield local


def _place(path: "str | os.PathLike[str]") -> Place:
    text = os.fspath(path)
    found = _URL.fullmatch(text)
    if found is None:
        return pathlib.Path(path)
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if len(slashes) == 1:
        raise ExportError(
            f"{text!r} looks like a URL that lost a slash, as pathlib.Path takes it away. Type "
            f"{f'{scheme}://{rest}'!r} as a string, or {f'./{text}'!r} for a local folder of that name."
        )
    if scheme == "file":
        if len(slashes) < 3:
            raise ExportError(
                f"{text!r} names a machine, and files of other machines cannot be written. Type {f'file:///{rest}'!r} "
                "or the path alone."
            )
        return pathlib.Path("/", rest)
    known = {each for each in tf.io.gfile.get_registered_schemes() if each}
    if scheme not in known:
        raise ExportError(
            f"TensorFlow {tf.__version__} has no file system for {text!r} here; it has "
            f"{', '.join(f'{each}://' for each in sorted(known))}. Export to a local folder and copy that, or import "
            "the package that brings the file system, such as tensorflow_io, first."
        )
    url = f"{scheme}://{(slashes[2:] + rest).strip('/')}"
    if url.endswith("://"):
        raise ExportError(f"{text!r} names no folder. Type one, such as '{scheme}://models/digits'.")
    return url


def _check_folder(url: str, there: bool) -> None:
    """Refuses what `layout.check_folder` does, but for a version that is not whole: another process may write it."""
    if url.rsplit("/", 1)[1].isdecimal():
        raise ExportError(
            f"The last part of {url!r} is a number, and a server takes it for a version. Name the model's folder; the "
            "version is chosen by the export."
        )
    if not there:
        return
    with writing(url):
        if not tf.io.gfile.isdir(url):
            raise ExportError(f"{url!r} is a file. Name a folder of the model's own, such as {f'{url}_versions'!r}.")
        others = sorted(name for name in _list(url) if not is_litter(name) and not name.isdecimal())
    if others:
        raise ExportError(
            f"{url!r} holds something that is not a version of a SavedModel: {', '.join(others[:5])}"
            f"{', ...' if len(others) > 5 else ''}. Name a folder of the model's own, such as {f'{url}/digits'!r}."
        )


def _copy_version(version: pathlib.Path, url: str) -> str:
    """Copies a version to the next free number.

    No rename: stores of objects have none of folders, and `tf.io.gfile.rename` copies object by object there. What
    makes a folder a SavedModel, which is its graph, comes last instead. To make a folder fails where it is there, so of
    two exports each gets a number of its own.
    """
    with writing(url):
        tf.io.gfile.makedirs(url)
        first = 1 + max((int(name) for name in _list(url) if name.isdecimal()), default=0)
        for number in itertools.count(first):
            target = f"{url}/{number}"
            with contextlib.suppress(tf.errors.AlreadyExistsError):
                tf.io.gfile.mkdir(target)
                break
        try:
            files = sorted(each for each in version.rglob("*") if each.is_file())
            for each in sorted(files, key=lambda each: each.name == "saved_model.pb"):
                name = each.relative_to(version).as_posix()
                tf.io.gfile.makedirs(f"{target}/{name}".rsplit("/", 1)[0])
                tf.io.gfile.copy(str(each), f"{target}/{name}")
        except BaseException:
            with contextlib.suppress(tf.errors.OpError):
                tf.io.gfile.rmtree(target)
            raise
    return target


def _copy_file(file: pathlib.Path, url: str) -> str:
    """Copies a file under another name and renames it, which stores of objects do with a file as a whole."""
    folder = url.rsplit("/", 1)[0]
    target, unfinished = f"{folder}/{file.name}", f"{folder}/.unfinished-{os.urandom(8).hex()}"
    with writing(target):
        try:
            if not folder.endswith(":/"):
                tf.io.gfile.makedirs(folder)
            tf.io.gfile.copy(str(file), unfinished)
            tf.io.gfile.rename(unfinished, target, overwrite=True)
        except BaseException:
            with contextlib.suppress(tf.errors.OpError):
                tf.io.gfile.remove(unfinished)
            raise
    return target


def _fetch(url: str, local: pathlib.Path) -> None:
    if not tf.io.gfile.isdir(url):
        if tf.io.gfile.exists(url):
            tf.io.gfile.copy(url, str(local))
        return
    for folder, _, files in tf.io.gfile.walk(url):
        here = local / folder[len(url) :].strip("/")
        here.mkdir(parents=True, exist_ok=True)
        for name in files:
            tf.io.gfile.copy(f"{folder.rstrip('/')}/{name}", str(here / name))


def _list(url: str) -> list[str]:
    return [name.rstrip("/") for name in tf.io.gfile.listdir(url)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
