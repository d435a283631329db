"""`keras_mp.json`: what an export says of itself, and by which a file that was truncated or changed is found."""

import hashlib
import json
import pathlib
from typing import Any

import tensorflow as tf

from keras_mp.errors import ExportError
from keras_mp.exporting.publishing import is_litter

__all__ = ["check_files", "read_record", "sizes_of", "write_record"]

# TensorFlow Serving reads nothing in assets.extra but its warm-up requests.
FILE = "assets.extra/keras_mp.json"
_FORMAT = 1


def write_record(path: pathlib.Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the facts with the size and SHA-256 of every other file, and a fingerprint over all of it.

    Args:
        path: the SavedModel's folder, complete but for this file.
        facts: what can be written as JSON.

    Returns:
        What was written.
    """
    files = {name: _facts_of(path / name) for name in _files(path)}
    record = {"format": _FORMAT, **facts, "files": files}
    record["fingerprint"] = _fingerprint(record)
    (path / FILE).write_text(json.dumps(record, indent=1) + "\n")
    return record


def read_record(path: "pathlib.Path | str") -> dict[str, Any] | None:
    """What an export says of itself; None where it was written by something else.

    Args:
        path: the SavedModel's folder, or its URL.

    Raises:
        ExportError: the file is there and is not what was written.
    """
    file = f"{path}/{FILE}"
    if not tf.io.gfile.exists(file):
        return None
    advice = "Copy the export again, or export the model again."
    try:
        with tf.io.gfile.GFile(file, "rb") as stream:
            record = json.loads(stream.read())
    except ValueError as error:
        raise ExportError(
            f"{FILE} of the export at {str(path)!r} was truncated or changed: {error}. {advice}"
        ) from error
    if record.get("format", 0) > _FORMAT:
        writer = record.get("versions", {}).get("keras_mp")
        raise ExportError(f"The export at {str(path)!r} was written by keras_mp {writer}. Verify it with that one.")
    if record.get("fingerprint") != _fingerprint(record):
        raise ExportError(
            f"{FILE} of the export at {str(path)!r} was changed: its fingerprint is not that of its content. {advice}"
        )
    return dict(record)


def check_files(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Compares the files of an export with what was written.

    Args:
        path: the SavedModel's folder.
        record: as `read_record` gave it.

    Raises:
        ExportError: naming each file that is missing, truncated or changed, or that was not there.
    """
    found, written = set(_files(path)), record["files"]
    faults = []
    for name, facts in written.items():
        if name not in found:
            faults.append(f"{name} is missing")
            continue
        here = _facts_of(path / name)
        if here["bytes"] < facts["bytes"]:
            faults.append(f"{name} was truncated: {here['bytes']} of {facts['bytes']} bytes")
        elif here != facts:
            faults.append(f"{name} was changed")
    others = (name for name in sorted(found - set(written)) if not any(map(is_litter, name.split("/"))))
    faults += [f"{name} was not written by the export" for name in others]
    if faults:
        raise ExportError(
            f"The export at {str(path)!r} is not what was written: {'; '.join(faults)}. Copy it again, or export the "
            "model again."
        )


def sizes_of(path: pathlib.Path) -> dict[str, int]:
    """Sizes in bytes of the graph, the variables, and all files.

    Args:
        path: the SavedModel's folder.
    """
    sizes = {name: (path / name).stat().st_size for name in _files(path)}
    return {
        "graph": sizes["saved_model.pb"],
        "variables": sum(size for name, size in sizes.items() if name.startswith("variables/")),
        "total": sum(sizes.values()),
    }


def _files(path: pathlib.Path) -> list[str]:
    names = (entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())
    return sorted(name for name in names if name != FILE)


def _facts_of(file: pathlib.Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _fingerprint(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
