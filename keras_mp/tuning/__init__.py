"""Times a model's training step under policies and compilers, and recommends one."""
