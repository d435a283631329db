"""Cross-entropies that take a model's 16-bit outputs as they are and compute in float32."""

from keras_mp.losses.crossentropies import BinaryCrossentropy, CategoricalCrossentropy, SparseCategoricalCrossentropy

__all__ = ["BinaryCrossentropy", "CategoricalCrossentropy", "SparseCategoricalCrossentropy"]
