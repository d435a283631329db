"""Derivatives of functions by tapes, and what their graphs hold."""

import tensorflow as tf


def with_two_derivatives(function, jit_compile):
    """Returns a graph function of another's results, and of two derivatives of the sum of the first one.

    Args:
        function: from a tensor to a tuple of tensors.
        jit_compile: whether XLA compiles all of it.
    """

    @tf.function(jit_compile=jit_compile)
    def derivatives(x):
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                answers = function(x)
            slope = first.gradient(answers[0], x)
        return *answers, slope, second.gradient(slope, x)

    return derivatives


def early_operations(layer, shape, dtype, known=True, **call):
    """Returns the types of the ops of a backward pass that make images and do not depend on the incoming gradient.

    TensorFlow runs them in the forward pass, and keeps the images until the backward pass.

    Args:
        layer: from images to images, built.
        shape: of its input, (batch, height, width, channels).
        dtype: of its input.
        known: whether the graph knows height and width.
        **call: what else it is called with.
    """
    found = []

    @tf.function(autograph=False)
    def step(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **call)
        graph = tf.compat.v1.get_default_graph()
        before = set(graph.get_operations())
        gradients = tape.gradient(y, [x, *layer.trainable_variables], upstream)
        for operation in graph.get_operations():
            # Zeros are there for outputs that have no gradient, and are not computed where nobody takes them.
            computes = operation not in before and operation.type not in ("Const", "ZerosLike")
            makes_images = any(len(t.shape or []) == 4 and t.shape[0] == shape[0] for t in operation.outputs)
            if computes and makes_images and not _depends_on(operation, upstream.op):
                found.append(operation.type)
        return gradients

    shapes = (shape, layer.compute_output_shape(shape))
    shapes = [each if known else (each[0], None, None, each[3]) for each in shapes]
    step.get_concrete_function(*(tf.TensorSpec(each, dtype) for each in shapes))
    return found


def _depends_on(operation, event):
    seen, open_ = set(), [operation]
    while open_:
        current = open_.pop()
        if current is event:
            return True
        if current not in seen:
            seen.add(current)
            open_ += [*(tensor.op for tensor in current.inputs), *current.control_inputs]
    return False


def executed_products(function, argument, folder):
    """Returns the kinds of matmul in the graph that TensorFlow executed, after its optimizers.

    Args:
        function: a graph function of a tensor.
        argument: that tensor.
        folder: an empty one, for a log.
    """
    writer = tf.summary.create_file_writer(str(folder))
    tf.summary.trace_on(graph=True, profiler=False)
    function(argument)
    with writer.as_default():
        tf.summary.trace_export("graph", step=0)
    writer.close()
    ops = set()
    for file in folder.iterdir():
        for record in tf.compat.v1.io.tf_record_iterator(str(file)):
            for value in tf.compat.v1.Event.FromString(record).summary.value:
                metadata = tf.compat.v1.RunMetadata.FromString(value.tensor.string_val[0])
                for graphs in metadata.function_graphs:
                    ops |= {node.op for graph in graphs.partition_graphs for node in graph.node}
    return {op for op in ops if "MatMul" in op}
