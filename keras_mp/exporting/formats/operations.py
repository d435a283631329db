"""Graphs in operations that other runtimes have: OpenVINO knows no bfloat16 constant, tf2onnx no `Erfc`."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

__all__ = ["widen_constants", "without_erfc"]


def widen_constants(path: pathlib.Path) -> int:
    """Makes each bfloat16 constant of a SavedModel a float32 one and a cast, which has the very same value.

    Args:
        path: the SavedModel's folder.

    Returns:
        How many there were.
    """
    return _rewrite(path, _widen, ":output:0", ":y:0")


def without_erfc(path: pathlib.Path) -> int:
    """Makes each `Erfc` of a SavedModel, as gelu has it, 1 - `Erf`.

    Which is as good to a float32's rounding of 1, not of the smallest values.

    Args:
        path: the SavedModel's folder.

    Returns:
        How many there were.
    """
    return _rewrite(path, _subtract, ":y:0", ":z:0")


def _rewrite(path: pathlib.Path, change: Callable[[Any, bool], list[str]], before: str, after: str) -> int:
    """Changes nodes in place; in a function a tensor has the name that its operation gives it: `before`, `after`."""
    file = path / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    changed = 0
    for meta_graph in saved.meta_graphs:
        changed += len(change(meta_graph.graph_def.node, False))
        for function in meta_graph.graph_def.library.function:
            names = change(function.node_def, True)
            changed += len(names)
            renamed = {f"{name}{before}": f"{name}{after}" for name in names}
            for node in function.node_def:
                for position, tensor in enumerate(node.input):
                    node.input[position] = renamed.get(tensor, tensor)
            for key, tensor in function.ret.items():
                function.ret[key] = renamed.get(tensor, tensor)
    if changed:
        file.write_bytes(saved.SerializeToString(deterministic=True))
        # TensorFlow's own is one of the file as it was. None is needed, and keras_mp.json has the file's SHA-256.
        (path / "fingerprint.pb").unlink(missing_ok=True)
    return changed


def _widen(nodes: Any, in_function: bool) -> list[str]:
    bfloat16, float32 = tf.bfloat16.as_datatype_enum, tf.float32.as_datatype_enum
    constants = [node for node in nodes if node.op == "Const" and node.attr["dtype"].type == bfloat16]
    for node in constants:
        wide = nodes.add()
        wide.CopyFrom(node)
        wide.name = f"{node.name}/float32"
        value = tf.make_ndarray(node.attr["value"].tensor).astype(np.float32)
        wide.attr["dtype"].type = float32
        wide.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, tf.float32))
        node.op = "Cast"
        for name in ("dtype", "value"):
            del node.attr[name]
        node.attr["SrcT"].type, node.attr["DstT"].type = float32, bfloat16
        node.attr["Truncate"].b = False
        node.input.insert(0, f"{wide.name}:output:0" if in_function else wide.name)
    return [node.name for node in constants]


def _subtract(nodes: Any, in_function: bool) -> list[str]:
    found = [node for node in nodes if node.op == "Erfc"]
    for node in found:
        one, erf = nodes.add(), nodes.add()
        erf.CopyFrom(node)
        erf.name, erf.op = f"{node.name}/erf", "Erf"
        dtype = node.attr["T"].type
        one.name, one.op = f"{node.name}/one", "Const"
        one.attr["dtype"].type = dtype
        one.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(1, tf.as_dtype(dtype)))
        node.op = "Sub"
        del node.input[:]
        node.input.extend([f"{one.name}:output:0", f"{erf.name}:y:0"] if in_function else [one.name, erf.name])
    return [node.name for node in found]
