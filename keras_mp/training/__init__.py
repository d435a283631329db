"""The training step, alone and on replicas."""
