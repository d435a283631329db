"""File formats of runtimes that read no SavedModel."""
