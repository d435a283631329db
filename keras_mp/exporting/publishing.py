"""Where exports are written: numbered versions in a folder, each there in whole or not at all."""

import contextlib
import errno
import importlib
import itertools
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_mp.errors import ExportError, ExportWriteError

__all__ = [
    "check_folder",
    "is_litter",
    "publish",
    "put_aside",
    "refuse_full_disk",
    "replace",
    "require_saved_model",
    "unfinished",
    "versions",
    "writing",
]

# Windows has none; there a folder that a killed export left is not told from one in the making.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

# Serving systems take folders with an integer for a name, so what is no version has another one.
_UNFINISHED, _FAILED = ".unfinished-", ".failed-"
_PROBLEMS = (OSError, tf.errors.OpError)

# What desktops, file servers and editors leave in folders, besides names that begin with a dot.
_LITTER = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "lost+found",
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
}
_LITTER_ENDS = ("~", ".bak", ".orig", ".swp", ".swo", ".tmp")


def is_litter(name: str) -> bool:
    """Whether a file or folder was left by a desktop, a file server or an editor, and says nothing of its folder.

    Args:
        name: its name, without the folder.

    Example:

    >>> [is_litter(name) for name in (".DS_Store", "desktop.ini", "notes.txt~", "notes.txt")]
    [True, True, True, False]
    """
    folded = name.casefold()
    backup = folded.startswith("~$") or (folded.startswith("#") and folded.endswith("#"))
    return folded.startswith(".") or folded in _LITTER or folded.endswith(_LITTER_ENDS) or backup


def check_folder(folder: pathlib.Path) -> None:
    """Refuses a folder that is not one of a model's own.

    Args:
        folder: where versions are to be written.

    Raises:
        ExportError: it is a file, holds something else, or has a number for a name.
    """
    if folder.name.isdecimal():
        raise ExportError(
            f"The last part of {str(folder)!r} is a number, and a server takes it for a version. Name the model's "
            f"folder, such as {str(folder.parent)!r}; the version is chosen by the export."
        )
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(
            f"{str(folder)!r} is a file. Name a folder of the model's own, such as 'saved_models/digits'."
        )
    others = sorted(
        entry.name
        for entry in folder.iterdir()
        if not (is_litter(entry.name) or (entry.name.isdecimal() and (entry / "saved_model.pb").is_file()))
    )
    if others:
        raise ExportError(
            f"{str(folder)!r} holds something that is not a version of a SavedModel: {', '.join(others[:5])}"
            f"{', ...' if len(others) > 5 else ''}. Name a folder of the model's own, such as "
            f"{str(folder / 'digits')!r}."
        )


def versions(folder: pathlib.Path) -> list[int]:
    """The versions in a folder.

    Args:
        folder: the model's folder.
    """
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()]


def require_saved_model(path: pathlib.Path) -> None:
    """Refuses a folder that is not one version of a SavedModel.

    Args:
        path: the folder.

    Raises:
        ExportError: saying which version may be meant.
    """
    if not (path / "saved_model.pb").is_file() and not (path / "assets.extra" / "keras_mp.json").is_file():
        found = versions(path) if path.is_dir() else []
        hint = (
            f"One of its versions may be meant: {str(path / str(max(found)))!r}."
            if found
            else "Export a model there first."
        )
        raise ExportError(f"No SavedModel at {str(path)!r}: it has no file saved_model.pb. {hint}")


@contextlib.contextmanager
def unfinished(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder in the model's folder for a version in the making, which is taken away where it was not published.

    So are the folders that were made for it, and what exports that were killed have left.

    Args:
        folder: the model's folder; it is made, and its parents, where they are not there.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    path = None
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for each in made:
                _readable(each)  # under a umask of 077 a server could not even look for versions
            _sweep(folder)
            path = pathlib.Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        with _locked(path):
            yield path
    finally:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        for each in made:  # the innermost first
            with contextlib.suppress(OSError):
                each.rmdir()  # which fails where something is in it


@contextlib.contextmanager
def writing(path: "pathlib.Path | str") -> Iterator[None]:
    """Says in plain words that something could not be written.

    Args:
        path: what is being written.

    Raises:
        ExportWriteError: for a full disk or a folder that cannot be written to.
    """
    try:
        yield
    except ExportError:
        raise
    except _PROBLEMS as error:
        own = error.strerror if isinstance(error, OSError) else None
        reason = own or (str(error).splitlines() or [type(error).__name__])[0]
        reason = reason.rpartition("}} ")[2]  # TensorFlow's name for the node
        raise ExportWriteError(
            f"{str(path)!r} could not be written: {reason}. No version was published, and nothing half-written was "
            "left. Free space there, or name a folder that may be written to."
        ) from error


def refuse_full_disk(said: str) -> None:
    """Raises where another program failed for want of space.

    Args:
        said: what it said.

    Raises:
        OSError: as the system would have raised it here.
    """
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in said:
            raise OSError(number, os.strerror(number))


def replace(path: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a finished file in the place of one that may be there.

    Args:
        path: the file, on the same disk.
        target: its place.
    """
    _readable(path)
    _to_disk(path)
    os.replace(path, target)
    _to_disk(target.parent)


def publish(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Makes a version of a finished folder: the next free one, or the one after where another export is first.

    Args:
        path: what was written, in `folder`.
        folder: the model's folder.

    Returns:
        The folder of the version.
    """
    for directory, folders, files in os.walk(path):
        for name in [*folders, *files]:
            _readable(pathlib.Path(directory, name))
        for name in files:
            _to_disk(pathlib.Path(directory, name))
        _to_disk(pathlib.Path(directory))
    _readable(path)  # mkdtemp's 0700 would lock a server out that runs as another user
    first = 1 + max(versions(folder), default=0)
    published = _rename(path, folder, (str(number) for number in itertools.count(first)))
    _to_disk(folder)
    return published


def put_aside(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Keeps a folder that failed verification, under a name that no server takes for a version.

    Args:
        path: what was written, in `folder`.
        folder: the model's folder.
    """
    return _rename(path, folder, (f"{_FAILED}{number}" for number in itertools.count(1)))


def _rename(path: pathlib.Path, folder: pathlib.Path, names: Iterator[str]) -> pathlib.Path:
    for name in names:
        target = folder / name
        try:
            # Onto a folder with content this fails, so no version is ever written over.
            path.rename(target)
        except OSError:
            if not target.exists():
                raise
        else:
            return target
    raise AssertionError("the names end")


def _readable(path: pathlib.Path) -> None:
    mode = path.stat().st_mode & 0o777
    path.chmod(mode | (0o755 if path.is_dir() else 0o644))


def _to_disk(path: pathlib.Path) -> None:
    """Has the system write a file or the entries of a folder, so that a power cut cannot leave a version of holes."""
    if os.name == "nt":  # which opens no folder, and has no file written that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a folder as long as this process lives, by which others know that it is in the making."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every network file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: pathlib.Path) -> None:
    if fcntl is None:
        return
    for left in folder.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            # One that was just made may not be locked yet.
            if not any(left.iterdir()) and time.time() - left.stat().st_mtime < 3600:
                continue
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)
