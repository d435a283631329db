"""Datasets in the layout of tensorflow-datasets. Each folder has a builder, a description and a citation."""
