"""The TensorFlow and Keras that are installed here: checked once, and the only place that uses their private names.

Every other module imports TensorFlow and Keras after this one. A private name stands here with the reason why a public
one will not do; `tests/test_backend.py` fails with the name in its message when one of them moves.
"""

import contextlib
import contextvars
import functools
import itertools
import json
import os
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from keras_mp.errors import MissingTensorFlowError

__all__ = [
    "Float32View",
    "auto_config",
    "autocasts",
    "build",
    "built_already",
    "call",
    "call_around_epochs",
    "call_before_training",
    "called_functions",
    "checkpointed",
    "compile_arguments",
    "compute_loss",
    "copy_of_table",
    "dtype_as_read",
    "first_of_generator",
    "forward_mode",
    "in_xla_context",
    "inner_layers",
    "is_default_strategy",
    "is_functional",
    "is_tracker",
    "layers_by_address",
    "layers_by_path",
    "lite_bytes",
    "lite_model",
    "lite_schema",
    "load_with_keras",
    "lock_alike",
    "logits_of",
    "make_function",
    "mask_of",
    "mirrored_strategy",
    "names_of_tensorflow",
    "on_cpu",
    "one_device",
    "optimization_barrier",
    "origin",
    "output_places",
    "own_settings",
    "paths_of_layers",
    "placeholder",
    "preprocessing_classes",
    "raise_from_graph",
    "read_model_files_by",
    "reading_in",
    "recording",
    "remapper_enabled",
    "renumber",
    "run_through_graph",
    "runtime_started",
    "saving_to_h5",
    "scratch_graph",
    "seed_states",
    "set_auto_config",
    "set_dtype_policy",
    "set_path",
    "set_remapper",
    "set_tracked",
    "share_of_batch",
    "sources",
    "store_like",
    "strategy_of",
    "tensorflow_variable",
    "tracked",
    "tracker_like",
    "trained_by",
    "trusting",
    "uncast",
    "unlocked",
    "watched_calls",
    "with_logits",
    "with_mask",
    "without_all_reduce",
    "without_attribute",
    "without_autocast",
    "without_log_lines",
    "without_remat",
    "write_into_model_files",
]

# What TensorFlow 2.21 writes before it has read TF_CPP_MIN_LOG_LEVEL, so that no setting can silence it.
_PREAMBLE = (
    "WARNING: All log messages before absl::InitializeLog()",
    "port.cc:",
    "cpu_feature_guard.cc:",
    "To enable the following instructions:",
)


@contextlib.contextmanager
def without_log_lines(*marks: str) -> Iterator[None]:
    """Drops lines that TensorFlow's native code logs from the standard error stream and passes all else on, afterwards.

    `TF_CPP_MIN_LOG_LEVEL=0` keeps them. The stream is taken at the file descriptor, where native code writes.

    Args:
        marks: a line that contains one of these is dropped.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # a service without a standard error stream
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            captured.seek(0)
            rest = [
                line
                for line in captured.read().decode(errors="replace").splitlines(keepends=True)
                if not any(mark in line for mark in marks)
            ]
            if rest:
                os.write(2, "".join(rest).encode())


def _require_tensorflow() -> None:
    """Imports TensorFlow, then Keras on it.

    Raises:
        MissingTensorFlowError: where either cannot be had, with what to type.
    """
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "tensorflow":
            raise
        raise MissingTensorFlowError(
            "keras_mp needs TensorFlow 2.20 or 2.21, and no `tensorflow` is installed here. Install it with the extra "
            'for your hardware: pip install "keras-mp[cpu]", pip install "keras-mp[gpu]" (NVIDIA, Linux) or '
            'pip install "keras-mp[tpu]" (Cloud TPU virtual machine).'
        ) from None
    found = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if found < (2, 20):
        raise MissingTensorFlowError(
            f"keras_mp needs TensorFlow 2.20 or 2.21, and {tf.__version__} is installed here. Upgrade it with the "
            'extra for your hardware, for example: pip install --upgrade "keras-mp[cpu]".'
        )
    # Keras's own error for a backend that is not installed would name that one.
    asked = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if asked == "tensorflow" or "keras" in sys.modules:
        import keras

        asked = keras.backend.backend()
    if asked != "tensorflow":
        raise MissingTensorFlowError(
            f"keras_mp works with Keras on TensorFlow, and Keras runs on {asked!r} here. Set the "
            'environment variable KERAS_BACKEND="tensorflow" (or "backend": "tensorflow" in ~/.keras/keras.json) '
            "before the first `import keras`."
        )


with contextlib.nullcontext() if "tensorflow" in sys.modules else without_log_lines(*_PREAMBLE):
    _require_tensorflow()

import keras  # noqa: E402  (only after the check above is its absence explained)
import tensorflow as tf  # noqa: E402

# What tells a model that is being written to HDF5 from one that is written to `.keras`.
from keras.src.backend.common.global_state import get_global_attribute as _saving_options_flag  # noqa: E402

# Inside a layer's call a variable gives its value in the compute dtype; no public name switches that off.
from keras.src.backend.common.variables import AutocastScope as _AutocastScope  # noqa: E402
from keras.src.backend.common.variables import get_autocast_scope as _get_autocast_scope  # noqa: E402

# The cell of convolutional LSTMs has no public name to inherit from.
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell  # noqa: E402

# Keras means a replica's losses by its own rows and divides by the number of replicas, and has no way to say otherwise;
# `share_of_batch` does.
from keras.src.losses import loss as _loss  # noqa: E402

# `keras.Model(inputs, outputs)` is an instance of this class, which has no public name to inherit from.
from keras.src.models.functional import Functional as Functional  # noqa: E402

# The rule by which arguments of a model are those of a functional one.
from keras.src.models.model import functional_init_arguments as _functional_init_arguments  # noqa: E402

# Where in a file the weights of a layer stand is decided in here, by the names of classes, and no public name tells or
# changes it; nor what else stands in a file, or what reads it.
from keras.src.saving import saving_lib as _saving_lib  # noqa: E402

# What Keras keeps the arguments of a constructor in, and whether Python code in files is run.
from keras.src.saving import serialization_lib as _serialization_lib  # noqa: E402

# The base of all whose state stands in files.
from keras.src.saving.keras_saveable import KerasSaveable as _KerasSaveable  # noqa: E402

# From the name of a class to that in a file.
from keras.src.utils.naming import to_snake_case as _to_snake_case  # noqa: E402

# What keeps track of the variables and layers of a layer, which a copy has to list in the order of the original.
from keras.src.utils.tracking import Tracker as _Tracker  # noqa: E402

# The operation that XLA does not optimize across has no public name, and no gradient.
from tensorflow.compiler.tf2xla.python import xla as _xla  # noqa: E402

# `tf.distribute` has no public way to step out of a strategy, which `one_device` does.
from tensorflow.python.distribute import distribute_lib as _distribute_lib  # noqa: E402

# Every public name that lists the runtime's devices starts it, and a started runtime takes no more configuration.
from tensorflow.python.eager import context as _context  # noqa: E402

# No public name tells whether a forward accumulator is watching a tensor.
from tensorflow.python.eager import forwardprop_util as _forwardprop_util  # noqa: E402

# No public name tells whether a gradient tape is watching. It decides whether a function is compiled on its own.
from tensorflow.python.eager import record as _record  # noqa: E402

# Where in an op's outputs each of its named ones begins stands in its definition, which has no public name.
from tensorflow.python.framework import op_def_registry as _op_def_registry  # noqa: E402

# No public name tells whether the function that is being traced will be compiled by XLA. It decides whether an op that
# calls back into Python, which XLA cannot compile, may be placed in the graph.
from tensorflow.python.ops import control_flow_util as _control_flow_util  # noqa: E402

# `tf.vectorized_map` replaces ops one by one and so loses gradients of one's own, and has no public name to ask whether
# it is at work.
from tensorflow.python.ops.parallel_for import control_flow_ops as _parallel_for  # noqa: E402


def build(model: keras.Model, batch: Any) -> None:
    """Creates all the variables that training a model needs and that do not exist yet, for data like this batch.

    Keras does so under a strategy only, and in `predict` never.

    Args:
        model: a Keras model.
        batch: `(x, y, sample_weight)`, or less, of tensors or arrays.
    """
    x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    if y is None:  # metrics and losses are for data that has labels
        model(keras.tree.map_structure(lambda value: keras.KerasTensor(value.shape, value.dtype), x))
    else:
        model._symbolic_build(data_batch=batch)


def call(model: keras.Model, *args: Any, training: bool, **kwargs: Any) -> Any:
    """The model's outputs, told whether it trains if it wants to know, which no public name says."""
    return model(*args, training=training, **kwargs) if model._call_has_training_arg else model(*args, **kwargs)


