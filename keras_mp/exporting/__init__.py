"""Models for serving: SavedModels, TensorFlow Lite files and ONNX."""
