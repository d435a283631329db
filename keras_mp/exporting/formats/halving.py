"""TensorFlow Lite and ONNX files whose larger constants are stored in 16 bits.

TensorFlow Lite's own pass makes every constant float16. It clamps what is larger than 65504, and makes tiny numbers 0,
such as the epsilon of a division. tf2onnx makes float32 constants of 16-bit ones that are cast.
"""

import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from keras_mp._compat import litert
from keras_mp.exporting.storage import holds

__all__ = ["halve_onnx", "halved_litert"]


def halve_onnx(file: pathlib.Path, dtype: str) -> None:
    """Stores float32 weights of two axes and more, as far as 16 bits hold them, in these, with a cast to float32.

    Args:
        file: an ONNX file, which is changed.
        dtype: "float16" or "bfloat16".
    """
    import onnx

    model = onnx.load(str(file))
    graph, casts = model.graph, []
    inputs = {each.name for each in graph.input}
    kind = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2 or tensor.name in inputs:
            continue
        value = onnx.numpy_helper.to_array(tensor)
        if not holds(value, dtype):
            continue
        stored = value.astype(tf.as_dtype(dtype).as_numpy_dtype).tobytes()
        wide, narrow = tensor.name, f"{tensor.name}/{dtype}"
        tensor.CopyFrom(onnx.helper.make_tensor(narrow, kind, tensor.dims, stored, raw=True))
        casts.append(onnx.helper.make_node("Cast", [narrow], [wide], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(file))


def halved_litert(content: bytes) -> bytes:
    """A file with float16 in place of float32 for constants of two axes and more that float16 holds.

    An operation DEQUANTIZE makes float32 of each when the file is loaded, as TensorFlow Lite's own pass has it.

    Args:
        content: of a float32 file.
    """
    schema = litert.lite_schema()
    model = litert.lite_model(content)
    widening = None
    for graph in model.subgraphs:
        named = {*map(int, graph.inputs), *map(int, graph.outputs)}
        operators = []
        for index, tensor in enumerate(list(graph.tensors)):
            value = _constant(model, tensor, schema)
            if index in named or value is None or not holds(value, "float16"):
                continue
            if widening is None:
                widening = _dequantize(model, schema)
            wide = schema.TensorT()
            wide.shape, wide.shapeSignature, wide.type = tensor.shape, tensor.shapeSignature, tensor.type
            wide.name, wide.buffer, wide.hasRank = tensor.name + b"/float32", 0, tensor.hasRank
            tensor.type, tensor.buffer = schema.TensorType.FLOAT16, len(model.buffers)
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(value.astype(np.float16).tobytes(), np.uint8)
            model.buffers.append(buffer)
            _read_instead(graph, index, len(graph.tensors))
            operator = schema.OperatorT()
            operator.opcodeIndex, operator.inputs, operator.outputs = widening, [index], [len(graph.tensors)]
            graph.tensors.append(wide)
            operators.append(operator)
        graph.operators = [*operators, *graph.operators]
    _drop_unread(model)
    return litert.lite_bytes(model)


def _constant(model: Any, tensor: Any, schema: Any) -> np.ndarray | None:
    """The value of a float32 constant with two axes or more."""
    data = model.buffers[tensor.buffer].data
    if tensor.type != schema.TensorType.FLOAT32 or data is None or tensor.shape is None or len(tensor.shape) < 2:
        return None
    if tensor.sparsity is not None or tensor.isVariable or len(data) != 4 * np.prod(tensor.shape):
        return None
    return np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.float32).reshape(tensor.shape)


def _dequantize(model: Any, schema: Any) -> int:
    """The place of the operation among those of the file, of the first version that takes float16."""
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    code.version = 3
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _read_instead(graph: Any, before: int, after: int) -> None:
    for operator in graph.operators:
        operator.inputs = [after if each == before else int(each) for each in operator.inputs]


def _drop_unread(model: Any) -> None:
    """Empties the buffers that no tensor has any more; their places must stay."""
    read = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    read |= {each.buffer for each in model.metadata or []}
    for place, buffer in enumerate(model.buffers):
        if place not in read:
            buffer.data = None
