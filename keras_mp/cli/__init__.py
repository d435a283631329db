"""The `keras-mp` command."""
