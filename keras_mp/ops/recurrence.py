"""The loop of a recurrent layer over its steps, with a gradient of its own, and what masks do in it."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp.ops import fusion

__all__ = ["masked", "masked_product", "recurrence", "zero_unless"]


def zero_unless(there: Any, x: Any) -> Any:
    """`x` where something is there, else 0."""
    return tf.where(there, x, tf.zeros([], x.dtype))


def masked(x: Any, mask: Any, dtype: Any) -> Any:
    """What dropout leaves of `x`, multiplied in the dtype of the mask and rounded once."""
    return tf.cast(tf.cast(x, mask.dtype) * mask, dtype)


def masked_product(x: Any, kernel: Any, masks: Any, dtype: Any = None) -> Any:
    """`x @ kernel`, rounded to 16 bits; with a list of masks, one for each gate, the products of the masked `x`."""
    dtype = dtype or x.dtype
    if masks is None or not isinstance(masks, (list, tuple)):
        x = tf.cast(x, dtype) if masks is None else masked(x, masks, dtype)
        return tf.matmul(x, tf.cast(kernel, dtype))
    kernels = tf.split(tf.cast(kernel, dtype), len(masks), 1)
    return tf.concat([tf.matmul(masked(x, mask, dtype), part) for mask, part in zip(masks, kernels, strict=True)], -1)


def _loop(steps: Any, body: Callable[..., Sequence[Any]], variables: Sequence[Any], unroll: bool) -> Sequence[Any]:
    """Calls `body` with the number of each step and what it has answered the step before."""
    if unroll:
        for step in range(steps):
            variables = body(step, *variables)
        return variables
    # XLA needs the limit where it differentiates the loop, for a second derivative.
    return tf.while_loop(
        lambda step, *_: step < steps,
        lambda step, *variables: (step + 1, *body(step, *variables)),
        (tf.constant(0), *variables),
        maximum_iterations=steps,
    )[1:]


def _array(like: Any, size: Any) -> Any:
    """Room for tensors like this one. In eager code an array forgets what was read; the way back reads it again."""
    return tf.TensorArray(like.dtype, size, element_shape=like.shape, clear_after_read=False)


def _unstacked(values: Any) -> Any:
    array = tf.TensorArray(
        values.dtype, keras.ops.shape(values)[0], element_shape=values.shape[1:], clear_after_read=False
    )
    return array.unstack(values)


def recurrence(
    cell: Any,
    x: Any,
    mask: Any,
    kernel: Any,
    bias: Any,
    states: Sequence[Any],
    unroll: bool,
    return_sequences: bool,
) -> tuple[Any, list[Any]]:
    """Runs a cell over the products of the inputs, with a gradient that runs back over what this keeps.

    Each step keeps its sums and its output in the dtype of `x`, and the other states as they are. Running back, it
    stacks the gradients to the products; the gradient to the kernel is one product of the stacks, that to the bias a
    float32 sum. What TensorFlow derives from a loop keeps the result of each operation, and rounds a product for the
    kernel's gradient in every step.

    Args:
        cell: has `sums`, `to_products` and `gates`.
        x: tensor of shape (steps, batch, parts * units), products with the inputs.
        mask: bool tensor of shape (steps, batch, 1), or None.
        kernel: float32 tensor of shape (units, parts * units).
        bias: float32 tensor of the size of `sums`, or None.
        states: float32 tensors of shape (batch, units).
        unroll: whether the loop is written out.
        return_sequences: whether all outputs are needed.

    Returns:
        Tensor of shape (steps, batch, units) in the dtype of `x`, or None, and the last states.
    """
    steps, batch, _ = keras.ops.shape(x)
    units = kernel.shape[0]
    count = len(states)

    def cell_step(sums: Any, bias: Sequence[Any], states: Sequence[Any], there: Any) -> list[Any]:
        new = cell.gates(sums + bias[0] if bias else sums, *states)
        return [state if there is None else tf.where(there, state, old) for state, old in zip(new, states, strict=True)]

    @fusion.custom_gradient
    def run(x: Any, kernel: Any, *others: Any) -> Any:
        states, bias = others[:count], others[count:]
        dtype = states[0].dtype
        rounded = tf.cast(kernel, x.dtype)
        inputs, masks = _unstacked(x), () if mask is None else (_unstacked(mask),)

        def body(step: Any, sums_kept: Any, outputs: Any, others_kept: Any, *states: Any) -> Any:
            # The state that the kernel multiplies is what the outputs hold of it.
            r = tf.matmul(tf.cast(states[0], x.dtype), rounded)
            sums = cell.sums(tf.cast(inputs.read(step), dtype), tf.cast(r, dtype))
            new = cell_step(sums, bias, states, masks[0].read(step) if masks else None)
            for state, old in zip(new, states, strict=True):
                state.set_shape(old.shape)
            return (
                sums_kept.write(step, tf.cast(sums, x.dtype)),
                outputs.write(step + 1, tf.cast(new[0], x.dtype)),
                [kept.write(step, state) for kept, state in zip(others_kept, states[1:], strict=True)],
                *new,
            )

        sums_like = cell.sums(x[0], x[0])
        output_like = tf.cast(states[0], x.dtype)
        outputs = _array(output_like, steps + 1).write(0, output_like)
        sums_kept, outputs, others_kept, *last = _loop(
            steps,
            body,
            (_array(sums_like, steps), outputs, [_array(state, steps) for state in states[1:]], *states),
            unroll,
        )
        outputs = outputs.stack()
        before = outputs[:-1]
        # Tensors, as an array can neither be saved with the gradient of an exported model, nor go from eager code into
        # the graph in which TensorFlow computes a Jacobian.
        all_sums, *all_before = sums_kept.stack(), before, *(each.stack() for each in others_kept)

        def gradient(*upstream: Any) -> Any:
            to_outputs = (_unstacked(upstream[0]),) if return_sequences else ()
            sums_kept, befores = _unstacked(all_sums), [_unstacked(each) for each in all_before]
            masks = () if mask is None else (_unstacked(mask),)

            def back(number: Any, to_x: Any, to_r: Any, to_bias: Any, *to_states: Any) -> Any:
                step = steps - 1 - number
                sums = tf.cast(sums_kept.read(step), dtype)
                states = [tf.cast(each.read(step), dtype) for each in befores]
                with tf.GradientTape() as tape:
                    tape.watch([sums, *states])
                    new = cell_step(sums, bias, states, masks[0].read(step) if masks else None)
                to_h = to_states[0]
                for each in to_outputs:
                    to_h += tf.cast(each.read(step), dtype)
                to_sums, *to_before = tape.gradient(
                    new, [sums, *states], [to_h, *to_states[1:]], unconnected_gradients="none"
                )
                to_product_x, to_product_r = (tf.cast(each, x.dtype) for each in cell.to_products(to_sums))
                through_kernel = tf.cast(tf.matmul(to_product_r, rounded, transpose_b=True), dtype)
                to_before[0] = through_kernel if to_before[0] is None else to_before[0] + through_kernel
                for new_gradient, old in zip(to_before, to_states, strict=True):
                    new_gradient.set_shape(old.shape)
                return (
                    to_x.write(step, to_product_x),
                    [each.write(step, to_product_r) for each in to_r],
                    [each + to_sums for each in to_bias],
                    *to_before,
                )

            # Where both are one, as in an LSTM, one array will do.
            shared = cell.to_products(sums_like)[0] is cell.to_products(sums_like)[1]
            to_x, to_r, to_bias, *to_states = _loop(
                steps,
                back,
                (
                    _array(x[0], steps),
                    [] if shared else [_array(x[0], steps)],
                    [tf.zeros([batch, sums_like.shape[1]], dtype) for _ in bias],
                    *upstream[len(to_outputs) :],
                ),
                unroll,
            )
            to_x = to_x.stack()
            to_r = to_x if shared else to_r[0].stack()
            to_kernel = tf.matmul(
                tf.reshape(before, [-1, units]), tf.reshape(to_r, [-1, kernel.shape[1]]), transpose_a=True
            )
            return (
                to_x,
                tf.cast(to_kernel, kernel.dtype),
                *to_states,
                *(tf.reduce_sum(each, 0) for each in to_bias),
            )

        return ([outputs[1:]] if return_sequences else []) + list(last), gradient

    answers = list(run(x, kernel, *states, *([] if bias is None else [bias])))
    return (answers[0], answers[1:]) if return_sequences else (None, answers)
