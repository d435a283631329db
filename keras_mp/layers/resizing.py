"""Resizing of images in float32, from and to 16-bit tensors, also where XLA compiles it."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.errors import ArgumentError
from keras_mp.ops import fusion, windows

__all__ = ["Resizing", "UpSampling2D", "repeat"]

_INTERPOLATIONS = ("bilinear", "nearest", "lanczos3", "lanczos5", "bicubic", "area")


@keras.saving.register_keras_serializable(package="keras_mp")
class UpSampling2D(keras.layers.UpSampling2D):
    """Enlarges images by whole factors, in float32 where it interpolates, also where XLA compiles it.

    A drop-in for `keras.layers.UpSampling2D`. With XLA, TensorFlow compiles neither "bicubic" nor the Lanczos
    interpolations in any dtype, and in 16 bits it has no gradient, or an error, for them. Repeated pixels stay in the
    dtype they have, and their gradient is added in float32.

    Args:
        size: int or 2 ints, factors of height and width. Defaults to (2, 2).
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        interpolation: "nearest", "bilinear", "bicubic", "lanczos3", "lanczos5" or "area". Defaults to "nearest".
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, height, width, channels), or (batch, channels, height, width); float16,
            bfloat16, float32, float64 or integers.

    Returns:
        Tensor of rank 4 in the layer's compute dtype.

    Raises:
        ValueError: if an argument is none of those above or the input is not of rank 4.
        keras_mp.errors.ArgumentError: if XLA compiles an interpolation of images whose size is not static.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.UpSampling2D((1, 2), interpolation="bilinear", dtype="mixed_bfloat16")
        >>> layer(np.array([[[[0.0], [4.0]]]], "float32")).numpy().ravel().tolist()
        [0.0, 1.0, 3.0, 4.0]

    The interpolations are linear, and so y = R x C^T with one matrix for the rows and one for the columns, whose
    entries are TensorFlow's own; Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981.
    """

    def __init__(
        self,
        size: int | Sequence[int] = (2, 2),
        data_format: str | None = None,
        interpolation: str = "nearest",
        **kwargs: Any,
    ) -> None:
        super().__init__(size=size, data_format=data_format, interpolation=interpolation, **kwargs)
        _check_interpolation(self.interpolation)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def call(self, inputs: Any) -> Any:
        """Enlarges `inputs`; see the class."""
        if self.interpolation == "nearest":
            counts = (1, 1, *self.size) if self.data_format == "channels_first" else (1, *self.size, 1)
            return repeat(tf.cast(inputs, self.compute_dtype), counts)
        x = tf.transpose(inputs, [0, 2, 3, 1]) if self.data_format == "channels_first" else inputs
        size = tuple(n * factor for n, factor in zip(keras.ops.shape(x)[1:3], self.size, strict=True))
        y = _resize(x, size, self.interpolation, False, self.compute_dtype)
        return tf.transpose(y, [0, 3, 1, 2]) if self.data_format == "channels_first" else y


@keras.saving.register_keras_serializable(package="keras_mp")
class Resizing(keras.layers.Resizing):
    """Resizes images in float32 and answers in the compute dtype, also where XLA compiles it and in `dataset.map`.

    A drop-in for `keras.layers.Resizing`. With XLA, TensorFlow compiles neither `antialias` nor "bicubic" nor the
    Lanczos interpolations; in 16 bits they fail or have no gradient. And in `dataset.map` under a mixed policy, the
    stock layer casts to 16 bits all that it gets, coordinates of boxes and numbers of classes included.
    Integer images give numbers of the compute dtype that are not rounded, as in a graph of the stock layer; in eager
    code the stock layer rounds them.

    Args:
        height: int, of the answer.
        width: int, of the answer.
        interpolation: "bilinear", "nearest", "bicubic", "lanczos3", "lanczos5" or "area". Defaults to "bilinear".
        crop_to_aspect_ratio: bool, whether to cut the image to the shape of the answer first. Defaults to False.
        pad_to_aspect_ratio: bool, whether to pad the image to the shape of the answer first. Defaults to False.
        fill_mode: "constant", the only one that Keras has.
        fill_value: float, of the padding. Defaults to 0.
        antialias: bool, whether to take in all pixels where it makes images smaller. Defaults to False.
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        data: tensor of shape (..., height, width, channels), or (..., channels, height, width), of rank 3 or 4;
            float16, bfloat16, float32, float64 or integers. Or a dict with such "images" and perhaps "labels",
            "bounding_boxes" and "segmentation_masks", as in Keras.
        training: bool, makes no difference. Defaults to True.

    Returns:
        Tensor of the same rank in the layer's compute dtype, or a dict of what the dict held. Labels and boxes stay in
        the dtype they have, masks too and are resized by "nearest".

    Raises:
        ValueError: if an argument is none of those above or the images are not of rank 3 or 4.
        keras_mp.errors.ArgumentError: if `height` or `width` is not a positive int, or XLA compiles an interpolation of
            images whose size is not static.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Resizing(1, 2, dtype="mixed_float16")
        >>> layer(np.array([[[1], [3], [5], [7]]], "uint8")).numpy().ravel().tolist()
        [2.0, 6.0]

    The interpolations are linear; see `UpSampling2D`.
    """

    def __init__(
        self,
        height: int,
        width: int,
        interpolation: str = "bilinear",
        crop_to_aspect_ratio: bool = False,
        pad_to_aspect_ratio: bool = False,
        fill_mode: str = "constant",
        fill_value: float = 0.0,
        antialias: bool = False,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"`{name}` must be a positive int. Received: {name}={value!r}. Type {name}=224.")
        _check_interpolation(interpolation)
        if fill_mode != "constant":
            raise ValueError(
                "Invalid value for argument `fill_mode`. Only `'constant'` is supported. "
                f"Received: fill_mode={fill_mode}"
            )
        if pad_to_aspect_ratio and crop_to_aspect_ratio:
            raise ValueError("Only one of `pad_to_aspect_ratio` & `crop_to_aspect_ratio` can be `True`.")
        super().__init__(
            int(height),
            int(width),
            interpolation,
            crop_to_aspect_ratio,
            pad_to_aspect_ratio,
            fill_mode,
            fill_value,
            antialias,
            data_format,
            **kwargs,
        )
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def __call__(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer without the cast to the compute dtype that Keras makes first in `dataset.map`."""
        return keras.layers.Layer.__call__(self, data, *args, **kwargs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the answer, or Keras's words for one that is not of images."""
        _check_rank(input_shape)
        return super().compute_output_shape(input_shape)

    def call(self, data: Any, training: bool = True) -> Any:
        """Resizes images; see the class."""
        images = data["images"] if isinstance(data, dict) else data
        _check_rank(images.shape)
        return super().call(dict(data) if isinstance(data, dict) else data, training=training)

    def transform_images(self, images: Any, transformation: Any = None, training: bool = True) -> Any:
        """Resizes images, of rank 3 or 4, to the compute dtype."""
        return self._resized(images, self.interpolation, self.antialias, self.compute_dtype)

    def transform_segmentation_masks(
        self, segmentation_masks: Any, transformation: Any = None, training: bool = True
    ) -> Any:
        """Resizes masks, of rank 3 or 4, by "nearest" and in their own dtype."""
        return self._resized(segmentation_masks, "nearest", False, segmentation_masks.dtype)

    def _resized(self, images: Any, interpolation: str, antialias: bool, dtype: Any) -> Any:
        x, size = tf.convert_to_tensor(images), (self.height, self.width)
        single, first = len(x.shape) == 3, self.data_format == "channels_first"
        x = x[None] if single else x
        x = tf.transpose(x, [0, 2, 3, 1]) if first else x
        if self.crop_to_aspect_ratio:
            x = _cropped(x, size)
        elif self.pad_to_aspect_ratio:
            x = x if x.dtype.is_floating or interpolation == "nearest" else tf.cast(x, "float32")
            x = _padded(x, size, self.fill_value)
        y = _resize(x, size, interpolation, antialias, dtype)
        y = tf.transpose(y, [0, 3, 1, 2]) if first else y
        return y[0] if single else y


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            "Invalid value for argument `interpolation`. Expected of one "
            f"{_INTERPOLATIONS}. Received: interpolation={interpolation}"
        )


