"""`python -m keras_mp`: the `keras-mp` command, where the folder of scripts is not on the path."""

from keras_mp.cli.app import app

__all__: list[str] = []

if __name__ == "__main__":
    app(prog_name="keras-mp")
