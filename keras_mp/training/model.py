"""`Model`: a `keras.Model` whose `fit` compiles by XLA, and runs on several devices and workers, as on one device."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_hooks, keras_models, patches, tf_replicas
from keras_mp.distribution import replicas, strategies, workers
from keras_mp.errors import (
    ArgumentError,
    DistributionError,
    KerasMPWarning,
)
from keras_mp.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras_mp.policies.policy import stacklevel
from keras_mp.training import batches, compiling, functions, optimizing
from keras_mp.training.forward_backward import ForwardBackward, Pass
from keras_mp.training.penalties import widen_penalties
from keras_mp.training.predictions import in_float32
from keras_mp.training.taking_over import inputs_and_outputs

__all__ = ["Functional", "Model"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Model(keras.Model):
    """A `keras.Model` that trains alike alone, on several devices and on several workers, with XLA or without.

    It goes wherever a `keras.Model` goes: `Model(inputs, outputs)` makes a functional model, `class Mine(Model)` with a
    `call` a subclassed one, `Model.from_model(model)` takes over the layers and weights of a functional or sequential
    Keras model. `compile`, `fit`, `evaluate`, `predict` and all else are Keras's, with these differences:

    - `jit_compile=True` works under every strategy. XLA compiles the forward and backward pass of each replica; what
      adds up over replicas and what writes variables (optimizer, metrics, batch statistics) stays outside. `"auto"`
      chooses by hardware; `jit_compile_reason` says what, and why.
    - Several replicas train as one device does on the whole batch: the loss is the mean over all rows, also of a last
      batch of which one replica has fewer, gradients are clipped when they have been added up, and the copies of batch
      statistics are averaged. Each replica draws random numbers of its own.
    - `fit`, `evaluate` and `predict` work under `tf.distribute.MultiWorkerMirroredStrategy`. Callbacks that write files
      run on the first worker only, and a worker that is lost is an error on the others.
    - Losses of layers are added up in float32, also where the layers compute in 16 bits.
    - A batch of which the optimizer skips the step leaves no value in the layers' state that is not finite.

    A model with replicas is made, and compiled, in the scope of its strategy; see `keras_mp.strategy`. A loss with
    `reduction="sum"` is the sum over all replicas. Losses of `add_loss`, and what a `compute_loss` of one's own
    returns, count as means over the rows, and so do activity regularizers, which count 1/N
    there with N replicas.

    A `train_step` of one's own that calls `super().train_step(data)` keeps all this. One that does its own forward and
    backward pass is run as Keras runs it, on one replica compiled as a whole if `jit_compile` says so.

    Args:
        *args, **kwargs: as for `keras.Model`: `inputs` and `outputs` for a functional model, and `name`, `trainable`,
            `dtype`.

    Example:
        >>> import keras, keras_mp
        >>> import numpy as np
        >>> inputs = keras.Input((4,))
        >>> model = keras_mp.Model(inputs, keras.layers.Dense(1)(inputs))
        >>> model.compile(keras_mp.LossScaleOptimizer("adam"), loss="mse", jit_compile=True)
        >>> history = model.fit(np.ones((8, 4)), np.zeros((8, 1)), verbose=0)
        >>> len(history.history["loss"])
        1
        >>> model.jit_compile_reason
        'jit_compile=True: XLA compiles the forward and backward pass.'
    """

    # What Keras's trainer has, whose types mypy cannot infer.
    jit_compile: bool
    steps_per_execution: int
    train_function: Any
    test_function: Any
    predict_function: Any

    _jit_compile_asked: "bool | str" = "auto"
    _jit_compile_reason = "compile() has not been called"
    _forward_backward: ForwardBackward | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Model":
        """Makes a functional model where the arguments are its inputs and outputs."""
        if cls is Model and keras_models.is_functional(args, kwargs):
            cls = Functional
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patches.install_on_first_use()
        if keras_models.is_functional(args, kwargs):
            if not isinstance(self, Functional):
                _make_functional(type(self))
            keras_models.Functional.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)

    @classmethod
    def from_model(cls, model: keras.Model) -> "Model":
        """Makes a model of the layers and weights of one that exists; both share them from then on.

        Args:
            model: a functional or built sequential Keras model. It is left as it was.

        Returns:
            A functional model, not compiled, of the same name, in the scope of the same strategy.

        Raises:
            ArgumentError: for a model without inputs and outputs that are known, with what to do instead.
            DistributionError: in the scope of a strategy that the model was not made in.

        Example:
            >>> import keras, keras_mp
            >>> sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
            >>> model = keras_mp.Model.from_model(sequential)
            >>> model.layers[-1] is sequential.layers[-1]
            True
        """
        inputs, outputs = inputs_and_outputs(model)
        own = tf_replicas.strategy_of(model)
        if tf.distribute.has_strategy() and own is not tf.distribute.get_strategy():
            raise DistributionError(
                f"from_model(): {model.name!r} was not made in the scope of the strategy in force, so that its weights "
                "have no copy on each device. Make it there, or make a copy of it there: "
                'keras_mp.Model.from_model(keras_mp.convert(model, "float32")), or another policy.'
            )
        with contextlib.nullcontext() if own is None or tf.distribute.has_strategy() else own.scope():
            return cls(inputs, outputs, name=model.name)

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: "bool | str" = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures the model for training, as in Keras.

        Args:
            optimizer: as in Keras.
            loss: as in Keras.
            loss_weights: as in Keras.
            metrics: as in Keras.
            weighted_metrics: as in Keras.
            run_eagerly: as in Keras.
            steps_per_execution: as in Keras.
            jit_compile: whether XLA compiles the forward and backward pass. "auto" does on GPUs and TPUs, unless a
                layer cannot be compiled, and not on a CPU; `jit_compile_reason` says what was chosen.
            auto_scale_loss: whether to wrap the optimizer in `keras_mp.LossScaleOptimizer` if any layer computes in
                float16 and it does not scale the loss already.

        Raises:
            ArgumentError: for another `jit_compile`, for True where a layer cannot be compiled, or if model or
                optimizer were not made in the scope of the strategy in force.
            DistributionError: if the layers have other dtype policies, or the loss is scaled otherwise, on another
                worker.
        """
        if jit_compile not in (True, False, "auto"):
            raise ArgumentError(f'`jit_compile` must be True, False or "auto". Received: jit_compile={jit_compile!r}')
        strategies.require_one_strategy(self, None)
        # Before the optimizers are made, whose variables workers create together.
        workers.require_alike(self, self.distribute_strategy, optimizing.scaling_of(self, optimizer, auto_scale_loss))
        compiles, reason = compiling.choose_jit_compile(
            self, jit_compile, run_eagerly, type(self).train_step is not Model.train_step
        )
        # What is named by a string is made here, where the model was.
        with contextlib.nullcontext() if tf.distribute.has_strategy() else self.distribute_strategy.scope():
            optimizer = keras.optimizers.get(optimizer)
            scales = optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
            if auto_scale_loss and not scales and optimizing.computes_in_float16(self):
                optimizer = LossScaleOptimizer(optimizer)
            strategies.require_one_strategy(self, optimizer)
            super().compile(
                optimizer=optimizer,
                loss=loss,
                loss_weights=loss_weights,
                metrics=metrics,
                weighted_metrics=weighted_metrics,
                run_eagerly=run_eagerly,
                steps_per_execution=steps_per_execution,
                jit_compile=compiles,
                auto_scale_loss=False,
            )
        if compiles and not self.jit_compile and not run_eagerly:
            reason = "not compiled: TensorFlow's ops are to be deterministic, which XLA's are not"
        self._jit_compile_asked, self._jit_compile_reason = jit_compile, reason
        self._forward_backward = None

    @property
    def jit_compile_reason(self) -> str:
        """What `compile` chose for `jit_compile`, and why."""
        return self._jit_compile_reason

    def get_compile_config(self) -> dict[str, Any]:
        """The arguments of `compile`, as they were given."""
        config = super().get_compile_config()
        return {**config, "jit_compile": self._jit_compile_asked} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model with what `get_compile_config` returned.

        Args:
            config: the arguments of `compile`.
        """
        if type(self).compile is not Model.compile:
            super().compile_from_config(config)  # Keras's words on a `compile` that only the user can call
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Trains on one replica's rows of a batch; see `keras.Model.train_step`.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The metrics by their names.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._build_for(x, y, sample_weight)
        optimizer, variables = self.optimizer, self.trainable_variables
        share, rows = self._share_of_batch(x)
        # The scale, whatever the optimizer's way to apply it; and it is told the loss, to blame it where it must.
        scale = optimizer.scale_loss(tf.ones([])) if variables else None
        done = self._run(x, y, sample_weight, training=True, scale=scale, share=share)
        replicas.assign_from_replicas(done.state, share)
        if variables:
            optimizer.scale_loss(done.loss)
            optimizing.apply(self.optimizer, done.gradients, variables)
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return self._metrics_of(done, x, y, sample_weight, rows)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates one replica's rows of a batch; see `keras.Model.test_step`.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The metrics by their names.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._build_for(x, y, sample_weight)
        share, rows = self._share_of_batch(x)
        done = self._run(x, y, sample_weight, training=False, share=share)
        replicas.assign_from_replicas(done.state, share)
        return self._metrics_of(done, x, y, sample_weight, rows)

    def predict_step(self, data: Any) -> Any:
        """The outputs for one replica's rows of a batch; see `keras.Model.predict_step`.

        Args:
            data: `x`, or a tuple that begins with it.

        Returns:
            The model's outputs.
        """
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        self._build_for(x, None, None)
        done = self._run(x, training=False, only_outputs=True)
        for variable, value in done.state:
            variable.assign(value)
        return done.outputs

    def make_train_function(self, force: bool = False) -> Any:
        """Makes what `fit` calls for each batch, or several; see `keras.Model.make_train_function`."""
        if self.train_function is None or force:
            is_ours = type(self).train_step is Model.train_step
            self.train_function = functions.make_function_of(self, self.train_step, is_ours)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Makes what `evaluate` calls for each batch, or several; see `keras.Model.make_test_function`."""
        if self.test_function is None or force:
            is_ours = type(self).test_step is Model.test_step
            self.test_function = functions.make_function_of(self, self.test_step, is_ours)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes what `predict` calls for each batch, or several; see `keras.Model.make_predict_function`."""
        if self.predict_function is None or force:
            with functions.keras_compiling(self, type(self).predict_step is not Model.predict_step):
                super().make_predict_function(force=True)
        return self.predict_function

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the model; see `keras.Model.fit`.

        Args:
            *args: as for `keras.Model.fit`.
            **kwargs: the same by name.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            DistributionError: for a batch that does not divide among the replicas, or a model made outside the scope of
                the strategy in force, or other dtype policies or loss scaling on another worker than on this one.
            WorkerLostError: where another worker does not answer any more.
            CompilationError: where XLA cannot compile a layer.
        """
        strategies.require_one_strategy(self, self.optimizer if self.compiled else None)
        strategy = self.distribute_strategy
        given = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs).arguments
        given.pop("self")
        if workers.is_one_of_several(strategy):
            given["callbacks"] = workers.callbacks_here(given.get("callbacks"), strategy)
            if not workers.is_chief(strategy) and given.get("verbose", "auto") == "auto":
                given["verbose"] = 0
        if self.built and self.compiled and self.optimizer is not None and not self.optimizer.built:
            # Callbacks that restore it would build it outside the scope.
            with strategy.scope():
                self.optimizer.build(self.trainable_variables)
        with compiling.errors_in_words(self), self._checking_batches():
            if self.compiled:  # policies, and what is made late, may be others than when it was compiled
                workers.require_alike(self, strategy, optimizing.scaling_of(self, self.optimizer, False))
            return super().fit(**given)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the model; see `keras.Model.evaluate`.

        Args:
            *args: as for `keras.Model.evaluate`.
            **kwargs: the same by name.

        Returns:
            The loss and metrics.
        """
        strategies.require_one_strategy(self, None)
        with compiling.errors_in_words(self), self._checking_batches(False):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Computes outputs; see `keras.Model.predict`.

        Args:
            *args: as for `keras.Model.predict`.
            **kwargs: the same by name.

        Returns:
            NumPy arrays of the outputs, on every worker those for all rows.
        """
        strategies.require_one_strategy(self, None)
        with compiling.errors_in_words(self):
            return super().predict(*args, **kwargs)

    def _run(self, *arguments: Any, **settings: Any) -> Pass:
        if self._forward_backward is None:
            self._forward_backward = ForwardBackward(self)
        return self._forward_backward(*arguments, jit_compile=bool(self.jit_compile), **settings)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Keras's, of predictions in float32: in 16 bits top-k metrics raise, and those of one's own round on."""
        return super().compute_metrics(x, y, keras.tree.map_structure(in_float32, y_pred), sample_weight)

    def _share_of_batch(self, x: Any) -> tuple["tf.Tensor | None", tf.Tensor]:
        first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
        return replicas.share_of_batch(keras.ops.shape(first)[0])

    def _metrics_of(self, done: Pass, x: Any, y: Any, sample_weight: Any, rows: tf.Tensor) -> dict[str, Any]:
        # The tracker's variables add up over replicas: to the loss of the whole batch, weighted by all its rows.
        replicas = self.distribute_strategy.num_replicas_in_sync
        keras_models.loss_tracker(self).update_state(
            done.loss * replicas, sample_weight=tf.cast(rows, tf.float32) / replicas
        )
        return self.compute_metrics(x, y, done.outputs, sample_weight=sample_weight)

    def _build_for(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Creates what training needs and does not exist yet, outside the graph that is being traced."""
        unbuilt = [each for each in keras_models.loss_and_metrics(self) if not each.built]
        if (unbuilt and y is not None) or not all(layer.built for layer in keras_models.layers(self)):
            replicas.once_for_all_replicas(lambda: keras_models.build(self, (x, y, sample_weight)), [])
        widen_penalties(keras_models.layers(self))

    def _aggregate_additional_loss(self, loss: Any) -> Any:
        # Keras adds float16 losses of layers to a float32 loss, which TensorFlow refuses.
        return super()._aggregate_additional_loss(tf.cast(loss, tf.float32) if loss.dtype.size < 4 else loss)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # Keras's fails on the batches that a worker of several has. Without a strategy the first step builds, which
        # takes no batch from a generator.
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1:
            return
        first = batches.first_of_replica(strategy, iterator, data_batch, checks=self._checks_batches)
        with strategy.scope():
            keras_models.build(self, first)

    _checks_batches = False

    @contextlib.contextmanager
    def _checking_batches(self, wanted: bool = True) -> Iterator[None]:
        before, self._checks_batches = self._checks_batches, wanted
        try:
            yield
        finally:
            self._checks_batches = before


