"""Serving an export: a client for TensorFlow Serving, a double to try it on, and a load run."""