def _check_rank(shape: Any) -> None:
    if len(shape) not in (3, 4):
        raise ValueError(
            "Expected image tensor to have rank 3 (single image) or 4 (batch of images). "
            f"Received: data.shape={tuple(shape)}"
        )


def _in_proportion(length: Any, numerator: int, denominator: int) -> Any:
    """`length * numerator / denominator` rounded as Keras rounds it: divided in float32, then cut to an integer."""
    if isinstance(length, int):
        return int(np.float32(length * numerator) / np.float32(denominator))
    return tf.cast(tf.cast(length * numerator, "float32") / denominator, "int32")


def _either(static: Any, dynamic: Any, *values: Any) -> Any:
    return (static if all(isinstance(value, int) for value in values) else dynamic)(*values)


def _cropped(x: Any, size: tuple[int, int]) -> Any:
    """The largest window of the shape of `size` from the middle."""
    (height, width), (to_height, to_width) = keras.ops.shape(x)[1:3], size
    wanted = (_in_proportion(width, to_height, to_width), _in_proportion(height, to_width, to_height))
    starts, ends = [], []
    for length, window in zip((height, width), wanted, strict=True):
        kept = _either(max, tf.maximum, _either(min, tf.minimum, length, window), 1)
        starts.append((length - kept) // 2)
        ends.append((length - kept) // 2 + kept)
    return x[:, starts[0] : ends[0], starts[1] : ends[1]]


def _padded(x: Any, size: tuple[int, int], value: float) -> Any:
    """The image in the middle of the smallest of the shape of `size` that holds it."""
    (height, width), (to_height, to_width) = keras.ops.shape(x)[1:3], size
    wanted = (_in_proportion(width, to_height, to_width), _in_proportion(height, to_width, to_height))
    before = [
        (_either(max, tf.maximum, length, window) - length) // 2
        for length, window in zip((height, width), wanted, strict=True)
    ]
    return tf.pad(x, [[0, 0], [before[0]] * 2, [before[1]] * 2, [0, 0]], constant_values=tf.cast(value, x.dtype))


def _resize(x: Any, size: tuple[Any, ...], method: str, antialias: bool, output_dtype: Any) -> Any:
    """Resizes images of rank 4, channels last."""
    nearest = method == "nearest"
    if nearest and not x.dtype.is_floating:
        return tf.cast(tf.image.resize(x, size, method), output_dtype)  # exact for class numbers of any size
    wide = windows.wide(x, keras.backend.standardize_dtype(output_dtype))
    if not x.dtype.is_floating:
        x = tf.cast(x, wide)
    dtype, shape = x.dtype, keras.ops.shape(x)
    lengths = shape[1:3]
    # The kernels are quicker than matrix products, but answer in float32 at most, and XLA compiles few of them.
    # And few of their gradients have gradients, as forward derivatives ask for.
    differentiated = execution.forward_mode(x)
    products = execution.in_xla_context() or (wide == "float64" and not nearest) or differentiated
    if execution.in_xla_context() and not all(isinstance(length, int) for length in (*lengths, *size)):
        raise ArgumentError(
            f"XLA cannot interpolate images whose height or width is not static. Received: shape {x.shape}. Give the "
            "input a static size, type jit_compile=False, or resize in dataset.map."
        )

    if dtype.name == wide and not products and method != "area":
        # TensorFlow's own gradient, which is given the image. Ours, for images in 16 bits, makes up one of zeros.
        return tf.cast(tf.image.resize(x, size, method, antialias=antialias), output_dtype)

    @fusion.custom_gradient
    def run(x: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            g = tf.cast(upstream, wide)
            if products or method == "area":  # TensorFlow has no gradient of its area kernel
                return tf.cast(_by_products(g, lengths, size, method, antialias, transposed=True), dtype)
            return tf.cast(_kernel_gradient(g, shape, size, method, antialias), dtype)

        if products and (differentiated or not nearest):
            y = _by_products(tf.cast(x, wide), lengths, size, method, antialias)
        else:
            y = tf.image.resize(x if nearest else tf.cast(x, wide), size, method, antialias=antialias)
        return tf.cast(y, output_dtype), gradient

    return run(x)


def _by_products(
    x: Any, lengths: Sequence[Any], size: Sequence[Any], method: str, antialias: bool, transposed: bool = False
) -> Any:
    """Resizes, or pulls a gradient back through it, by a matrix for the rows and one for the columns."""
    rows, columns = (
        tf.cast(_matrix(length, to_length, method, antialias), x.dtype)
        for length, to_length in zip(lengths, size, strict=True)
    )
    shape, channels = tf.shape(x), x.shape[3]
    channels = shape[3] if channels is None else channels
    height, width = lengths if transposed else size
    width_before = size[1] if transposed else lengths[1]
    x = tf.matmul(rows, tf.reshape(x, [shape[0], -1, width_before * channels]), transpose_a=transposed)
    x = tf.matmul(columns, tf.reshape(x, [shape[0] * height, width_before, channels]), transpose_a=transposed)
    return tf.reshape(x, [shape[0], height, width, channels])


def _matrix(length: Any, to_length: Any, method: str, antialias: bool) -> Any:
    """What TensorFlow's kernel makes of each unit vector: its weights, of shape (to_length, length)."""
    if isinstance(length, int) and isinstance(to_length, int):
        return _constant_matrix(length, to_length, method, antialias)
    return tf.image.resize(tf.eye(length)[None, :, None], (to_length, 1), method, antialias=antialias)[0, :, 0]


@functools.lru_cache(maxsize=64)
def _constant_matrix(length: int, to_length: int, method: str, antialias: bool) -> Any:
    with tf.init_scope(), tf.device("CPU:0"):
        unit = tf.eye(length)[None, :, None]
        return tf.image.resize(unit, (to_length, 1), method, antialias=antialias)[0, :, 0].numpy()


def _kernel_gradient(g: Any, shape: Any, size: Sequence[Any], method: str, antialias: bool) -> Any:
    """TensorFlow's own gradient. All kernels but the first ask for the image, of which they read only the shape."""
    if method == "nearest":
        return tf.raw_ops.ResizeNearestNeighborGrad(grads=g, size=tf.stack(shape[1:3]), half_pixel_centers=True)
    image = tf.zeros(shape, g.dtype)
    if antialias or method.startswith("lanczos"):
        kernel = {"bilinear": "triangle", "bicubic": "keyscubic"}.get(method, method)
        scale = tf.cast(tf.stack(size), "float32") / tf.cast(tf.shape(image)[1:3], "float32")
        return tf.raw_ops.ScaleAndTranslateGrad(
            grads=g,
            original_image=image,
            scale=scale,
            translation=tf.zeros([2]),
            kernel_type=kernel,
            antialias=antialias,
        )
    operation = {"bilinear": tf.raw_ops.ResizeBilinearGrad, "bicubic": tf.raw_ops.ResizeBicubicGrad}[method]
    return operation(grads=g, original_image=image, half_pixel_centers=True)


def repeat(x: Any, counts: tuple[int, ...]) -> Any:
    """Repeats each element along each axis, with a gradient summed in float32.

    Args:
        x: of any shape.
        counts: copies along each axis.
    """
    dtype, fused = x.dtype.name, fusion.pays(x)

    @fusion.custom_gradient
    def run(x: Any) -> Any:
        return windows.repeated(x, counts), lambda g: windows.window_sums(g, counts, dtype, fused=fused)

    return run(x)
