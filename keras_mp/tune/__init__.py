"""The dtype policy and the compiler for one model on one machine, chosen by timing its own training step."""

from keras_mp.tune.report import Candidate, Tuning, recommend
from keras_mp.tune.tuning import tune

__all__ = ["Candidate", "Tuning", "recommend", "tune"]