def compute_loss(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
    """`model.compute_loss`, also where a subclass overrides it without the argument `training`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)


def first_of_generator(iterator: Any) -> Any:
    """The first batch of a generator that `fit` was given, which Keras keeps without a public name; None of other data.

    A batch that is taken from the iterator of a generator, and those fetched ahead with it, cannot be put back.

    Args:
        iterator: Keras's iterator over epochs.
    """
    batches = getattr(iterator.data_adapter, "_first_batches", None)
    return batches[0] if batches else None


def in_xla_context() -> bool:
    """Whether the code that is running now is being traced for XLA.

    Returns:
        True inside `tf.function(jit_compile=True)` and inside the step of a TPU strategy, False in eager code and in
        other graphs.
    """
    if tf.executing_eagerly():
        return False
    return bool(_control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def is_functional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of a model are the inputs and outputs of a functional one."""
    return bool(_functional_init_arguments(args, kwargs))


def make_function(model: keras.Model, step: Callable[[Any], Any]) -> Any:
    """What `fit` and `evaluate` call for each batch, or several, of a step on one replica.

    Keras makes it of `train_step` and `test_step` as they are, and no public name takes another step.

    Args:
        model: a Keras model.
        step: gets a replica's data, answers with its metrics.
    """
    return model._make_function(step)


# TensorFlow numbers the collective operations of each strategy from the same start, so that those of two strategies in
# one process, as a notebook has whose cells are run again, are taken for one another: they fail, or wait for ever. Its
# own tests give each a start of its own by this attribute, which has no public name.
_collective_key_bases = itertools.count(1_000_000, 1_000_000)


def mirrored_strategy(devices: list[str]) -> tf.distribute.MirroredStrategy:
    """A `tf.distribute.MirroredStrategy` beside which the process may have others.

    Args:
        devices: their names.
    """
    members = {"_collective_key_base": next(_collective_key_bases), "__module__": __name__}
    return type("MirroredStrategy", (tf.distribute.MirroredStrategy,), members)(devices)


def on_cpu() -> bool:
    """Whether operations run on a CPU, for there is no GPU and no TPU."""
    return not tf.config.list_logical_devices("GPU") and not tf.config.list_logical_devices("TPU")


@contextlib.contextmanager
def one_device(
    index: int, variables: Iterable[keras.Variable], optimizers: Iterable[keras.optimizers.Optimizer]
) -> Iterator[None]:
    """Inside, the program is one without a strategy: each variable is its copy on one device.

    Keras's optimizers reduce gradients and update all devices' copies by themselves, in a way that allows neither a
    condition around it nor XLA. What runs in here is free of both limits, and has to be run for every device.

    Args:
        index: which of the process's devices.
        variables: what the program reads and writes. Variables without copies stay as they are.
        optimizers: those that update them.
    """
    whole = {id(variable): (variable, variable._value) for variable in variables}
    strategies = [(optimizer, optimizer._distribution_strategy) for optimizer in optimizers]
    try:
        for variable, value in whole.values():
            if isinstance(value, tf.distribute.DistributedValues):
                variable._value = value.values[index]
        with _without_strategy():
            for optimizer, _ in strategies:
                optimizer._distribution_strategy = tf.distribute.get_strategy()
            yield
    finally:
        for variable, value in whole.values():
            variable._value = value
        for optimizer, strategy in strategies:
            optimizer._distribution_strategy = strategy


@contextlib.contextmanager
def without_all_reduce(optimizers: Iterable[keras.optimizers.Optimizer]) -> Iterator[None]:
    """Inside, these optimizers take their gradients for sums over replicas already.

    Args:
        optimizers: those whose `apply` is called inside.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        optimizer._all_reduce_sum_gradients = list
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer._all_reduce_sum_gradients


@contextlib.contextmanager
def _without_strategy() -> Iterator[None]:
    _distribute_lib._push_per_thread_mode(_distribute_lib._get_default_replica_mode())
    try:
        yield
    finally:
        _distribute_lib._pop_per_thread_mode()


# An exception that a Python op raises in a graph reaches the caller of the graph as a `tf.errors.UnknownError` with its
# text; the exception itself is lost, and `except LossScaleStuckError` around `model.fit` would not catch it. TensorFlow
# makes that error by calling the class, from C++, and so the class hands back what `raise_from_graph` has left here.
_raised_in_graph: dict[str, Exception] = {}
_raise_numbers = itertools.count()


def _unknown_error_or_its_cause(cls, node_def=None, op=None, message="", *args):
    for mark, error in _raised_in_graph.items():
        if mark in str(message):
            del _raised_in_graph[mark]
            return error
    return Exception.__new__(cls, node_def, op, message, *args)


tf.errors.UnknownError.__new__ = staticmethod(_unknown_error_or_its_cause)


def _graph_error_type(error_type: Any) -> Any:
    # Python accepts from a class only an instance of that class, so what it hands back must be an UnknownError too.
    members = {
        "__init__": lambda self, *args: None,  # runs on an instance that is complete
        "__str__": Exception.__str__,
        "__module__": error_type.__module__,
    }
    return type(error_type.__name__, (error_type, tf.errors.UnknownError), members)


def _as_graph_error(error: Exception) -> Exception:
    text = str(error)
    graph_error: Any = Exception.__new__(_graph_error_type(type(error)))
    tf.errors.UnknownError.__init__(graph_error, None, None, text)
    graph_error.args = (text,)
    return graph_error


def optimization_barrier(x: tf.Tensor) -> tf.Tensor:
    """The same tensor, which XLA takes for another, that it knows nothing about but the dtype and the shape.

    It neither computes it anew in the place where it is used, nor keeps in float32 what was rounded to 16 bits. Only
    XLA can run it: ask `in_xla_context` first.

    Args:
        x: of any dtype and shape.
    """
    return x if forward_mode(x) else _optimization_barrier(x)  # of which there is no forward derivative


@tf.custom_gradient
def _optimization_barrier(x: tf.Tensor) -> Any:
    return _xla.optimization_barrier(x)[0], lambda upstream: upstream


def raise_from_graph(make_error: Callable[..., Exception], arguments: list[tf.Tensor]) -> tf.Operation:
    """Places an op in the graph that raises a Python exception when it runs, of the very type that was made.

    XLA cannot compile it: ask `in_xla_context` first.

    Args:
        make_error: gets the arguments as NumPy values, returns the exception.
        arguments: what it is told.

    Returns:
        The op; it must be in a branch of `tf.cond` or have dependents, or nothing runs it.
    """

    @tf.autograph.experimental.do_not_convert
    def raises(*values: tf.Tensor) -> None:
        mark = f"keras_mp-raised-{next(_raise_numbers)}-"
        _raised_in_graph[mark] = _as_graph_error(make_error(*(value.numpy() for value in values)))
        raise RuntimeError(mark)

    return tf.py_function(raises, arguments, [])


def recording() -> bool:
    """Whether a gradient tape is watching what is computed now, so that this is the forward pass of a training step.

    Not so inside of `tf.vectorized_map`: a tape outside of it sees other ops, and none of our gradients.
    """
    return bool(_record.could_possibly_record()) and not _in_vectorized_map()


def forward_mode(*tensors: Any) -> bool:
    """Whether a `tf.autodiff.ForwardAccumulator` follows one of these tensors now.

    Args:
        tensors: what an operation is about to get.
    """
    return bool(_forwardprop_util.pack_tangents([each for each in tensors if isinstance(each, tf.Tensor)]).tangents)


def _in_vectorized_map() -> bool:
    """Whether what is computed now is traced by `tf.vectorized_map`."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "loop_fn" and frame.f_globals is vars(_parallel_for):
            return True
        frame = frame.f_back
    return False


def remapper_enabled() -> bool:
    """Whether grappler may fuse a product with the bias and activation that follow it."""
    return bool(tf.config.optimizer.get_experimental_options().get("remapping", True))


def runtime_started() -> bool:
    """Whether TensorFlow's eager runtime runs, after which devices, threads and collectives cannot be configured."""
    return bool(_context.context()._initialized)


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """The states of a model's random generators; Keras lists them among all its variables only.

    Args:
        model: a Keras model.
    """
    layers = model._flatten_layers()
    return list({id(seed.state): seed.state for layer in layers for seed in layer._seed_generators}.values())


def set_remapper(enabled: bool) -> None:
    """Allows or forbids grappler's fusion of a product with the bias and activation that follow it.

    On CPUs with AMX, oneDNN's fused float16 product runs up to a thousand times slower than the float32 one; the same
    product followed by separate ops does not. The setting holds for the whole process.

    Args:
        enabled: whether the fusion may happen.
    """
    tf.config.optimizer.set_experimental_options({"remapping": enabled})


def strategy_of(made: "keras.Model | keras.optimizers.Optimizer") -> tf.distribute.Strategy | None:
    """The strategy in whose scope a model or an optimizer was made; None for none.

    Of an optimizer Keras does not tell, and of a model only what is in force now if that was made in no scope.
    """
    if isinstance(made, keras.Model):
        return made._distribute_strategy
    strategy = made._distribution_strategy
    return strategy if isinstance(strategy, tf.distribute.Strategy) and not is_default_strategy(strategy) else None


def is_default_strategy(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy is the one that is in force where there is none, which has no public name."""
    return isinstance(strategy, _distribute_lib._DefaultDistributionStrategy)


# Keras multiplies each mean over a replica's rows, in a loss and in `add_loss`, by one over the number of replicas. The
# sum is the mean over the whole batch only where all replicas have as many rows, and not where `compute_loss` or a loss
# is a function of one's own that answers with a mean. So here means stay what they are, and the total is weighted.
_share: contextvars.ContextVar["tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]] | None"] = contextvars.ContextVar(
    "_share", default=None
)
_keras_apply_mask = _loss.apply_mask
_keras_reduce_values = _loss.reduce_values
_keras_scale_loss_for_distribution = _loss.scale_loss_for_distribution
_keras_unscale_loss_for_distribution = _loss.unscale_loss_for_distribution


def _as_of_the_batch(divisor: Any) -> Any:
    """What a mean is to be multiplied by that was divided by a number of this replica's, not of the whole batch."""
    share, total_of = _share.get() or (None, None)
    if share is None or total_of is None:
        return tf.ones([], divisor.dtype)
    return tf.math.divide_no_nan(divisor, total_of(tf.stop_gradient(divisor)) * tf.cast(share, divisor.dtype))


def _apply_mask(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
    weights = _keras_apply_mask(sample_weight, mask, dtype, reduction)
    if _share.get() is None or mask is None or reduction not in ("mean", "sum_over_batch_size"):
        return weights
    return weights * tf.cast(_as_of_the_batch(tf.reduce_sum(tf.cast(mask, tf.float32))), weights.dtype)


def _reduce_values(values: Any, sample_weight: Any = None, reduction: str | None = "sum_over_batch_size") -> Any:
    loss = _keras_reduce_values(values, sample_weight, reduction)
    if (given := _share.get()) is None:
        return loss
    if reduction == "sum":
        return tf.math.divide_no_nan(loss, tf.cast(given[0], loss.dtype))
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        return loss * _as_of_the_batch(tf.reduce_sum(tf.cast(sample_weight, loss.dtype)))
    return loss


def _scale_loss_for_distribution(value: Any) -> Any:
    return _keras_scale_loss_for_distribution(value) if _share.get() is None else value


def _unscale_loss_for_distribution(value: Any) -> Any:
    """What the trackers of single losses take the mean of, over replicas as over batches."""
    if (given := _share.get()) is None:
        return _keras_unscale_loss_for_distribution(value)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return value * tf.cast(given[0] * replicas, value.dtype)


_loss.apply_mask = _apply_mask
_loss.reduce_values = _reduce_values
_loss.scale_loss_for_distribution = _scale_loss_for_distribution
_loss.unscale_loss_for_distribution = _unscale_loss_for_distribution


@contextlib.contextmanager
def share_of_batch(share: tf.Tensor | None, total_of: Callable[[tf.Tensor], tf.Tensor]) -> Iterator[None]:
    """Inside, Keras's losses are those of a replica's rows, to be multiplied by the share of the batch that those are.

    The sum of that over replicas is then the mean over the whole batch, also where one has fewer rows than another, and
    where the mean is one over the elements that a mask leaves, or over the sum of the weights. A loss with
    `reduction="sum"` is divided by the share, so that it is the sum in the end.

    Args:
        share: scalar, between 0 and 1; the shares of all replicas add up to 1. None leaves it to Keras.
        total_of: from a float scalar of this replica to the sum over all replicas.
    """
    token = _share.set(None if share is None else (share, total_of))
    try:
        yield
    finally:
        _share.reset(token)


def uncast(variable: keras.Variable) -> tf.Tensor:
    """The value of a variable in the dtype it is stored in, also inside the call of a layer of another compute dtype.

    Args:
        variable: a Keras variable.
    """
    with without_autocast():
        return tf.convert_to_tensor(variable.value)


def tensorflow_variable(variable: Any) -> tf.Variable:
    """What holds the value of a Keras variable; a TensorFlow variable is its own."""
    return variable.value if isinstance(variable, keras.Variable) else variable


class Float32View:
    """A variable of 16 bits as an optimizer's `update_step` takes it, that is float32 for whoever reads or writes it.

    Keras finds a variable's slots by its `_unique_id`, and by no public name.

    Args:
        variable: of 16 bits.
        optimizer: which updates it.
    """

    dtype = tf.float32

    def __init__(self, variable: tf.Variable, optimizer: keras.optimizers.Optimizer) -> None:
        self._variable, self._unique_id = variable, optimizer._var_key(variable)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._variable, name)

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        """The value, in float32 or another dtype that is asked for."""
        return tf.cast(self._variable, dtype or tf.float32, name)

    def assign(self, value: Any) -> None:
        """Rounds a value once. What 16 bits cannot hold becomes the largest that they can; NaN changes nothing."""
        value = tf.where(tf.math.is_nan(value), tf.convert_to_tensor(self), value)
        self._variable.assign(tf.saturate_cast(value, self._variable.dtype))

    def assign_add(self, value: Any) -> None:
        """Adds in float32."""
        self.assign(tf.convert_to_tensor(self) + value)

    def assign_sub(self, value: Any) -> None:
        """Subtracts in float32."""
        self.assign(tf.convert_to_tensor(self) - value)

    def scatter_add(self, rows: tf.IndexedSlices) -> None:
        """Adds rows in float32, those that come several times as their sum."""
        if in_xla_context():  # how many rows there are without repetitions is nothing that XLA can know
            self.assign_add(tf.math.unsorted_segment_sum(rows.values, rows.indices, self._variable.shape[0]))
            return
        indices, places = tf.unique(rows.indices)
        sums = tf.math.unsorted_segment_sum(rows.values, places, tf.size(indices))
        self.scatter_update(tf.IndexedSlices(tf.cast(tf.gather(self._variable, indices), tf.float32) + sums, indices))

    def scatter_sub(self, rows: tf.IndexedSlices) -> None:
        """Subtracts rows in float32, those that come several times as their sum."""
        self.scatter_add(tf.IndexedSlices(-rows.values, rows.indices, rows.dense_shape))

    def scatter_update(self, rows: tf.IndexedSlices) -> None:
        """Rounds rows once."""
        rounded = tf.saturate_cast(rows.values, self._variable.dtype)
        self._variable.scatter_update(tf.IndexedSlices(rounded, rows.indices))


def _operator_of_float32(name: str) -> Callable[..., Any]:
    return lambda view, *args: getattr(tf.convert_to_tensor(view), name)(*args)


for _name in tf.Tensor.OVERLOADABLE_OPERATORS:
    setattr(Float32View, _name, _operator_of_float32(_name))


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, variables are read and, what Keras 3.12 also rounds, assigned in the dtype they are stored in."""
    with _AutocastScope(None):
        yield


# Keras has no public name for what its layers, activations and losses attach to tensors: the mask that goes along with
# them, and the logits behind probabilities.
def logits_of(tensor: Any) -> Any:
    """The logits that a softmax or sigmoid has attached to its probabilities, or None."""
    return getattr(tensor, "_keras_logits", None)


def mask_of(tensor: Any) -> Any:
    """The Keras mask that goes along with a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def with_logits(tensor: Any, logits: Any) -> Any:
    """The tensor itself, with logits attached where Keras's losses look for them."""
    tensor._keras_logits = logits
    return tensor


def with_mask(tensor: Any, mask: Any) -> Any:
    """The tensor itself, with a Keras mask attached."""
    tensor._keras_mask = mask
    return tensor


# Keras has no public name for the layers inside a layer that is not a model.
def inner_layers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds itself, not those inside them."""
    return list(layer._layers)


def layers_by_path(layer: keras.Layer) -> dict[str, keras.Layer]:
    """A layer and all layers inside it, by the names from the outermost down, joined by "/".

    A layer that is used in several places stands at the first of them. Of several of one path, the first is given.

    Args:
        layer: a layer or model.
    """
    found: dict[str, keras.Layer] = {}
    for each, path in paths_of_layers(layer):
        found.setdefault(path, each)
    return found


def paths_of_layers(layer: keras.Layer) -> list[tuple[keras.Layer, str]]:
    """A layer and all layers inside it, each once, with its path as in `layers_by_path`; some may have the same.

    Args:
        layer: a layer or model.
    """
    found: list[tuple[keras.Layer, str]] = []
    seen: set[int] = set()

    def visit(layer: keras.Layer, path: str) -> None:
        if id(layer) not in seen:
            seen.add(id(layer))
            found.append((layer, path))
            for inner in inner_layers(layer):
                visit(inner, f"{path}/{inner.name}")

    visit(layer, layer.name)
    return found


# What follows is for copies of models. Keras copies a model by its configuration alone, which many have none of.
def auto_config(layer: keras.Layer) -> Any:
    """The arguments that a layer without a `get_config` of its own was made with, or None where Keras keeps none."""
    kept = getattr(layer, "_auto_config", None)
    return None if kept is None else dict(kept.config)


def set_auto_config(layer: keras.Layer, arguments: "dict[str, Any] | None") -> None:
    """Sets what `auto_config` tells, on a layer that was not made by its constructor."""
    layer._auto_config = None if arguments is None else _serialization_lib.SerializableDict(**arguments)


def set_dtype_policy(layer: keras.Layer, policy: keras.DTypePolicy) -> None:
    """Sets the policy of a layer whose variables fit it already. The property would quantize the layer."""
    layer._dtype_policy = policy


def set_path(variable: keras.Variable, path: str) -> None:
    """Sets the path of a variable, which Keras makes of the name scopes that are open when it is created."""
    variable._path = path


# Attributes that every layer has from `keras.Layer`, which no public name tells from those of its class. A copy has
# them from its own constructor. Of these a copy gets the value of the original; the others are tied to one object.
_KEPT = ("_build_shapes_dict", "_call_context_args", "_call_has_context_arg", "_remat_mode")


def own_settings(layer: keras.Layer, names: Iterable[str]) -> dict[str, Any]:
    """Those attributes among some that hold a setting and not a part of the layer.

    Args:
        layer: a layer.
        names: attributes that a constructor of Keras has set.
    """
    kinds = (bool, str, int, keras.layers.InputSpec, type(None))
    # The strategy is that of the scope in which the copy is made.
    there = {name: vars(layer)[name] for name in names if name in vars(layer) and name != "_distribute_strategy"}
    return {name: value for name, value in there.items() if name in _KEPT or isinstance(value, kinds)}


# What a layer, a metric or an optimizer tracks has no public name that tells one store from another and lists the items
# in the order that `weights` has.
def is_tracker(value: Any) -> bool:
    """Whether an object is what Keras tracks the parts of another with."""
    return isinstance(value, _Tracker)


def tracked(owner: Any) -> dict[str, list[Any]]:
    """What a layer, a metric or an optimizer tracks, by kind.

    Args:
        owner: one of these. Another object tracks nothing.
    """
    tracker = getattr(owner, "_tracker", None)
    return {} if tracker is None else {name: list(items) for name, (_, items) in tracker.config.items()}


def set_tracked(owner: Any, store: str, items: list[Any]) -> None:
    """Sets what `tracked` tells of one kind."""
    tracker = owner._tracker
    kept = tracker.config[store][1]
    if [*map(id, kept)] != [*map(id, items)]:
        kept.clear()
        kept.extend(items)
    tracker.stored_ids[store] = set(map(id, items))


def tracker_like(tracker: Any, list_of: Callable[[list[Any]], list[Any]]) -> Any:
    """A tracker like another.

    Args:
        tracker: the other.
        list_of: from a list that it keeps to the one that takes its place.
    """
    config = {name: (test, list_of(items)) for name, (test, items) in tracker.config.items()}
    copy = _Tracker(config, exclusions=tracker.exclusions)
    copy.stored_ids = {name: set(map(id, items)) for name, (_, items) in config.items()}
    return copy


@contextlib.contextmanager
def unlocked(layer: keras.Layer) -> Iterator[None]:
    """Inside, a layer that is built takes further variables and layers."""
    tracker = layer._tracker
    locked, message = tracker.locked, tracker._lock_violation_msg
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock(message)


def lock_alike(layer: keras.Layer, copy: keras.Layer) -> None:
    """Has a copy take further variables and layers if the original does."""
    copy._tracker.locked, copy._tracker._lock_violation_msg = layer._tracker.locked, layer._tracker._lock_violation_msg


def names_of_tensorflow() -> frozenset[str]:
    """The attributes in which TensorFlow keeps what it tracks on an object. Others may begin with `_self_` as well."""
    return _names_of_tensorflow()


@functools.cache
def _names_of_tensorflow() -> frozenset[str]:
    tracking = tf.__internal__.tracking.AutoTrackable()
    tracking.variable = tf.Variable(0)
    return frozenset(vars(tracking)) - {"variable"} | {"_self_setattr_tracking"}


def checkpointed(owner: Any, name: str) -> bool:
    """Whether TensorFlow saves an attribute in checkpoints, which it does not where it was set behind its back."""
    return name in getattr(owner, "_self_unconditional_dependency_names", ())


def without_attribute(layer: keras.Layer, name: str) -> None:
    """Takes an attribute away. Keras's own way collects garbage, of the whole process, each time."""
    tf.__internal__.tracking.AutoTrackable.__delattr__(layer, name)


def renumber(
    optimizer: keras.optimizers.Optimizer,
    copy: keras.optimizers.Optimizer,
    originals: Iterable[keras.Variable],
    copy_of: Callable[[Any], Any],
) -> None:
    """Has a copy of an optimizer know the copies of variables by their own keys, in the strategy that it is made in.

    Args:
        optimizer: the original.
        copy: its copy, that knows variables by the keys of the originals.
        originals: variables, among them those that the optimizer was told to leave out of weight decay.
        copy_of: from a variable to its copy.
    """
    copy._distribution_strategy = tf.distribute.get_strategy()
    keys = {optimizer._var_key(variable): copy._var_key(copy_of(variable)) for variable in originals}
    # Variables that the model no longer has are known as well, by keys that no other variable gets.
    copy._trainable_variables_indices = {
        keys.get(key, key): index for key, index in optimizer._trainable_variables_indices.items()
    }
    if hasattr(optimizer, "_exclude_from_weight_decay"):
        copy._exclude_from_weight_decay = {keys[key] for key in optimizer._exclude_from_weight_decay if key in keys}
        copy._exclude_from_weight_decay_cache = {}


@contextlib.contextmanager
def built_already(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Inside, `build` of an optimizer does nothing: not all of Keras's ask whether they are built."""
    vars(optimizer)["build"] = lambda variables: None
    try:
        yield
    finally:
        del vars(optimizer)["build"]


def trained_by(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built on."""
    return list(optimizer._trainable_variables)


def copy_of_table(table: Any) -> Any:
    """A copy of a lookup table that changes; nothing public tells what it was made with.

    Args:
        table: a `tf.lookup.experimental.MutableHashTable` or `DenseHashTable`.
    """
    keys, values = table.export()
    arguments = {"default_value": table._default_value}
    if isinstance(table, tf.lookup.experimental.DenseHashTable):
        arguments |= {"empty_key": table._empty_key, "deleted_key": table._deleted_key}
        # It exports its empty places as well.
        free = [tf.cast(key, keys.dtype) for key in (table._empty_key, table._deleted_key)]
        axes = list(range(1, keys.shape.rank))
        taken = tf.reduce_all([tf.reduce_any(tf.not_equal(keys, key), axes) for key in free], 0)
        keys, values = keys[taken], values[taken]
    copy = type(table)(table.key_dtype, table.value_dtype, **arguments)
    copy.insert(keys, values)
    return copy


@contextlib.contextmanager
def reading_in(dtype: str, variable: keras.Variable) -> Iterator[None]:
    """Inside, a float variable that is read as it is stored is read in a dtype.

    Args:
        dtype: name of a float dtype.
        variable: a Keras variable.
    """
    before, variable._autocast = variable._autocast, True
    try:
        with _AutocastScope(dtype):
            yield
    finally:
        variable._autocast = before


def autocasts(variable: keras.Variable) -> bool:
    """Whether layers read the variable in their compute dtype."""
    return bool(variable._autocast)


def dtype_as_read(variable: keras.Variable) -> str:
    """The dtype in which the layer that is being called now reads a variable; that of the variable outside a call."""
    scope = _get_autocast_scope()
    casts = autocasts(variable) and scope is not None and scope.dtype is not None
    return scope.dtype if casts and variable.dtype.startswith(("float", "bfloat")) else variable.dtype


def origin(tensor: keras.KerasTensor) -> Any:
    """The layer, or the operation without variables, that a symbolic tensor is the answer of."""
    return tensor._keras_history.operation


def output_places(node: Any) -> dict[str, int]:
    """The place among a node's outputs at which each of its named ones begins; some are several.

    Args:
        node: a `NodeDef` of a graph or function.
    """
    definition = _op_def_registry.get(node.op)
    places, place = {}, 0
    for output in [] if definition is None else definition.output_arg:
        places[output.name] = place
        if output.number_attr:
            place += node.attr[output.number_attr].i
        elif output.type_list_attr:
            place += len(node.attr[output.type_list_attr].list.type)
        else:
            place += 1
    return places


def sources(tensor: keras.KerasTensor) -> list[keras.KerasTensor]:
    """The inputs that a symbolic tensor is computed from."""
    found: dict[int, keras.KerasTensor] = {}
    stack, seen = [tensor], set()
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        history = each._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        if node.input_tensors:
            stack.extend(node.input_tensors)
        else:
            found[id(each)] = each
    return list(found.values())


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """The arguments of the model's `compile`, as they were given; `get_compile_config` has lost what has no name."""
    return dict(model._compile_config.config)


def run_through_graph(
    model: keras.Model, inputs: Any, operation_of: Callable[[Any], Any], call: Callable[..., Any]
) -> Any:
    """Runs the graph of a Functional model with other operations.

    Args:
        model: a Functional model.
        inputs: symbolic tensors in the structure of `model.input`.
        operation_of: from an operation of the graph to the one that stands in for it.
        call: gets that one and the arguments of its call.

    Returns:
        The outputs, in the structure of `model.output`.
    """
    return model._run_through_graph(inputs, operation_fn=operation_of, call_fn=call)


def preprocessing_classes() -> tuple[type, ...]:
    """The classes of the layers that prepare data, of which two common bases have no public name."""
    names = ("Rescaling", "StringLookup")
    bases = [getattr(keras.layers, name).__base__ for name in names]
    own = ("CategoryEncoding", "HashedCrossing", "Hashing", "MelSpectrogram", "Pipeline", "STFTSpectrogram")
    others = (keras.layers.TextVectorization, keras.utils.FeatureSpace)
    return (*bases, *others, *(getattr(keras.layers, name) for name in own))


def scratch_graph() -> tf.Graph:
    """A graph to trace code in that is thrown away, as Keras makes one to find out shapes."""
    return tf.__internal__.FuncGraph("keras_mp_scratch")


def placeholder(symbol: keras.KerasTensor) -> Any:
    """What stands for a symbolic tensor in the graph that is being made."""
    make = tf.compat.v1.sparse_placeholder if symbol.sparse else tf.compat.v1.placeholder
    return make(symbol.dtype, symbol.shape)


@contextlib.contextmanager
def watched_calls(
    begins: Callable[[keras.Operation, Any], Any],
    ends: Callable[[Any, Any], None],
    fails: Callable[[Any], None],
    adds_loss: Callable[[keras.Layer], None],
) -> Iterator[None]:
    """Inside, and in this thread, tells of every call of a layer or of a graph's operation, and of losses of layers.

    Keras has no hook around a call; what is replaced here comes back with the end of the block.

    Args:
        begins: gets the layer or operation and its arguments, which Keras has cast. What it returns is a mark.
        ends: gets the mark and the outputs.
        fails: gets the mark where there is an error instead.
        adds_loss: gets the layer whose `add_loss` is called.
    """
    thread = threading.get_ident()
    call, add_loss = keras.Operation.__call__, keras.Layer.add_loss

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(self, *args, **kwargs)
        mark = begins(self, (args, kwargs))
        try:
            outputs = call(self, *args, **kwargs)
        except BaseException:
            fails(mark)
            raise
        ends(mark, outputs)
        return outputs

    def watched_add_loss(self: Any, loss: Any) -> None:
        if threading.get_ident() == thread:
            adds_loss(self)
        add_loss(self, loss)

    keras.Operation.__call__, keras.Layer.add_loss = watched_call, watched_add_loss
    try:
        yield
    finally:
        keras.Operation.__call__, keras.Layer.add_loss = call, add_loss


_before_training: list[Callable[[keras.Model], None]] = []


def call_before_training(check: Callable[[keras.Model], None]) -> None:
    """Has every Keras model looked at before it is trained, with all its optimizers in place.

    Keras has no hook there. A model is looked at when its `compile` is done; one whose class has a `compile` of its
    own, which sets more optimizers after Keras's, when its training step is made.

    Args:
        check: gets the model.
    """
    _before_training.append(check)
    if len(_before_training) > 1:
        return  # the hook is there already
    trainer = next(cls for cls in keras.Model.__mro__ if "compile" in vars(cls))
    maker = next(cls for cls in keras.Model.__mro__ if "make_train_function" in vars(cls))
    compile_model, make_train_function = trainer.compile, maker.make_train_function

    def look_at(model: keras.Model) -> None:
        for each in _before_training:
            each(model)

    @functools.wraps(compile_model)
    def compile_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = compile_model(self, *args, **kwargs)
        if type(self).compile is compile_and_check:
            look_at(self)
        return result

    @functools.wraps(make_train_function)
    def check_and_make(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self).compile is not compile_and_check and self.train_function is None:
            look_at(self)
        return make_train_function(self, *args, **kwargs)

    trainer.compile, maker.make_train_function = compile_and_check, check_and_make


def call_around_epochs(begin: Callable[[keras.Model], None], end: Callable[[keras.Model], None]) -> None:
    """Has functions called with every Keras model whose `fit` begins, and with those that end an epoch.

    Keras calls callbacks of the user's only.

    Args:
        begin: gets the model before the first epoch.
        end: gets the model after each epoch.
    """
    callbacks = keras.callbacks.CallbackList
    on_train_begin, on_epoch_end = callbacks.on_train_begin, callbacks.on_epoch_end

    @functools.wraps(on_train_begin)
    def begin_first(self: Any, logs: Any = None) -> None:
        if self.model is not None:
            begin(self.model)
        on_train_begin(self, logs)

    @functools.wraps(on_epoch_end)
    def end_then(self: Any, epoch: int, logs: Any = None) -> None:
        on_epoch_end(self, epoch, logs)
        if self.model is not None:
            end(self.model)

    callbacks.on_train_begin, callbacks.on_epoch_end = begin_first, end_then


_CALLING = {
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "While": ("body",),
    "StatelessWhile": ("body",),
}


def called_functions(op: tf.Operation) -> list[tuple[str, Any]]:
    """Names and graphs of the functions that an operation calls; TensorFlow has no public way from one to the other.

    Args:
        op: of a graph.
    """
    if op.type in ("Case", "StatelessCase"):
        names = [function.name for function in op.get_attr("branches")]
    else:
        names = [op.get_attr(attribute).name for attribute in _CALLING.get(op.type, ())]
    functions = [(name, op.graph._get_function(name)) for name in names]
    return [(name, function.graph) for name, function in functions if getattr(function, "graph", None) is not None]


def saving_to_h5() -> bool:
    """Whether Keras is writing a model to its old HDF5 format now."""
    return bool(_saving_options_flag("use_legacy_config"))


# Keras has no public name for what `keras.RematScope` leaves on a layer. Recomputing is for a backward pass, and in a
# graph Keras's fails for a layer that is called by keywords.
@contextlib.contextmanager
def without_remat(model: keras.Model) -> Iterator[None]:
    """Calls the layers and operations of a model without recomputing anything.

    Args:
        model: a Keras model.
    """
    layers = layers_by_path(model).values()
    operations = {id(each): each for layer in layers for each in (layer, *getattr(layer, "operations", ()))}
    modes = {key: vars(each)["_remat_mode"] for key, each in operations.items() if vars(each).get("_remat_mode")}
    for key in modes:
        vars(operations[key])["_remat_mode"] = None
    try:
        yield
    finally:
        for key, mode in modes.items():
            vars(operations[key])["_remat_mode"] = mode


# The classes and the reader of TensorFlow Lite's file format have no public name. They are imported late, for few users
# write such files.
def lite_schema() -> Any:
    """The module with the classes of TensorFlow Lite's file format."""
    from tensorflow.lite.python import schema_py_generated

    return schema_py_generated


def lite_model(content: bytes) -> Any:
    """The content of a TensorFlow Lite file as objects that can be changed."""
    from tensorflow.lite.tools import flatbuffer_utils

    return flatbuffer_utils.convert_bytearray_to_object(bytearray(content))


def lite_bytes(model: Any) -> bytes:
    """The content of the file for what `lite_model` returned."""
    from tensorflow.lite.tools import flatbuffer_utils

    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


# Keras files the weights of the layers in a list under the names of their classes: "dense", "head", "dense_1". Those of
# a class that stands in for another are filed as the other's are, so that the files of both models fit both.
_stored_like: dict[type, type] = {}
_addresses: contextvars.ContextVar["dict[tuple[int, str], str] | None"] = contextvars.ContextVar(
    "_addresses", default=None
)


def store_like(cls: type[keras.Layer], stock: type[keras.Layer]) -> None:
    """Has the weights of layers of a class stand in files where those of another class would.

    Files that were written before it had are read as well.

    Args:
        cls: the class, not those that inherit from it.
        stock: the other one, which has the same weights.
    """
    _stored_like[cls] = stock


def _names_in_file(kinds: Iterable[type]) -> list[str]:
    """The names that Keras gives to what is in one list, which have a number from the second of a class on."""
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        name = _to_snake_case(kind.__name__)
        counts[name] = counts.get(name, -1) + 1
        names.append(f"{name}_{counts[name]}" if counts[name] else name)
    return names


def _as_written(
    store: Any, path: str, saveables: "list[_KerasSaveable]", known: Any, by_keras: list[str], here: list[str]
) -> list[str]:
    """The addresses at which a file has what is in one list.

    Before version 0.2 each was filed by its own class, which gives more names of that class than a file has now. And
    `convert` put in fewer layers of such classes, always the last ones.
    """

    def are_there(addresses: list[str]) -> bool:
        unread = [each for saveable, each in zip(saveables, addresses, strict=True) if id(saveable) not in known]
        return all(_is_in_file(store, each) for each in unread)

    if are_there(by_keras):
        return by_keras
    if not are_there(here):
        for cls, stock in _stored_like.items():
            names = _names_in_file([cls] * len(saveables))
            count = sum(_is_in_file(store, f"{path}/{name}") for name in names)
            kinds = [_name_of(type(each)) for each in saveables]
            alike = [place for place, kind in enumerate(kinds) if kind.__name__ == stock.__name__]
            for place in alike[len(alike) - count :]:
                kinds[place] = cls
            before = [f"{path}/{name}" for name in _names_in_file(kinds)]
            if count and are_there(before):
                return before
    return here


def _saveables(container: Any) -> "list[_KerasSaveable]":
    return [each for each in _elements(container) if isinstance(each, _KerasSaveable)]


def _elements(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _name_of(cls: type) -> type:
    return _stored_like.get(cls, cls)


def _is_in_file(store: Any, path: str) -> bool:
    if hasattr(store, "has_path"):  # Keras 3.15
        return bool(store.has_path(path))
    if hasattr(store, "sharding_config"):
        return any(f"{key}/".startswith(f"/{path}/") for key in store.sharding_config["weight_map"])
    return path in (store.contents if hasattr(store, "contents") else store.h5_file)


def _filed(keras_function: Callable[..., None]) -> Callable[..., None]:
    """Keras's function that saves or loads one object, at the address that its class is given here."""

    @functools.wraps(keras_function)
    def at_its_address(
        saveable: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any, **kw: Any
    ) -> None:
        inner_path = (_addresses.get() or {}).get((id(saveable), inner_path), inner_path)
        return keras_function(saveable, weights_store, assets_store, inner_path, *args, **kw)

    return at_its_address


def _filed_together(keras_function: Callable[..., None]) -> Callable[..., None]:
    """Keras's function that saves or loads the objects in one list, with the addresses that they are given here."""

    @functools.wraps(keras_function)
    def at_their_addresses(
        container: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any, **kw: Any
    ) -> None:
        addresses = _addresses.get() or {}
        saveables = _saveables(container)
        if any(type(each) in _stored_like for each in saveables):
            kinds = [type(each) for each in saveables]
            by_keras = [f"{inner_path}/{name}" for name in _names_in_file(kinds)]
            here = [f"{inner_path}/{name}" for name in _names_in_file(map(_name_of, kinds))]
            known = kw.get("visited_saveables") or ()
            if (
                "failed_saveables" in kw
                and weights_store is not None
                and any(id(each) not in known for each in saveables)
            ):
                here = _as_written(weights_store, inner_path, saveables, known, by_keras, here)
            moved = zip(saveables, by_keras, here, strict=True)
            addresses = addresses | {(id(each), before): now for each, before, now in moved if now != before}
        token = _addresses.set(addresses)
        try:
            return keras_function(container, weights_store, assets_store, inner_path, *args, **kw)
        finally:
            _addresses.reset(token)

    return at_their_addresses


for _name in ("_save_state", "_load_state"):
    setattr(_saving_lib, _name, _filed(getattr(_saving_lib, _name)))
for _name in ("_save_container_state", "_load_container_state"):
    setattr(_saving_lib, _name, _filed_together(getattr(_saving_lib, _name)))


def layers_by_address(model: keras.Layer) -> dict[str, keras.Layer]:
    """A layer and all layers inside it, by the place in a file where Keras looks for their weights.

    That is the same for a model that is made again, whose layers may have other names. A layer that is used in several
    places stands at the first of them, before what is inside it.

    Args:
        model: a layer or model.
    """
    found: dict[str, keras.Layer] = {}
    seen: set[int] = set()

    def visit(value: Any, address: str) -> None:
        if not isinstance(value, (_KerasSaveable, list, dict, tuple, set)) or id(value) in seen:
            return
        if isinstance(value, _KerasSaveable):
            seen.add(id(value))
            if isinstance(value, keras.Layer):
                found.setdefault(address, value)
            for name, child in list(_saving_lib._walk_saveable(value)):
                visit(child, f"{address}/{name}")
            return
        inside.append(id(value))
        saveables = _saveables(value)
        for child, name in zip(saveables, _names_in_file(_name_of(type(each)) for each in saveables), strict=True):
            visit(child, f"{address}/{name}")
        for number, child in enumerate(each for each in _elements(value) if isinstance(each, (list, dict, tuple))):
            if id(child) not in inside:
                visit(child, f"{address}/container_{number}")
        inside.pop()

    inside: list[int] = []  # of what may hold itself
    visit(model, "")
    return found


def write_into_model_files(key: str, content_of: Callable[[keras.Model], Any]) -> None:
    """Has more written beside the configuration of a model that is saved, to `.keras` files, folders and pickles.

    Keras reads over it.

    Args:
        key: its name among those of a serialized Keras object.
        content_of: gets the model, returns what JSON can hold, or None to write nothing.
    """
    serialize = _saving_lib._serialize_model_as_json

    @functools.wraps(serialize)
    def serialize_with_more(model: keras.Model) -> tuple[str, str]:
        config, metadata = serialize(model)
        content = content_of(model)
        return config if content is None else json.dumps({**json.loads(config), key: content}), metadata

    _saving_lib._serialize_model_as_json = serialize_with_more


def load_with_keras(
    source: Any,
    custom_objects: "dict[str, Any] | None",
    compile: bool,
    safe_mode: bool,
    config: "dict[str, Any] | None" = None,
) -> Any:
    """The model in a file as `keras.saving.load_model` loads it, whatever the file is called.

    Args:
        source: a binary file, open for reading, or the path of a folder.
        custom_objects: as for `keras.saving.load_model`.
        compile: likewise.
        safe_mode: likewise.
        config: what to make the model from, or None for the configuration in the file.
    """
    load = _keras_readers[
        "_load_model_from_dir" if isinstance(source, (str, os.PathLike)) else "_load_model_from_fileobj"
    ]
    make = _saving_lib._model_from_config
    if config is not None:
        _saving_lib._model_from_config = lambda given, *args, **kw: make(json.dumps(config), *args, **kw)
    try:
        return load(source, custom_objects, compile, safe_mode)
    finally:
        _saving_lib._model_from_config = make


_keras_readers: dict[str, Callable[..., Any]] = {
    name: getattr(_saving_lib, name) for name in ("_load_model_from_dir", "_load_model_from_fileobj")
}


def read_model_files_by(read: Callable[[Any, "dict[str, Any] | None", bool, bool], Any]) -> None:
    """Has `keras.saving.load_model` and `pickle` read models by another function than Keras's, which may call that.

    Args:
        read: gets what `load_with_keras` gets, returns the model.
    """
    for name in _keras_readers:
        setattr(_saving_lib, name, functools.wraps(_keras_readers[name])(lambda *args, **kw: read(*args, **kw)))


@contextlib.contextmanager
def trusting(safe_mode: bool) -> Iterator[None]:
    """Inside, whatever Keras makes from a configuration may hold Python code, or must not.

    Keras's own argument does not reach the losses, metrics, schedules and optimizers of a file.

    Args:
        safe_mode: as for `keras.saving.load_model`; None of what the user has set for the whole process is undone.
    """
    allowed = _serialization_lib.in_safe_mode() is False
    with _serialization_lib.SafeModeScope(safe_mode and not allowed):
        yield
