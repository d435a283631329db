"""Functions of tensors that compute in float32 where half precision is not enough. Nothing here is a Keras layer."""
