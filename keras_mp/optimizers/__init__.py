"""The loss-scale optimizer and the update of weights."""
