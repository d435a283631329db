"""Trains a small DCGAN on handwritten digits: two networks, two optimizers, and a loss scale for each of them.

python -m examples.gan                            # under the policy for this hardware
python -m examples.gan --policy mixed_float16     # where loss scales matter
python -m examples.gan --jit-compile              # both updates in one step compiled by XLA
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # only errors: the screen is for the table

import math
import pathlib
from typing import Annotated, Any

import keras
import numpy as np
import rich
import tensorflow as tf
import typer
from rich.table import Table

import keras_mp
from examples import image_classification

OUTPUT = pathlib.Path(__file__).parent / "output"
LATENT_SIZE = 32


def build_generator(image_shape: tuple[int, int, int]) -> keras.Model:
    """Makes a network from noise to images in [-1, 1], under the global policy."""
    height, width, channels = image_shape
    noise = x = keras.Input((LATENT_SIZE,), name="noise")
    x = keras_mp.layers.Dense(height // 4 * (width // 4) * 128, use_bias=False)(x)
    x = keras.layers.Reshape((height // 4, width // 4, 128))(x)
    for filters in (64, 32):
        x = keras_mp.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        x = keras.layers.Conv2DTranspose(filters, 4, strides=2, padding="same", use_bias=False)(x)
    x = keras_mp.layers.BatchNormalization(momentum=0.9)(x)
    x = keras.layers.ReLU()(x)
    x = keras_mp.layers.Conv2D(channels, 3, padding="same")(x)
    # Outputs of a model are float32: images here, logits below.
    return keras.Model(noise, keras_mp.layers.Float32(keras.layers.Activation("tanh"), name="image")(x))


def build_discriminator(image_shape: tuple[int, int, int], dropout: float = 0.1) -> keras.Model:
    """Makes a network whose logit tells real images from generated ones, under the global policy."""
    image = x = keras.Input(image_shape, name="image")
    for filters in (64, 128):
        x = keras_mp.layers.Conv2D(filters, 4, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.LeakyReLU(0.2)(x)
        x = keras.layers.Dropout(dropout)(x)
    x = keras_mp.layers.Dense(1)(keras.layers.Flatten()(x))
    return keras.Model(image, keras_mp.layers.Float32(keras.layers.Activation("linear"), name="logit")(x))


class GAN(keras.Model):
    """A generator and a discriminator that train each other.

    Args:
        generator: from noise of shape (batch, LATENT_SIZE) to images in [-1, 1].
        discriminator: from images to one logit each, large for real ones.
        seed: of the noise.
    """

    def __init__(self, generator: keras.Model, discriminator: keras.Model, seed: int = 0) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.noise = keras.random.SeedGenerator(seed)
        self.generator_loss = keras.metrics.Mean(name="generator_loss")
        self.discriminator_loss = keras.metrics.Mean(name="discriminator_loss")

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that `fit` reports, and resets at the start of each epoch."""
        return [self.generator_loss, self.discriminator_loss]

    def compile(
        self,
        generator_optimizer: keras_mp.LossScaleOptimizer,
        discriminator_optimizer: keras_mp.LossScaleOptimizer,
        **kwargs: Any,
    ) -> None:
        """Takes an optimizer for each network, and the arguments of `keras.Model.compile`."""
        super().compile(optimizer=None, **kwargs)
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        # Keras builds `model.optimizer`; it does not know of these two.
        generator_optimizer.build(self.generator.trainable_variables)
        discriminator_optimizer.build(self.discriminator.trainable_variables)

    def call(self, noise: Any, training: bool = False) -> Any:
        """Generates an image for each row of noise."""
        return self.generator(noise, training=training)

    def train_step(self, images: Any) -> dict[str, Any]:
        """Updates both networks. Each optimizer scales the loss of its network."""
        noise = keras.random.normal((tf.shape(images)[0], LATENT_SIZE), seed=self.noise)
        with tf.GradientTape() as generator_tape, tf.GradientTape() as discriminator_tape:
            generated = self.generator(noise, training=True)
            real_logits = self.discriminator(images, training=True)
            fake_logits = self.discriminator(generated, training=True)
            # The logits are float32, and so are the losses.
            generator_loss = binary_crossentropy(1.0, fake_logits)
            discriminator_loss = binary_crossentropy(1.0, real_logits) + binary_crossentropy(0.0, fake_logits)
            # Inside the tapes, so that the scaled loss is differentiated.
            scaled_generator_loss = self.generator_optimizer.scale_loss(generator_loss)
            scaled_discriminator_loss = self.discriminator_optimizer.scale_loss(discriminator_loss)

        for tape, scaled_loss, network, optimizer in (
            (generator_tape, scaled_generator_loss, self.generator, self.generator_optimizer),
            (discriminator_tape, scaled_discriminator_loss, self.discriminator, self.discriminator_optimizer),
        ):
            gradients = tape.gradient(scaled_loss, network.trainable_variables)
            optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))

        self.generator_loss.update_state(generator_loss)
        self.discriminator_loss.update_state(discriminator_loss)
        return {metric.name: metric.result() for metric in self.metrics}


