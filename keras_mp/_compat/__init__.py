"""The installed TensorFlow and Keras: the only place that uses their private names and attributes, or changes them.

Each private name stands here with the reason why no public one will do. `tests/_compat` fails with the name in its
message when one of them moves.
"""

from keras_mp._compat import startup

startup.require_tensorflow()

from keras_mp._compat import patches  # noqa: E402  (a missing TensorFlow is explained first)

patches.install()