@keras.saving.register_keras_serializable(package="keras_mp")
class Functional(Model, keras_models.Functional):
    """What `keras_mp.Model(inputs, outputs)` makes, as Keras's class of that name is what `keras.Model` makes.

    Args:
        inputs: a Keras input tensor, or a list, tuple or dictionary of them.
        outputs: Keras tensors computed from them.
        name: the model's name.
        trainable: whether the layers train.
    """


def _make_functional(cls: type) -> type:
    """Lets a subclass of `Model` that calls `super().__init__(inputs, outputs)` inherit from `Functional`.

    Keras does so itself, but by changing the bases of every class in between, and so those of `Model` for everybody.
    """
    if cls is Model:
        return Functional
    if issubclass(cls, Model):
        cls.__bases__ = tuple(_make_functional(base) for base in cls.__bases__)
    return cls


def _warn_of_replicas_of_keras(model: keras.Model) -> None:
    """Warns where Keras is to have XLA compile a step of several replicas, at which it fails."""
    optimizer = getattr(model, "optimizer", None)
    ours = isinstance(model, Model) or not isinstance(optimizer, LossScaleOptimizer)
    if ours or model.jit_compile is not True or model.distribute_strategy.num_replicas_in_sync == 1:
        return
    warnings.warn(
        f"Model {model.name!r} is a keras.Model, and XLA cannot compile Keras's step of "
        f"{model.distribute_strategy.num_replicas_in_sync} replicas. Compile and fit "
        "keras_mp.Model.from_model(model), or write model.compile(..., jit_compile=False).",
        KerasMPWarning,
        stacklevel=stacklevel(),
    )


keras_hooks.call_before_training(_warn_of_replicas_of_keras)
