"""The only place that uses private names and attributes of TensorFlow and Keras, or changes them.

Each private name comes with the reason why no public one will do. When one of them moves, a test in `tests/_compat`
names it.
"""

from keras_mp._compat import startup

startup.require_tensorflow()

from keras_mp._compat import patches  # noqa: E402  (a missing TensorFlow is explained first)

patches.install()
