"""Datasets in the layout of tensorflow-datasets: one folder a dataset, with its builder, description and citation."""
