"""Functions of tensors that compute in float32 what 16 bits cannot hold. No Keras layer stands here."""
