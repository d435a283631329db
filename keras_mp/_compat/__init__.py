"""The TensorFlow and Keras that are installed: the only place that uses their private names, or changes them.

Each private name stands here with the reason why a public one is not enough. `tests/_compat` fails with the name in its
message when one of them moves.
"""

from keras_mp._compat.startup import require_tensorflow

require_tensorflow()

from keras_mp._compat import patches  # noqa: E402  (only after its absence is explained)

patches.install()
