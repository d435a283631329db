"""Where code runs. Each test fails with the private name in its docstring when that moves."""

import tensorflow as tf

from keras_mp._compat import execution
from tests.helpers.derivatives import with_two_derivatives


def test_in_xla_context_tells_who_compiles():
    """Rests on `tensorflow.python.ops.control_flow_util.GraphOrParentsInXlaContext`."""
    seen = {}

    def look(name):
        seen[name] = execution.in_xla_context()

    look("eager")
    tf.function(lambda: look("graph"))()
    tf.function(lambda: look("xla"), jit_compile=True)()
    tf.function(lambda: tf.function(lambda: look("inside xla"))(), jit_compile=True)()
    tf.function(lambda: tf.function(lambda: look("xla inside"), jit_compile=True)())()
    assert seen == {"eager": False, "graph": False, "xla": True, "inside xla": True, "xla inside": True}


def test_the_optimization_barrier_changes_no_number():
    """Rests on `tensorflow.compiler.tf2xla.python.xla.optimization_barrier`."""
    triple = with_two_derivatives(lambda x: (3 * tf.square(execution.optimization_barrier(x)),), jit_compile=True)
    y, slope, curvature = triple(tf.constant([1.0, -2.0]))
    assert y.numpy().tolist() == [3.0, 12.0]
    assert slope.numpy().tolist() == [6.0, -12.0]
    assert curvature.numpy().tolist() == [6.0, 6.0]
    hlo = triple.experimental_get_compiler_ir(tf.zeros([2]))(stage="hlo")
    assert "opt-barrier" in hlo


def test_recording_tells_when_a_tape_watches():
    """Rests on `tensorflow.python.eager.record.could_possibly_record`."""
    seen = {}

    def look(name):
        seen[name] = execution.recording()

    @tf.function
    def program():
        look("graph")
        with tf.GradientTape():
            look("graph, tape")

    look("eager")
    with tf.GradientTape():
        look("eager, tape")
    program()
    assert seen == {"eager": False, "eager, tape": True, "graph": False, "graph, tape": True}


def test_inside_of_a_vectorized_map_nothing_records():
    """Rests on the frames of `tensorflow.python.ops.parallel_for.control_flow_ops`."""
    seen = {}

    def look(name, x):
        seen[name] = execution.recording()
        return x

    rows = tf.ones((2, 3))
    with tf.GradientTape() as tape:
        tape.watch(rows)
        tf.vectorized_map(lambda x: look("eager", x), rows)
        tf.function(lambda rows: tf.vectorized_map(lambda x: look("graph", x), rows))(rows)
        tf.map_fn(lambda x: look("map_fn", x), rows)
        look("outside", rows)
    assert seen == {"eager": False, "graph": False, "map_fn": True, "outside": True}


def test_forward_mode_tells_whether_an_accumulator_follows():
    """Rests on `tensorflow.python.eager.forwardprop_util.pack_tangents`."""
    x, weight, other = tf.constant(2.0), tf.Variable(3.0), tf.constant(1.0)
    assert not execution.forward_mode(x, other)
    with tf.GradientTape() as tape:
        tape.watch(x)
        assert not execution.forward_mode(x)
    for primal, follow in ((x, lambda: x), (weight, lambda: tf.convert_to_tensor(weight))):
        with tf.autodiff.ForwardAccumulator(primal, tf.constant(1.0)):
            assert execution.forward_mode(other, follow() * 2)
            assert not execution.forward_mode(other)
        assert not execution.forward_mode(follow())
