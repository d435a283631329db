"""Trains a Wasserstein GAN with gradient penalty on handwritten digits, with 16-bit second-order gradients.

python -m examples.gradient_penalty                           # under the policy for this hardware
python -m examples.gradient_penalty --policy mixed_float16    # where scaling both gradients matters

The penalty comes from Gulrajani et al., "Improved Training of Wasserstein GANs" (https://arxiv.org/abs/1704.00028). It
uses the gradient of the critic's scores with respect to the input. So there are two 16-bit backward passes:

1. The inner one, for the norm in the penalty. No optimizer sees it, so this example scales and unscales it.
2. The outer one, through the penalty and the inner one, for the weights. The optimizer unscales it.

Both need the scale. The inner gradient must be unscaled before the penalty, which is not linear in it. A factor left in
there could not be divided out later. PyTorch's guide has the same order
(https://docs.pytorch.org/docs/stable/notes/amp_examples.html, "Gradient penalty"):

    inner = gradient of (scale * scores)        16-bit matmuls; the scale avoids underflow
    inner = float32(inner) / scale              back to size, in float32
    penalty = mean((norm(inner) - 1)**2)        in float32: squares overflow float16 above 255
    loss = ... + weight * penalty               the true loss
    gradients of optimizer.scale_loss(loss)     as in every training step; the optimizer unscales them

If the scale is too large for the inner gradient, the penalty is not finite, and neither are the gradients of the loss.
The step is skipped and the scale backs off, as for the outer gradient.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # only errors: the screen is for the table

import pathlib
from typing import Annotated, Any

import keras
import rich
import tensorflow as tf
import typer

import keras_mp
from examples.gan import GAN, LATENT_SIZE, OUTPUT, build_discriminator, build_generator, draw, load_images, train


def input_gradient(model: keras.Model, inputs: Any, scale: Any) -> Any:
    """The gradient of the model's scores with respect to its inputs, one for each example, in float32.

    Args:
        model: gives one score for each example; no layer may mix the examples of a batch, as batch normalization does.
        inputs: float tensor of shape (batch, ...).
        scale: float32 scalar, for example `optimizer.loss_scale`. It makes no difference but to what underflows.
    """
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        # A score depends on its example alone, so the gradient of the sum holds the gradient of each example.
        scaled = scale * tf.reduce_sum(tf.cast(model(inputs, training=True), tf.float32))
    return tf.cast(tape.gradient(scaled, inputs), tf.float32) / scale


def gradient_penalty(critic: keras.Model, images: Any, scale: Any) -> Any:
    """Returns how far the norms of the critic's input gradients are from 1, as a float32 scalar."""
    gradient = input_gradient(critic, images, scale)
    squares = tf.reduce_sum(gradient**2, axis=list(range(1, len(gradient.shape))))
    # The slope of a square root is infinite at 0, which makes the outer gradient NaN. Hence the small number.
    return tf.reduce_mean((tf.sqrt(squares + 1e-12) - 1.0) ** 2)


class WassersteinGAN(GAN):
    """A GAN whose discriminator, here called critic, gives scores with a slope of about 1 between real and generated.

    Args:
        generator: from noise of shape (batch, LATENT_SIZE) to images.
        critic: from images to one score each, large for real ones.
        critic_steps: updates of the critic for each of the generator. A batch is split into as many parts.
        penalty_weight: lambda in the paper.
        seed: of the noise.
    """

    def __init__(
        self,
        generator: keras.Model,
        critic: keras.Model,
        critic_steps: int = 5,
        penalty_weight: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__(generator, critic, seed)
        self.critic_steps = critic_steps
        self.penalty_weight = penalty_weight
        self.penalty = keras.metrics.Mean(name="penalty")

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that `fit` reports."""
        return [*super().metrics, self.penalty]

    def train_step(self, images: Any) -> dict[str, Any]:
        """Updates the critic on each part of the batch, then the generator."""
        for real in tf.split(images, self.critic_steps):
            self.train_critic(real)
        self.train_generator(tf.shape(images)[0] // self.critic_steps)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_critic(self, real: Any) -> None:
        """Updates the critic."""
        critic, optimizer = self.discriminator, self.discriminator_optimizer
        count = tf.shape(real)[0]
        generated = self.generator(self.make_noise(count), training=True)
        mixture = keras.random.uniform((count, 1, 1, 1), seed=self.noise)
        between = mixture * real + (1.0 - mixture) * generated
        with tf.GradientTape() as tape:
            penalty = gradient_penalty(critic, between, optimizer.loss_scale)
            scores = tf.reduce_mean(critic(generated, training=True)) - tf.reduce_mean(critic(real, training=True))
            loss = scores + self.penalty_weight * penalty
            scaled_loss = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, critic.trainable_variables)
        optimizer.apply_gradients(zip(gradients, critic.trainable_variables, strict=True))
        self.discriminator_loss.update_state(loss)
        self.penalty.update_state(penalty)

    def train_generator(self, count: Any) -> None:
        """Updates the generator, without penalty or second-order gradients."""
        generator, optimizer = self.generator, self.generator_optimizer
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(self.discriminator(generator(self.make_noise(count), training=True), training=True))
            scaled_loss = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, generator.trainable_variables)
        optimizer.apply_gradients(zip(gradients, generator.trainable_variables, strict=True))
        self.generator_loss.update_state(loss)

    def make_noise(self, count: Any) -> Any:
        """Returns fresh noise for a number of images."""
        return keras.random.normal((count, LATENT_SIZE), seed=self.noise)


def build(
    policy: str, image_shape: tuple[int, int, int], critic_steps: int = 5, seed: int = 0, jit_compile: bool = False
) -> WassersteinGAN:
    """Makes a compiled WassersteinGAN whose networks compute under a policy."""
    keras.utils.set_random_seed(seed)
    with keras_mp.policy_scope(policy):
        # Dropout would draw one mask for the penalty and another for the scores.
        generator, critic = build_generator(image_shape), build_discriminator(image_shape, dropout=0.0)
    gan = WassersteinGAN(generator, critic, critic_steps, seed=seed)
    gan.compile(
        generator_optimizer=keras_mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3, 0.0, 0.9)),
        discriminator_optimizer=keras_mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3, 0.0, 0.9)),
        jit_compile=jit_compile,
    )
    return gan


def main(
    dataset: Annotated[str, typer.Option(help="An image-classification set of tensorflow-datasets.")] = "digits",
    policy: Annotated[str, typer.Option(help="auto, mixed_float16, mixed_bfloat16 or float32.")] = "auto",
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in an update of the critic.")] = 64,
    critic_steps: Annotated[int, typer.Option(min=1, help="Updates of the critic for each of the generator.")] = 5,
    jit_compile: Annotated[bool, typer.Option(help="Let XLA compile the whole step.")] = False,
    seed: int = 0,
    picture: Annotated[pathlib.Path, typer.Option(help="Where the images go.")] = OUTPUT / "gradient_penalty.png",
) -> None:
    """Train a Wasserstein GAN, print its losses, penalty and loss scales, and draw what it generates."""
    images, image_shape = load_images(dataset, batch_size * critic_steps, seed)
    gan = build(policy, image_shape, critic_steps, seed, jit_compile)
    rich.print(train(gan, images, epochs))
    draw(gan(keras.random.normal((64, LATENT_SIZE), seed=seed)), picture)
    rich.print(f"Generated images: [bold]{os.path.relpath(picture)}[/bold]")


if __name__ == "__main__":
    typer.run(main)
