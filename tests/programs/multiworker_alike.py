"""One worker of `tests/training/test_multiworker.py` whose model is made and compiled unlike the other's.

TF_CONFIG says which worker it is, the first argument what is unlike. The last line of its output is JSON.
"""

import json
import os
import sys

import keras_mp  # isort: skip  (first, so that TensorFlow's banner stays out of the output)

import keras
import numpy as np
import tensorflow as tf

from keras_mp.errors import DistributionError


def main(case):
    other = json.loads(os.environ["TF_CONFIG"])["task"]["index"] > 0
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if case == "names" and not other:
        keras.layers.Dense(1)  # so that the next one is "dense_1"
    policies = ["mixed_bfloat16", "float32"] if case == "order" and other else ["float32", "mixed_bfloat16"]
    if case == "scaling":
        policies = ["float32", "mixed_float16"]
    with strategy.scope():
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, dtype=policies[0])(inputs)
        model = keras_mp.Model(inputs, keras.layers.Dense(3, dtype=policies[1])(x))
        try:
            optimizer = "sgd"
            if case == "reduction":
                optimizer = keras_mp.LossScaleOptimizer("sgd", reduce_dtype="bfloat16" if other else "float32")
            model.compile(optimizer, "mse", jit_compile=False, auto_scale_loss=other)
            if case == "later" and other:
                model.layers[1].dtype_policy = keras.DTypePolicy("mixed_bfloat16")
            model.fit(np.ones((8, 4), "float32"), np.ones((8, 3), "float32"), batch_size=4, verbose=0)
            said = ""
        except DistributionError as error:
            said = str(error)
    print("\n" + json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
