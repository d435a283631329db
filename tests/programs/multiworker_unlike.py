"""One worker of `tests/training/test_multiworker.py` that is unlike the other one in several ways, one after another.

TF_CONFIG says which worker it is. The last line of its output is JSON: by case, what this worker was told.
"""

import json
import os

import keras_mp  # isort: skip  (first, so that TensorFlow's banner stays out of the output)

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware
from keras_mp.errors import DistributionError

CASES = ("names", "order", "later", "scaling", "reduction")


def told(function):
    """The message of the error that workers get which are not alike."""
    try:
        function()
    except DistributionError as error:
        return str(error)
    return ""


def fit(case, strategy, other):
    """Trains a model that the two workers make or compile differently."""
    if case == "names" and not other:
        keras.layers.Dense(1)  # so that the next one is "dense_1"
    policies = ["mixed_bfloat16", "float32"] if case == "order" and other else ["float32", "mixed_bfloat16"]
    if case == "scaling":
        policies = ["float32", "mixed_float16"]
    with strategy.scope():
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, dtype=policies[0])(inputs)
        model = keras_mp.Model(inputs, keras.layers.Dense(3, dtype=policies[1])(x))
        optimizer = "sgd"
        if case == "reduction":
            optimizer = keras_mp.LossScaleOptimizer("sgd", reduce_dtype="bfloat16" if other else "float32")
        model.compile(optimizer, "mse", jit_compile=False, auto_scale_loss=other)
        if case == "later" and other:
            model.layers[1].dtype_policy = keras.DTypePolicy("mixed_bfloat16")
        model.fit(np.ones((8, 4), "float32"), np.ones((8, 3), "float32"), batch_size=4, verbose=0)


def policy(strategy, other):
    """Takes a policy on hardware that differs: the first worker has a TPU, the other one none."""
    here = hardware.recommend([hardware.Device("cpu", "old") if other else hardware.Device("tpu", "TPU v5")])
    hardware.in_use = lambda: here
    with strategy.scope():
        chosen = keras_mp.set_policy("auto").name
        keras.config.set_dtype_policy("mixed_float16" if other else "mixed_bfloat16")
        inputs = keras.Input((4,))
        model = keras_mp.Model(inputs, keras.layers.Dense(3)(inputs))
        said = told(lambda: model.compile("sgd", "mse", jit_compile=False))
    return {"recommended": here.recommended_policy, "chosen": chosen, "said": said}


def main():
    other = json.loads(os.environ["TF_CONFIG"])["task"]["index"] > 0
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    found = {}
    for case in CASES:
        keras.utils.clear_session()  # layers are numbered from 0
        found[case] = told(lambda case=case: fit(case, strategy, other))
    keras.utils.clear_session()
    found["policy"] = policy(strategy, other)
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
