"""A custom training loop: gradient accumulation, clipping, several replicas, checkpoints, and a loss scale.

python -m examples.custom_loop                                      # one device
python -m examples.custom_loop --strategy mirrored                  # all GPUs
python -m examples.custom_loop --strategy mirrored --replicas 2     # two replicas on the CPU, to try it out
python -m examples.custom_loop --epochs 10 --resume                 # continues the last run

A run that was interrupted and resumed ends with the same weights as one that was not.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # only errors: the screen is for the table

import pathlib
from typing import Annotated, Any

import keras
import rich
import tensorflow as tf
import typer
from rich.table import Table

import keras_mp
from examples import image_classification
from examples.digits import build_model

CHECKPOINTS = pathlib.Path(__file__).parent / "output" / "custom_loop"


class Trainer:
    """A model, its optimizer and the steps that train it; all that a checkpoint has to hold.

    Args:
        image_shape: height, width and channels.
        num_classes: number of logits.
        batch_size: images in a step, over all replicas.
        policy: dtype policy of the model.
        strategy: where to train.
        accumulate: steps whose gradients make one update.
        seed: of the weights and of dropout.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        batch_size: int,
        policy: str = "auto",
        strategy: tf.distribute.Strategy | None = None,
        accumulate: int = 2,
        seed: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.strategy = strategy or tf.distribute.get_strategy()
        keras.utils.set_random_seed(seed)
        # Make every variable in the strategy's scope, so that each replica has a copy.
        with self.strategy.scope():
            with keras_mp.policy_scope(policy):
                self.model = build_model(image_shape, num_classes)
            # Clipping and accumulation belong to the inner optimizer, which gets gradients of the true loss: unscaled,
            # and added up over the replicas. A step that overflows leaves the accumulated gradients as they are.
            inner = keras.optimizers.Adam(1e-3, global_clipnorm=1.0, gradient_accumulation_steps=accumulate)
            self.optimizer = keras_mp.LossScaleOptimizer(inner)
            self.optimizer.build(self.model.trainable_variables)
            self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        self.epoch = tf.Variable(0, dtype=tf.int64)
        # tf.train.Checkpoint does not find the state of Keras's random numbers by itself.
        dropouts = [layer for layer in self.model.layers if isinstance(layer, keras.layers.Dropout)]
        self.checkpoint = tf.train.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            epoch=self.epoch,
            random=[layer.seed_generator.state.value for layer in dropouts],
        )

    def replica_step(self, images: Any, labels: Any) -> tuple[Any, Any]:
        """Runs one replica's part of a training step. Returns its share of the loss and of the right predictions."""
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)  # float32 under every policy
            # Gradients are added up over the replicas, so each replica divides by the size of the global batch.
            loss = tf.nn.compute_average_loss(self.loss(labels, logits), global_batch_size=self.batch_size)
            scaled_loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, self.model.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        return loss, count_correct(labels, logits)

    @tf.function
    def train_step(self, batch: Any) -> tuple[Any, Any]:
        """Runs one training step on all replicas. Returns the loss and the number of right predictions."""
        results = self.strategy.run(self.replica_step, args=batch)
        loss, correct = (self.strategy.reduce(tf.distribute.ReduceOp.SUM, each, axis=None) for each in results)
        return loss, correct

    @tf.function
    def test_step(self, images: Any, labels: Any) -> Any:
        """Returns the number of right predictions."""
        return count_correct(labels, self.model(images, training=False))

    def train_epoch(self, dataset: tf.data.Dataset) -> dict[str, float]:
        """Trains one epoch. Returns the mean loss, the accuracy and the number of skipped steps."""
        loss, correct = keras.metrics.Mean(), keras.metrics.Mean()
        skipped = 0
        for batch in self.strategy.experimental_distribute_dataset(dataset):
            step_loss, step_correct = self.train_step(batch)
            loss.update_state(step_loss)
            correct.update_state(step_correct)
            # Reading it waits for the step to end. With short steps on a remote device, read it less often.
            if self.optimizer.last_step_skipped:
                skipped += 1
        self.epoch.assign_add(1)
        accuracy = float(correct.result()) / self.batch_size
        return {"loss": float(loss.result()), "accuracy": accuracy, "skipped": skipped}

    def test(self, data: image_classification.ImageSet) -> float:
        """Returns the accuracy on the test images."""
        return sum(int(self.test_step(images, labels)) for images, labels in data.test) / data.num_test


def count_correct(labels: Any, logits: Any) -> Any:
    """Counts the rows whose largest logit is at the label."""
    return tf.math.count_nonzero(tf.argmax(logits, axis=-1, output_type=labels.dtype) == labels)


def make_strategy(name: str, replicas: int) -> tf.distribute.Strategy:
    """The default strategy, or a mirrored one over all GPUs, or over as many logical devices of the CPU as asked for.

    The latter can only be made before TensorFlow has used the CPU.
    """
    if name == "default":
        return tf.distribute.get_strategy()
    if name != "mirrored":
        raise typer.BadParameter(f"--strategy must be default or mirrored. Received: {name}")
    if not replicas:
        return tf.distribute.MirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(replicas)])


def main(
    dataset: Annotated[str, typer.Option(help="An image-classification set of tensorflow-datasets.")] = "digits",
    policy: Annotated[str, typer.Option(help="auto, mixed_float16, mixed_bfloat16 or float32.")] = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="In all, with those of the run that is resumed.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step, over all replicas.")] = 64,
    accumulate: Annotated[int, typer.Option(min=1, help="Steps whose gradients make one update.")] = 2,
    strategy: Annotated[str, typer.Option(help="default or mirrored.")] = "default",
    replicas: Annotated[int, typer.Option(min=0, help="Replicas on the CPU; 0 takes all GPUs.")] = 0,
    checkpoints: Annotated[pathlib.Path, typer.Option(help="The folder of the checkpoints.")] = CHECKPOINTS,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    seed: int = 0,
) -> None:
    """Train in a custom loop, with a checkpoint after each epoch, and print the results."""
    where = make_strategy(strategy, replicas)

    def load(epoch: int) -> image_classification.ImageSet:
        # The order of batches depends on the epoch's number alone, so a resumed run sees the same batches.
        return image_classification.load(dataset, batch_size, seed=seed + epoch, drop_remainder=True)

    data = load(0)
    trainer = Trainer(data.image_shape, data.num_classes, batch_size, policy, where, accumulate, seed)
    manager = tf.train.CheckpointManager(trainer.checkpoint, checkpoints, max_to_keep=2)
    if resume and manager.latest_checkpoint:
        trainer.checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        rich.print(f"Resumed after epoch {int(trainer.epoch)} from {os.path.relpath(manager.latest_checkpoint)}")

    table = Table("epoch", "loss", "accuracy", "loss scale", "skipped steps")
    for epoch in range(int(trainer.epoch), epochs):
        result = trainer.train_epoch(load(epoch).train)
        manager.save(checkpoint_number=epoch + 1)
        table.add_row(
            f"{epoch + 1}",
            f"{result['loss']:.4f}",
            f"{result['accuracy']:.2%}",
            f"{float(trainer.optimizer.loss_scale):g}",
            f"{result['skipped']}",
        )
    rich.print(table, f"Test accuracy: [bold]{trainer.test(data):.2%}[/bold], {where.num_replicas_in_sync} replica(s)")


if __name__ == "__main__":
    typer.run(main)
