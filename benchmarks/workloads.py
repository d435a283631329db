"""The models and data of `benchmarks.training`: each written once, and made from Keras's layers or from ours.

The data is made up. Labels come from a random network, or for tokens from a table of scores. So there is something to
learn, and every run learns the same.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

import keras_mp

__all__ = ["APPLICATIONS", "LANGUAGE_MODEL", "OURS", "STOCK", "WORKLOADS", "Application", "Kit", "Workload", "make"]

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Kit:
    """The classes that a model is made from.

    Args:
        ours: whether to take this package's classes, where there is one.
    """

    ours: bool

    def layer(self, name: str, *arguments: Any, **settings: Any) -> Any:
        """Returns a layer by the name of its class.

        Args:
            name: of a class of `keras.layers`.
            *arguments: as the class takes them.
            **settings: the same by name.
        """
        classes = keras_mp.layers if self.ours and hasattr(keras_mp.layers, name) else keras.layers
        return getattr(classes, name)(*arguments, **settings)

    @property
    def gelu(self) -> Any:
        """Returns the activation."""
        return keras_mp.activations.gelu if self.ours else "gelu"

    @property
    def model(self) -> type[keras.Model]:
        """Makes a model of inputs and outputs."""
        return keras_mp.Model if self.ours else keras.Model

    def loss(self) -> keras.losses.Loss:
        """Returns the cross-entropy of logits and class numbers."""
        return (keras_mp.losses if self.ours else keras.losses).SparseCategoricalCrossentropy(from_logits=True)

    def optimizer(self, optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        """Returns an optimizer as a user of the kit would have it.

        Args:
            optimizer: Keras's, which Keras wraps itself where the policy is mixed_float16.
        """
        return keras_mp.LossScaleOptimizer(optimizer) if self.ours else optimizer


STOCK, OURS = Kit(False), Kit(True)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and its data.

    Args:
        name: name of the workload.
        build: makes inputs and outputs from a kit and the settings, under the policy in force.
        data: makes inputs and labels from a NumPy generator, a number of rows and the settings.
        batch: rows of a step.
        settings: sizes, by names that `build` and `data` know.
        small: tiny sizes, to try it out.
        learning_rate: rate of the optimizer.
        optimizer: its class. For large embeddings that is Adagrad, as in the tutorials of TensorFlow Recommenders and
            Keras Recommenders.
    """

    name: str
    build: Callable[..., tuple[Any, Any]]
    data: Callable[..., tuple[Any, np.ndarray]]
    batch: int
    settings: Mapping[str, Any]
    small: Mapping[str, Any]
    learning_rate: float = 1e-3
    optimizer: type[keras.optimizers.Optimizer] = keras.optimizers.Adam

    def model(self, kit: "Kit", policy: str) -> keras.Model:
        """Returns the model, not compiled.

        Args:
            kit: the kit to make it from.
            policy: the name of its policy.
        """
        with keras_mp.policy_scope(policy):
            return kit.model(*self.build(kit, **self.settings))

    def smaller(self) -> "Workload":
        """Returns the same with tiny sizes."""
        return dataclasses.replace(self, settings={**self.settings, **self.small}, batch=8)

    def batches(self, count: int, seed: int = 0) -> tuple[Any, np.ndarray]:
        """Returns inputs and labels of some batches, one after the other.

        Args:
            count: of batches.
            seed: makes the same data again.
        """
        return self.data(np.random.default_rng(seed), count * self.batch, **self.settings)


@dataclasses.dataclass(frozen=True)
class Application(Workload):
    """A model of `keras.applications`, as it is, or for ours as `keras_mp.convert` makes it."""

    def model(self, kit: Kit, policy: str) -> keras.Model:
        """Returns the model, not compiled.

        Args:
            kit: of whom it is.
            policy: the name of its policy.
        """
        build = getattr(keras.applications, self.name)
        size = self.settings["size"]
        settings = {"weights": None, "input_shape": (size, size, 3), "classes": CLASSES, "classifier_activation": None}
        if kit.ours:
            return kit.model.from_model(keras_mp.convert(build(**settings), policy))
        with keras_mp.policy_scope(policy):
            return build(**settings)