def binary_crossentropy(label: float, logits: Any) -> Any:
    """Returns the mean cross-entropy of logits that all have one label."""
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(tf.fill(tf.shape(logits), label), logits))


def load_images(dataset: str, batch_size: int, seed: int) -> tuple[tf.data.Dataset, tuple[int, int, int]]:
    """Returns training images in [-1, 1] without labels, and their shape."""
    data = image_classification.load(dataset, batch_size, seed=seed, drop_remainder=True)
    return data.train.map(lambda image, label: 2.0 * image - 1.0), data.image_shape


def build(policy: str, image_shape: tuple[int, int, int], seed: int = 0, jit_compile: bool = False) -> GAN:
    """Makes a compiled GAN whose networks compute under a policy."""
    keras.utils.set_random_seed(seed)
    with keras_mp.policy_scope(policy):
        gan = GAN(build_generator(image_shape), build_discriminator(image_shape), seed)
    # By default the scale grows every 2000 steps. This training is shorter.
    gan.compile(
        generator_optimizer=keras_mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3, 0.5), dynamic_growth_steps=200),
        discriminator_optimizer=keras_mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3, 0.5), dynamic_growth_steps=200),
        jit_compile=jit_compile,
    )
    return gan


def train(gan: GAN, images: tf.data.Dataset, epochs: int) -> Table:
    """Trains, and returns about ten lines of results."""
    optimizers = gan.generator_optimizer, gan.discriminator_optimizer
    names = [metric.name for metric in gan.metrics]
    headings = [name.replace("_", " ") for name in names]
    table = Table("epoch", *headings, "loss scales", "skipped steps", title=gan.generator.layers[1].dtype_policy.name)

    def report(epoch: int, logs: dict[str, float]) -> None:
        if (epoch + 1) % max(epochs // 10, 1) == 0:
            scales = ", ".join(f"2^{math.log2(float(optimizer.loss_scale)):g}" for optimizer in optimizers)
            skips = ", ".join(f"{int(optimizer.skipped_steps)}" for optimizer in optimizers)
            table.add_row(f"{epoch + 1}", *(f"{logs[name]:.3f}" for name in names), scales, skips)

    reporter = keras.callbacks.LambdaCallback(on_epoch_end=report)
    gan.fit(images, epochs=epochs, shuffle=False, verbose=0, callbacks=[reporter])  # the pipeline shuffles
    return table


def draw(images: Any, path: pathlib.Path) -> None:
    """Draws full rows of eight images in [-1, 1] as a PNG."""
    images = np.clip((np.asarray(images) + 1) / 2, 0, 1)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    _, height, width, channels = images.shape
    rows = images.reshape(-1, 8, height, width, channels)
    grid = rows.transpose(0, 2, 1, 3, 4).reshape(-1, 8 * width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    keras.utils.save_img(path, grid.repeat(8, axis=0).repeat(8, axis=1))


def main(
    dataset: Annotated[str, typer.Option(help="An image-classification set of tensorflow-datasets.")] = "digits",
    policy: Annotated[str, typer.Option(help="auto, mixed_float16, mixed_bfloat16 or float32.")] = "auto",
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    jit_compile: Annotated[bool, typer.Option(help="Let XLA compile the whole step.")] = False,
    seed: int = 0,
    picture: Annotated[pathlib.Path, typer.Option(help="Where the generated images go.")] = OUTPUT / "gan.png",
) -> None:
    """Train a GAN, print the losses and the loss scales, and draw what it generates."""
    images, image_shape = load_images(dataset, batch_size, seed)
    gan = build(policy, image_shape, seed, jit_compile)
    rich.print(train(gan, images, epochs))
    draw(gan(keras.random.normal((64, LATENT_SIZE), seed=seed)), picture)
    rich.print(f"Generated images: [bold]{os.path.relpath(picture)}[/bold]")


if __name__ == "__main__":
    typer.run(main)
