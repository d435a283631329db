"""Models under another dtype policy, and the files that hold them."""
