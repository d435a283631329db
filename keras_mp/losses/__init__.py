"""Cross-entropies that compute in float32 and take 16-bit outputs as they are."""

from keras_mp.losses.crossentropies import BinaryCrossentropy, CategoricalCrossentropy, SparseCategoricalCrossentropy

__all__ = ["BinaryCrossentropy", "CategoricalCrossentropy", "SparseCategoricalCrossentropy"]
