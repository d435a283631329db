"""TensorFlow's graphs. Each test fails with the private name in its docstring when that moves."""

import tensorflow as tf

from keras_mp._compat import tf_graphs


def test_the_outputs_of_an_op_have_places_by_name():
    """Rests on `op_def_registry.get` of `tensorflow.python.framework`."""
    x = tf.ones((2, 4, 4, 3))
    split = tf.function(lambda x: (tf.split(x, 3, axis=3), tf.raw_ops.TopKV2(input=x, k=1)))
    nodes = {node.op: node for node in split.get_concrete_function(x).graph.as_graph_def().node}
    assert tf_graphs.output_places(nodes["Split"]) == {"output": 0}
    assert tf_graphs.output_places(nodes["TopKV2"]) == {"values": 0, "indices": 1}
    unknown = type(nodes["Split"])(op="NoSuchOp")
    assert tf_graphs.output_places(unknown) == {}


def test_functions_that_an_operation_calls_are_found():
    """Rests on `Graph._get_function`."""

    @tf.function
    def inner(x):
        return tf.sin(x)

    def calling(x):
        return tf.cond(x > 0, lambda: tf.cos(x), lambda: tf.while_loop(lambda x: x < 0, lambda x: [inner(x)], [x])[0])

    found = set()

    def visit(graph):
        for op in graph.get_operations():
            found.add(op.type)
            for _, function in tf_graphs.called_functions(op):
                visit(function)

    visit(tf.function(calling).get_concrete_function(tf.constant(1.0)).graph)
    assert {"Cos", "Sin"} <= found


def test_a_scratch_graph_reads_variables_and_changes_nothing():
    """Rests on `tf.__internal__.FuncGraph`."""
    variable = tf.Variable(1.0)
    graph = tf_graphs.scratch_graph()
    with graph.as_default():
        result = variable.assign_add(1.0) + tf.compat.v1.placeholder(tf.float32, ())
    assert result.graph is graph
    assert "AssignAddVariableOp" in {op.type for op in graph.get_operations()}
    assert float(variable) == 1.0
