"""`keras-mp tune`: times a model to find its fastest dtype policy and compiler."""

import dataclasses
import json
import math
import traceback
from typing import Annotated

import keras
import typer
from rich.console import Console

from keras_mp.cli.failures import printed_errors
from keras_mp.cli.options import AsJson, function_named
from keras_mp.tuning.search import tune as tune_model

__all__ = ["tune"]


def tune(
    source: Annotated[
        str,
        typer.Argument(metavar="MODULE:FUNCTION", help="A function that returns (model, batch) or (model, dataset)."),
    ],
    policy: Annotated[
        list[str] | None, typer.Option(help="A dtype policy to try. Default: float32 and both mixed ones. Repeatable.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Time limit in seconds.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Time a model's training step under each dtype policy and compiler. Recommend one and say why.

    The model must be compiled. The batch is (x, y) or (x, y, sample_weight) as fit takes it, or a
    tf.data.Dataset of batches, which is then timed as well. The model is not changed.
    """
    function = function_named(source)
    try:
        made = function()
    except Exception as error:
        # Print the traceback of the user's function without this command's frames.
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        raise typer.Exit(1) from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], keras.Model):
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise typer.BadParameter(
            f"{source} returned {what}. Expected (model, batch): a compiled model and (x, y) or a "
            "tf.data.Dataset: return model, (x[:32], y[:32])."
        )
    with printed_errors():
        tuning = tune_model(*made, policies=policy or None, budget=budget)
    if as_json:
        facts = dataclasses.asdict(tuning)
        for each in facts["candidates"]:  # JSON has no infinity, the error of a non-finite output
            each["error"] = each["error"] if each["error"] is None or math.isfinite(each["error"]) else None
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(tuning.table())
    for sentence in (tuning.reason, *tuning.findings):
        console.print(sentence, markup=False)
