"""One worker of `tests/training/test_multiworker.py` whose hardware, and whose model, is unlike the other's.

TF_CONFIG says which worker it is. The last line of its output is JSON.
"""

import json
import os

import keras_mp  # isort: skip  (first, so that TensorFlow's banner stays out of the output)

import keras
import tensorflow as tf

from keras_mp import hardware
from keras_mp.errors import DistributionError


def main():
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    # As on machines of which the first has a TPU and the other one none.
    devices = [hardware.Device("tpu", "TPU v5")] if index == 0 else [hardware.Device("cpu", "old")]
    here = hardware.recommend(devices)
    hardware.in_use = lambda: here
    recommended = here.recommended_policy
    with strategy.scope():
        chosen = keras_mp.set_policy("auto").name
        keras.config.set_dtype_policy("mixed_float16" if index else "mixed_bfloat16")
        inputs = keras.Input((4,))
        model = keras_mp.Model(inputs, keras.layers.Dense(3)(inputs))
        try:
            model.compile("sgd", "mse", jit_compile=False)
            said = ""
        except DistributionError as error:
            said = str(error)
    print(json.dumps({"recommended": recommended, "chosen": chosen, "said": said}))


if __name__ == "__main__":
    main()
