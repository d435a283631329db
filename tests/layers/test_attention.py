"""Attention: the contract, masks, blocks against one block, and memory."""

import keras
import numpy as np
import pytest

from keras_mp import layers
from tests.layers.contract import POLICIES, Case, check_contract

SHAPES = [(4, 6, 8), (4, 5, 8)]
LISTED = [(4, 6, 8), (4, 5, 8), (4, 5, 8)]
PAIRS = np.random.default_rng(1).random((4, 6, 5)) > 0.4


# 16 bits round the projections, the scores, the probabilities and the output, and the gradients on their way back.
ROUNDED = {"float16": 1e-2, "bfloat16": 6e-2}


def multi_head(family, **arguments):
    return lambda: family.MultiHeadAttention(2, 3, **arguments)


def grouped(family, **arguments):
    make = layers.GroupedQueryAttention if family is layers else keras.layers.GroupQueryAttention
    return lambda: make(3, 4, 2, **arguments)


def pair(make, shapes, call=None, ours=None, masked=True, **arguments):
    """A case of our layer, with further arguments of its own, and the stock layer."""
    return Case(
        make(layers, **arguments, **(ours or {})),
        make(keras.layers, **arguments),
        shapes,
        call or {},
        # So small that the softmax is not yet a maximum.
        masked=masked,
        scale=0.3,
        weights=(-1.0, 1.0),
        vanishing=("key/bias",),  # what it adds to a query's scores is the same for all keys
        tolerance=ROUNDED,
    )


def listed(name, shapes, call=None, **arguments):
    """A case of one of the two layers that are called on a list."""
    return Case(
        lambda: getattr(layers, name)(**arguments),
        lambda: getattr(keras.layers, name)(**arguments),
        shapes,
        call or {},
        as_list=True,
        scale=0.3,
        tolerance=ROUNDED,
    )


# The stock layer passes masks of steps to a softmax they do not fit, over several axes, and to projections that warn of
# them, with grouped queries: `masked=False`.
CASES = {
    "MultiHeadAttention": pair(multi_head, SHAPES),
    "MultiHeadAttention, causal": pair(multi_head, [(4, 6, 8), (4, 6, 8)], {"use_causal_mask": True}),
    "MultiHeadAttention, blocks": pair(multi_head, SHAPES, {"use_causal_mask": True}, {"flash_attention": True}),
    "MultiHeadAttention, pairs": pair(multi_head, SHAPES, {"attention_mask": PAIRS}, value_dim=5, output_shape=7),
    "MultiHeadAttention, key": pair(multi_head, [(4, 6, 8), (4, 5, 7), (4, 5, 9)], use_bias=False),
    "MultiHeadAttention, images": pair(multi_head, [(4, 2, 3, 8), (4, 2, 3, 8)], masked=False),
    "MultiHeadAttention, one axis of images": pair(
        multi_head, [(4, 2, 3, 8), (4, 2, 3, 8)], masked=False, attention_axes=(2,)
    ),
    "GroupedQueryAttention": pair(grouped, SHAPES, masked=False),
    "GroupedQueryAttention, blocks": pair(
        grouped, SHAPES, {"attention_mask": PAIRS}, {"flash_attention": True}, masked=False
    ),
    "Attention": listed("Attention", LISTED),
    "Attention, causal": listed("Attention", LISTED[:2], {"use_causal_mask": True}, use_scale=True),
    "Attention, concat": listed("Attention", LISTED, use_scale=True, score_mode="concat"),
    "AdditiveAttention": listed("AdditiveAttention", LISTED),
    "AdditiveAttention, causal": listed("AdditiveAttention", LISTED[:2], {"use_causal_mask": True}, use_scale=False),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, policy, tmp_path, mirrored):
    check_contract(CASES[name], policy, tmp_path, mirrored(2))