def make(workload: Workload, kit: Kit, policy: str, jit_compile: bool = False, seed: int = 0) -> keras.Model:
    """Returns a compiled model.

    Args:
        workload: the workload.
        kit: the kit to make it from.
        policy: the name of its policy.
        jit_compile: whether XLA compiles its step.
        seed: seed of its initial weights, which do not depend on kit and policy.
    """
    keras.utils.set_random_seed(seed)
    model = workload.model(kit, policy)
    optimizer = kit.optimizer(workload.optimizer(workload.learning_rate))
    model.compile(optimizer, kit.loss(), metrics=["accuracy"], jit_compile=jit_compile)
    return model


def _perceptron(kit: Kit, features: int, units: int, **_: Any) -> tuple[Any, Any]:
    x = inputs = keras.Input((features,))
    for _index in range(4):
        x = kit.layer("Dense", units, activation="relu")(x)
    return inputs, kit.layer("Dense", CLASSES)(x)


def _vectors(generator: np.random.Generator, rows: int, features: int, **_: Any) -> tuple[np.ndarray, np.ndarray]:
    x = generator.standard_normal((rows, features), "float32")
    return x, _classes(x)


def _resnet(kit: Kit, channels: int, blocks: int, size: int, **_: Any) -> tuple[Any, Any]:
    def convolution(x: Any, channels: int, kernel: int = 3, strides: int = 1) -> Any:
        x = kit.layer("Conv2D", channels, kernel, strides=strides, padding="same", use_bias=False)(x)
        return kit.layer("BatchNormalization")(x)

    inputs = keras.Input((size, size, 3))
    x = kit.layer("ReLU")(convolution(inputs, channels))
    for stage in range(3):
        for block in range(blocks):
            strides, width = 1 + (stage > 0 and block == 0), channels * 2**stage
            y = kit.layer("ReLU")(convolution(x, width, strides=strides))
            y = convolution(y, width)
            if x.shape != y.shape:
                x = convolution(x, width, 1, strides)
            x = kit.layer("ReLU")(kit.layer("Add")([x, y]))
    x = kit.layer("GlobalAveragePooling2D")(x)
    return inputs, kit.layer("Dense", CLASSES)(x)


def _images(generator: np.random.Generator, rows: int, size: int, **_: Any) -> tuple[np.ndarray, np.ndarray]:
    labels = generator.integers(0, CLASSES, rows).astype("int32")
    patterns = np.random.default_rng(1).standard_normal((CLASSES, size, size, 3), "float32")
    return 0.3 * patterns[labels] + generator.standard_normal((rows, size, size, 3), "float32"), labels


def _embedded(kit: Kit, words: int, steps: int, width: int) -> tuple[Any, Any]:
    inputs = keras.Input((steps,), dtype="int32")
    x = kit.layer("Embedding", words, width)(inputs)
    positions = kit.layer("Embedding", steps, width)(keras.ops.arange(steps))
    return inputs, kit.layer("Add")([x, positions[None]])


