"""Runnable examples, one for each task: `python -m examples.<name>` from the root of the repository."""

import os

# Before TensorFlow is imported, so that only its errors go to the screen.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
