"""One worker of optimizers/test_multiworker.py: trains under `MultiWorkerMirroredStrategy` and prints its state.

TF_CONFIG says which worker it is. The last line of its output is JSON.
"""

import json

import keras_mp  # isort: skip  (first, so that TensorFlow's banner stays out of the output)

import keras
import numpy as np
import tensorflow as tf

BATCH = 8

CASES = {
    "adam, global_clipnorm": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.1),
    "adamw, accumulation, ema overwriting": lambda: keras.optimizers.AdamW(
        0.1,
        weight_decay=0.3,
        clipnorm=0.1,
        gradient_accumulation_steps=2,
        use_ema=True,
        ema_overwrite_frequency=2,
    ),
    "nadam, schedule, compiled": lambda: keras.optimizers.Nadam(
        keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), clipvalue=0.05
    ),
}


def batches(bad_rows):
    """Global batches; the last row is the last worker's, the first row is the first one's."""
    data = np.random.default_rng(0).normal(size=(7, BATCH, 4)).astype("float32")
    for step, row in bad_rows:
        data[step, row] = np.nan
    return data


def train(strategy, optimizer, data):
    """Trains on this worker's shard of each batch; returns weights and slots, and the counters after each step."""
    random = np.random.default_rng(1)
    with strategy.scope():
        weights = [
            keras.Variable(random.normal(size=(4, 3)).astype("float32"), name="kernel"),
            keras.Variable(random.normal(size=3).astype("float32"), name="bias"),
        ]
        optimizer.build(weights)

    @tf.function
    def step(x):
        def on_replica(x):
            with tf.GradientTape() as tape:
                y = tf.tanh(x @ weights[0].value + weights[1].value)
                loss = optimizer.scale_loss(tf.reduce_sum((y - x[:, :3]) ** 2) / BATCH)
            optimizer.apply_gradients(zip(tape.gradient(loss, [w.value for w in weights]), weights, strict=True))

        strategy.run(on_replica, (x,))

    counters = []
    for x in data:
        step(tf.constant(np.split(x, strategy.num_replicas_in_sync)[_worker(strategy)]))
        iterations = tf.convert_to_tensor(optimizer.iterations).numpy()
        counters.append([float(optimizer.loss_scale), int(optimizer.skipped_steps), int(iterations)])
    state = [*weights, *optimizer.inner_optimizer.variables]
    return {"state": [v.numpy().tolist() for v in state], "counters": counters}


def _worker(strategy):
    return strategy.cluster_resolver.task_id if strategy.num_replicas_in_sync > 1 else 0


def results(strategy):
    """Returns the results that are the same on both workers and on one device.

    Keras's own wrapper is not here. A bad value on one worker alone makes that one skip, and the others wait for its
    gradients for ever.
    """
    found = {}
    for name, make in CASES.items():
        with strategy.scope():
            optimizer = keras_mp.LossScaleOptimizer(
                make(), initial_scale=1024.0, dynamic_growth_steps=3, jit_compile="compiled" in name
            )
        found[name] = train(strategy, optimizer, batches(bad_rows=[(1, BATCH - 1), (4, 0)]))
    return found


if __name__ == "__main__":
    print("\n" + json.dumps(results(tf.distribute.MultiWorkerMirroredStrategy())), flush=True)
