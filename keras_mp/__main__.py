"""`python -m keras_mp` runs the `keras-mp` command without its script on the path."""

from keras_mp.cli.app import app

__all__: list[str] = []

if __name__ == "__main__":
    app(prog_name="keras-mp")
