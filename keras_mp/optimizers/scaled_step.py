"""What `scale_loss` and `unscale` did in a training step, for the `apply` of the same step."""

import threading
import warnings
from typing import Any

import tensorflow as tf

from keras_mp.errors import ArgumentError, KerasMPWarning
from keras_mp.optimizers import provenance
from keras_mp.optimizers.weight_update import unscale
from keras_mp.policies.policy import stacklevel

__all__ = ["UNSCALED_LOSS", "ScaledStep"]

UNSCALED_LOSS = """LossScaleOptimizer divides gradients by its loss scale, and this loss was never multiplied by it: \
the updates would be thousands of times too small. Write

    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(compute_loss())
    gradients = tape.gradient(loss, variables)
    optimizer.apply_gradients(zip(gradients, variables))

or optimizer.minimize(compute_loss, variables), which does all of it."""


_CLIPPED_SCALED = """The gradients were limited by tf.{clipped} while they were still multiplied by the loss scale, \
so that they are thousands of times too small: the limit is meant for the gradients themselves. Write

    gradients = optimizer.unscale(tape.gradient(loss, variables))

before it; apply_gradients sees that they are unscaled. Or set `clipnorm`, `clipvalue` or `global_clipnorm` on the \
inner optimizer, which clips the sum over all replicas."""

_UNSCALED_ELSEWHERE = """optimizer.unscale(...) was called in one function and apply {} with gradients of unknown \
origin, which were taken for scaled ones, and unscaled. If they were unscaled before, call both in the same \
tf.function, or both outside of any."""


class ScaledStep:
    """The losses and gradients of one optimizer's step so far.

    Attributes:
        scale_was_used: whether anything asked for the scale, in this step or before.
    """

    def __init__(self) -> None:
        # Whether the losses were finite, by thread, for replicas run in one each.
        self._loss_finite: dict[int, list[tf.Tensor]] = {}
        self.scale_was_used = False
        # What `unscale` did: in a graph by marks, else by thread the gradients that it was given; and whether it was
        # called in a graph in which no gradients of it were applied.
        self._marks = provenance.Marks()
        self._unscaled_from: dict[int, list[Any]] = {}
        self._unscale_was_used = self._unscaled_in_graph = False

    def marked(self, scale: tf.Tensor) -> tf.Tensor:
        """The scale, marked so that a graph tells what it was multiplied with."""
        return self._marks.put(scale, provenance.SCALED)

    def saw_loss(self, loss: tf.Tensor) -> None:
        """Remembers whether a loss is finite."""
        thread = threading.get_ident()
        self._loss_finite[thread] = [*self._losses_seen(), tf.reduce_all(tf.math.is_finite(loss))]
        self._unscaled_from.pop(thread, None)  # another step begins

    def unscale(self, gradients: Any, scale: tf.Tensor) -> Any:
        """Divides gradients by the scale, and marks or remembers them; see `LossScaleOptimizer.unscale`."""
        self.scale_was_used = self._unscale_was_used = True
        gradients = gradients if tf.is_tensor(gradients) or hasattr(gradients, "__len__") else list(gradients)
        if tf.executing_eagerly():
            given = self._unscaled_from.setdefault(threading.get_ident(), [])
            given += [each for each in tf.nest.flatten(gradients) if each is not None]
        else:
            self._unscaled_in_graph = True

        def unscaled(gradient: Any) -> Any:
            if gradient is None:
                return None
            if isinstance(gradient, tf.IndexedSlices):
                return tf.IndexedSlices(unscaled(gradient.values), gradient.indices, gradient.dense_shape)
            quotient = unscale(gradient, scale)
            quotient = tf.where(tf.math.is_finite(quotient), quotient, tf.cast(float("nan"), quotient.dtype))
            return self._marks.put(quotient, provenance.UNSCALED)

        return tf.nest.map_structure(unscaled, gradients)

    def already_unscaled(self, grads: list[Any]) -> list[bool]:
        """Which gradients were made of what `unscale` returned. Warns of those that were clipped without it."""
        tensors = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
        given = self._unscaled_from.pop(threading.get_ident(), None)
        if tf.executing_eagerly():
            if given is not None:
                return [g is not None and all(g is not each for each in given) for g in grads]
            if self._unscaled_in_graph:
                self._unscaled_in_graph = False
                warnings.warn(_UNSCALED_ELSEWHERE.format("outside of it"), KerasMPWarning, stacklevel=stacklevel())
            return [False] * len(grads)
        in_graph = [t for t in tensors if hasattr(t, "graph")]
        if not self._unscale_was_used:
            clipped = next(filter(None, (provenance.clipped_by(t, self._marks) for t in in_graph)), None)
            if clipped:
                warnings.warn(_CLIPPED_SCALED.format(clipped=clipped), KerasMPWarning, stacklevel=stacklevel())
            return [False] * len(grads)
        marks = iter(self._marks.found(in_graph))
        found = [next(marks) if hasattr(t, "graph") else frozenset() for t in tensors]
        if any(len(each) > 1 for each in found):
            raise ArgumentError(
                "apply() received a gradient that was made of scaled gradients as well as of such as `unscale` "
                "returned, so that it is neither. Unscale first, and compute with nothing but what it returned: "
                "gradients = optimizer.unscale(gradients)"
            )
        unscaled = any(provenance.UNSCALED in each for each in found)
        if unscaled:
            self._unscaled_in_graph = False
        elif given is not None and not any(found):
            warnings.warn(_UNSCALED_ELSEWHERE.format("in another one"), KerasMPWarning, stacklevel=stacklevel())
        clipped = next(filter(None, (provenance.clipped_by(t, self._marks) for t in in_graph)), None)
        if clipped:
            warnings.warn(_CLIPPED_SCALED.format(clipped=clipped), KerasMPWarning, stacklevel=stacklevel())
        # What was made of neither, such as zeros in place of a gradient, goes along with the others.
        return [
            unscaled and g is not None and provenance.SCALED not in each for g, each in zip(grads, found, strict=True)
        ]

    def _losses_seen(self) -> list[tf.Tensor]:
        """Whether each loss since the last `apply` was finite, of those that can be used here."""
        seen = self._loss_finite.pop(threading.get_ident(), [])
        if tf.executing_eagerly():
            seen = [each for each in seen if hasattr(each, "numpy")]
            return [tf.reduce_all(tf.stack(seen))] if seen else []
        graphs, graph = [], tf.compat.v1.get_default_graph()
        while graph is not None:
            graphs.append(graph)
            graph = getattr(graph, "outer_graph", None)
        return [each for each in seen if not hasattr(each, "numpy") and any(each.graph is one for one in graphs)]

    def take_loss_finite(self) -> "tf.Tensor | bool":
        """Whether all losses that `scale_loss` saw in this step were finite; True where that cannot be known."""
        seen = self._losses_seen()
        return tf.reduce_all(tf.stack(seen)) if seen else True
