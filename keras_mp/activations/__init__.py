"""Activations that compute in float32 what 16 bits would round at every step, and answer in the dtype they get.

Each keeps only its 16-bit input, or output, for the backward pass and is compiled by XLA to one pass over memory where
that pays.
"""

from keras_mp.activations.elementwise import gelu, hard_silu, mish, silu
from keras_mp.activations.softmax import log_softmax, softmax, softmax_in_one_pass

__all__ = ["gelu", "hard_silu", "log_softmax", "mish", "silu", "softmax", "softmax_in_one_pass"]
