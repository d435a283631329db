"""Constants that other runtimes can read: OpenVINO knows no bfloat16 constant, and casts to bfloat16 it does."""

import pathlib
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

__all__ = ["widen_constants"]


def widen_constants(path: pathlib.Path) -> int:
    """Makes each bfloat16 constant of a SavedModel a float32 one and a cast, which has the very same value.

    Args:
        path: the SavedModel's folder.

    Returns:
        How many there were.
    """
    file = path / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    changed = 0
    for meta_graph in saved.meta_graphs:
        changed += len(_widen(meta_graph.graph_def.node, ""))
        for function in meta_graph.graph_def.library.function:
            names = _widen(function.node_def, ":output:0")
            changed += len(names)
            # In a function a tensor has the name that its operation gives it, and a cast calls it "y".
            renamed = {f"{name}:output:0": f"{name}:y:0" for name in names}
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


def _widen(nodes: Any, suffix: str) -> list[str]:
    """Changes the constants in a list of nodes, and answers with their names; `suffix` is what a tensor's name adds."""
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
        node.input.insert(0, wide.name + suffix)
    return [node.name for node in constants]
