"""Strategies, replicas and the workers of a cluster."""
