"""Runnable examples, one a task: `python -m examples.<name>` from the root of the repository."""

import os

# Before TensorFlow is imported: only its errors go to the screen. An example's own output is what one came to see.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