def _encoder(kit: Kit, x: Any, layers: int, width: int, heads: int, causal: bool) -> Any:
    for _index in range(layers):
        y = kit.layer("LayerNormalization")(x)
        y = kit.layer("MultiHeadAttention", heads, width // heads)(y, y, use_causal_mask=causal)
        x = kit.layer("Add")([x, y])
        y = kit.layer("LayerNormalization")(x)
        y = kit.layer("Dense", 4 * width, activation=kit.gelu)(y)
        x = kit.layer("Add")([x, kit.layer("Dense", width)(y)])
    return kit.layer("LayerNormalization")(x)


def _transformer(kit: Kit, words: int, steps: int, width: int, heads: int, layers: int, **_: Any) -> tuple[Any, Any]:
    inputs, x = _embedded(kit, words, steps, width)
    x = _encoder(kit, x, layers, width, heads, causal=False)
    return inputs, kit.layer("Dense", CLASSES)(kit.layer("GlobalAveragePooling1D")(x))


def _texts(
    generator: np.random.Generator, rows: int, words: int, steps: int, **_: Any
) -> tuple[np.ndarray, np.ndarray]:
    x = generator.integers(0, words, (rows, steps)).astype("int32")
    scores = np.random.default_rng(1).standard_normal((words, CLASSES), "float32")
    return x, scores[x].sum(1).argmax(-1).astype("int32")


def _language_model(kit: Kit, words: int, steps: int, width: int, heads: int, layers: int, **_: Any) -> tuple[Any, Any]:
    inputs, x = _embedded(kit, words, steps, width)
    x = _encoder(kit, x, layers, width, heads, causal=True)
    return inputs, kit.layer("Dense", words)(x)


def _sequences(
    generator: np.random.Generator, rows: int, words: int, steps: int, **_: Any
) -> tuple[np.ndarray, np.ndarray]:
    next_word = np.random.default_rng(1).permutation(words)
    x = generator.integers(0, words, (rows, 1))
    for _index in range(steps):
        noise = generator.integers(0, words, (rows, 1))
        x = np.concatenate([x, np.where(generator.random((rows, 1)) < 0.2, noise, next_word[x[:, -1:]])], 1)
    return x[:, :-1].astype("int32"), x[:, 1:].astype("int32")


def _recommender(
    kit: Kit, features: int, tables: int, rows_of_table: int, width: int, units: int, **_: Any
) -> tuple[Any, Any]:
    numbers = keras.Input((features,), name="numbers")
    categories = keras.Input((tables,), dtype="int32", name="categories")
    x = numbers
    for size in (units, width):
        x = kit.layer("Dense", size, activation="relu")(x)
    vectors = [kit.layer("Embedding", rows_of_table, width)(categories[:, index]) for index in range(tables)]
    x = kit.layer("Concatenate")([x, *vectors])
    for size in (units, units, units // 2):
        x = kit.layer("Dense", size, activation="relu")(x)
    return {"numbers": numbers, "categories": categories}, kit.layer("Dense", 2)(x)


def _clicks(
    generator: np.random.Generator, rows: int, features: int, tables: int, rows_of_table: int, **_: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    numbers = generator.standard_normal((rows, features), "float32")
    # Few categories are seen often and most seldom.
    categories = (rows_of_table * generator.random((rows, tables)) ** 3).astype("int32")
    scores = np.random.default_rng(1).standard_normal((tables, rows_of_table), "float32")
    score = sum(scores[table, categories[:, table]] for table in range(tables)) + numbers.sum(1)
    return {"numbers": numbers, "categories": categories}, (score > 0).astype("int32")


def _classes(x: np.ndarray) -> np.ndarray:
    """Returns labels from a random network with one hidden layer."""
    generator = np.random.default_rng(1)
    hidden = np.tanh(x @ generator.standard_normal((x.shape[-1], 32), "float32") / x.shape[-1] ** 0.5)
    return (hidden @ generator.standard_normal((32, CLASSES), "float32")).argmax(-1).astype("int32")


def _recommending(name: str, learning_rate: float, optimizer: type[keras.optimizers.Optimizer]) -> Workload:
    return Workload(
        name,
        _recommender,
        _clicks,
        2048,
        {"features": 16, "tables": 8, "rows_of_table": 100_000, "width": 32, "units": 1024},
        {"features": 4, "tables": 2, "rows_of_table": 16, "width": 8, "units": 16},
        learning_rate,
        optimizer,
    )


_SMALL_TEXT = {"words": 16, "steps": 8, "width": 16, "heads": 2, "layers": 1}
WORKLOADS = [
    Workload(
        "MLP",
        _perceptron,
        _vectors,
        256,
        {"features": 1024, "units": 2048},
        {"features": 8, "units": 8},
        1e-4,
    ),
    Workload(
        "ResNet",
        _resnet,
        _images,
        64,
        {"channels": 64, "blocks": 2, "size": 32},
        {"channels": 4, "blocks": 1, "size": 8},
    ),
    Workload(
        "transformer",
        _transformer,
        _texts,
        16,
        {"words": 8192, "steps": 128, "width": 512, "heads": 8, "layers": 4},
        _SMALL_TEXT,
        1e-4,
    ),
    _recommending("recommender", 0.02, keras.optimizers.Adagrad),
    _recommending("recommender (Adam)", 1e-3, keras.optimizers.Adam),
]
LANGUAGE_MODEL = Workload(
    "language model",
    _language_model,
    _sequences,
    32,
    {"words": 4096, "steps": 256, "width": 256, "heads": 8, "layers": 2},
    _SMALL_TEXT,
    1e-4,
)


def _application(name: str, batch: int) -> Application:
    return Application(name, _resnet, _images, batch, {"size": 224}, {"size": 32})


APPLICATIONS = [
    _application("ResNet50V2", 16),
    _application("MobileNetV3Large", 32),
    _application("EfficientNetB0", 16),
    _application("ConvNeXtTiny", 8),
]
