"""The promises of every layer under every dtype policy, as parameters for one test a file.

@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))
"""

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import tensorflow as tf

from tests.contract.case import POLICIES, Case, assert_close, gradients, gradients_of, subject_of
from tests.contract.compiled import check_compiled
from tests.contract.numbers import check_numbers

__all__ = ["POLICIES", "Case", "assert_close", "contract", "gradients", "gradients_of"]


def contract(
    cases: dict[str, Case],
    stock_can: Callable[[str, str], bool] = lambda name, policy: True,
    firsts: Collection[str] = (),
) -> pytest.MarkDecorator:
    """Parametrizes a test by `check`, a function of a folder and a strategy of two replicas.

    The quick suite checks the numbers of each class's first case under all policies, and of its other cases in
    bfloat16. To compile takes ten times as long. So only the first case is compiled, and under one 16-bit policy, which
    alternates from class to class. The slow suite checks the rest.

    Args:
        cases: by name.
        stock_can: whether the stock layer of a case has kernels for a policy.
        firsts: names of cases to take instead of the first of each class.
    """
    firsts = firsts or list({type(case.ours()): name for name, case in reversed(cases.items())}.values())[::-1]
    half = ["mixed_bfloat16", "mixed_float16"]
    parameters = []
    for name, case in cases.items():
        number = firsts.index(name) if name in firsts else None
        policies = [policy for policy in POLICIES if stock_can(name, policy)]
        with_numbers = ["mixed_bfloat16"] if number is None else policies
        compiled = [] if number is None else [[each for each in half if each in policies][number % 2 - 2 :][0]]
        phases = [("numbers", with_numbers)] if case.random else [("numbers", with_numbers), ("compiled", compiled)]
        for phase, quick in phases:
            parameters += [
                pytest.param(
                    _check_of(case, policy, phase),
                    id=f"{name}-{policy}-{phase}",
                    marks=() if policy in quick else pytest.mark.slow,
                )
                for policy in policies
            ]
    return pytest.mark.parametrize("check", parameters)


def _check_of(case: Case, policy: str, phase: str) -> Callable[[Path, tf.distribute.Strategy], None]:
    def check(folder: Path, strategy: tf.distribute.Strategy) -> None:
        subject = subject_of(case, policy)
        if phase == "numbers":
            check_numbers(subject, folder)
        else:
            check_compiled(subject, strategy)

    return check
