"""Kinds of TensorFlow operations: those that compute, move or count numbers."""

import tensorflow as tf

__all__ = ["computes", "counts_and_goes_on", "goes_into_matmul", "to_integer"]

# Operations that make new numbers from many. Behind them the numbers are activations.
_COMPUTING = ("MatMul", "Conv", "Einsum", "Call", "While", "If", "Case")  # parts of their names
# Operations that pass numbers on unchanged.
MOVING = (
    "Identity", "Cast", "Reshape", "Transpose", "ExpandDims", "Squeeze", "Slice", "StridedSlice", "Pad", "PadV2",
    "ConcatV2", "Pack", "Unpack", "Split", "SplitV", "Tile", "BroadcastTo", "StopGradient", "EnsureShape", "ReverseV2",
    "MirrorPad",
)  # fmt: skip
# Operations whose results do not depend on their inputs' values.
STRUCTURE = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")
COUNTING = ("Range", "Cumsum", "LinSpace")


def to_integer(operation: tf.Operation) -> bool:
    """Whether an operation makes integers of floats."""
    kind, inputs = operation.type, operation.inputs
    if not inputs or not inputs[0].dtype.is_floating:
        return False
    return kind in ("ArgMax", "ArgMin") or (kind == "Cast" and operation.outputs[0].dtype.is_integer)


def computes(operation: tf.Operation) -> bool:
    """Whether an operation makes new numbers, which are activations."""
    return any(mark in operation.type for mark in _COMPUTING)


def counts_and_goes_on(operations: list[tf.Operation]) -> bool:
    """Whether code counts, and goes on with the counts as floats."""
    names: set[str] = set()
    for operation in operations:
        if operation.type in COUNTING:
            if operation.outputs[0].dtype.is_floating:
                return True
            names |= {output.name for output in operation.outputs}
        elif operation.outputs and any(each.name in names for each in operation.inputs):
            if operation.type in STRUCTURE or operation.outputs[0].dtype.is_bool:
                continue
            if operation.outputs[0].dtype.is_floating and "Gather" not in operation.type and operation.type != "OneHot":
                return True
            if operation.outputs[0].dtype.is_integer:
                names |= {output.name for output in operation.outputs}
    return False


def goes_into_matmul(operations: list[tf.Operation], inputs: list[tf.Tensor]) -> bool:
    """Whether a layer only moves these inputs and multiplies them by its weights."""
    names = {each.name for each in inputs}
    for operation in operations:
        if not any(each.name in names for each in operation.inputs) or operation.type in STRUCTURE:
            continue
        if operation.type in MOVING:
            if to_integer(operation):
                return False
            names |= {output.name for output in operation.outputs}
        elif not computes(operation) and any(
            each.name in names and each.dtype.is_floating for each in operation.inputs
        ):
            return False
    return True
