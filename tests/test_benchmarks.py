"""The harness's arithmetic and its tables; no time is asserted here."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import harness, optimizer
from benchmarks.harness import Case, Comparison, Group

MACHINE = {
    "devices": [{"kind": "cpu", "name": "Example", "features": ["amx_bf16"]}],
    "cores": 2,
    "system": "Linux x86_64",
    "versions": {"python": "3.12.0", "tensorflow": "2.21.0"},
    "date": "2026-01-31",
    "load": 0.1,
}
RESULTS = {
    "theme": "example",
    "machine": MACHINE,
    "groups": [
        {
            "name": "three cases",
            "notes": {"fast": "with a note"},
            "times_ms": {"slow": [10.0, 20.0, 30.0], "slower": [11.0, 21.0, 31.0], "fast": [2.0, 10.0, 15.0]},
            "comparisons": [
                {"case": "fast", "against": ["slower", "slow"], "at_most": 0.5},
                {"case": "slower", "against": ["slow"], "at_most": 1.0},
                {"case": "slow", "against": ["fast"], "at_most": None},
            ],
        }
    ],
}


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=50))
def test_the_spread_is_numpys(values):
    each = harness.spread(values)
    np.testing.assert_allclose([each.lower, each.median, each.upper], np.quantile(values, [0.25, 0.5, 0.75]), rtol=1e-9)


def test_ratios_are_taken_round_by_round():
    assert harness.paired_ratios([1.0, 9.0], [2.0, 3.0]) == [0.5, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        harness.paired_ratios([1.0, 2.0], [1.0])


def test_every_round_has_every_case_and_the_order_changes():
    names = ["a", "b", "c", "d"]
    rounds = list(harness.orders(names, 20))
    assert len(rounds) == 20
    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 5
    assert {order[0] for order in rounds} == set(names)
    assert rounds == list(harness.orders(names, 20))


def test_cases_take_turns_after_their_warm_up():
    ran = []
    cases = [Case(name, lambda name=name: ran.append(name)) for name in "ab"]
    times = harness.measure(cases, rounds=5, warm_up=2)
    assert ran[:4] == ["a", "a", "b", "b"]
    assert all(sorted(ran[start : start + 2]) == ["a", "b"] for start in range(4, len(ran), 2))
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5}


def test_cases_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names"):
        harness.measure([Case("a", list), Case("a", list)], rounds=1)


def test_the_table_has_times_and_paired_ratios_against_the_faster():
    lines = harness.table(RESULTS).splitlines()
    assert "| fast (with a note) | 10.0 | 6.00 to 12.5 |" in lines
    assert "| fast | slow | 0.50 | 0.35 to 0.50 | 0.5, met |" in lines
    assert "| slower | slow | 1.05 | 1.04 to 1.08 | 1, missed |" in lines
    assert "| slow | fast | 2.00 | 2.00 to 3.50 |  |" in lines
    assert any("Example (CPU, amx_bf16), 2 cores" in line and "2026-01-31" in line for line in lines)
    assert "busy" not in harness.table(RESULTS)


def test_the_table_says_when_the_machine_was_busy():
    assert "busy machine (load average 2.50)" in harness.table({**RESULTS, "machine": {**MACHINE, "load": 2.5}})


def test_the_command_prints_the_table_of_a_file(tmp_path):
    path = tmp_path / "example.json"
    path.write_text(json.dumps(RESULTS))
    result = CliRunner().invoke(harness.app, ["table", str(path)])
    assert result.exit_code == 0
    assert result.output.strip() == harness.table(RESULTS).strip()


def test_a_busy_machine_is_refused_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "wait_until_idle", lambda **kwargs: 3.0)
    monkeypatch.setattr(harness, "describe_machine", lambda: {k: v for k, v in MACHINE.items() if k != "load"})
    groups = [Group("one", lambda: [Case("a", list), Case("b", list)], [Comparison("a", ("b",), 9.0)], rounds=2)]
    app = harness.command("example", groups)
    refused = CliRunner().invoke(app, ["--output", str(tmp_path)])
    assert refused.exit_code == 1
    assert not list(tmp_path.iterdir())
    taken = CliRunner().invoke(app, ["--output", str(tmp_path), "--loaded"])
    assert taken.exit_code == 0
    results = json.loads((tmp_path / "example.json").read_text())
    assert results["machine"]["load"] == 3.0
    assert {name: len(times) for name, times in results["groups"][0]["times_ms"].items()} == {"a": 2, "b": 2}
    assert (tmp_path / "example.md").read_text() == harness.table(results)


def test_the_machine_is_described():
    machine = harness.describe_machine()
    assert machine["devices"][0]["kind"] == "cpu"
    assert {"python", "tensorflow", "keras", "numpy", "keras-mp"} == set(machine["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", machine["date"])


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_table_in_the_repository_is_that_of_its_results(path):
    assert path.with_suffix(".md").read_text() == harness.table(json.loads(path.read_text()))


@pytest.mark.parametrize("group", optimizer.GROUPS, ids=lambda group: group.name)
def test_what_is_compared_is_timed(group, monkeypatch):
    monkeypatch.setattr(optimizer, "make_step", lambda *args, **kwargs: list)
    names = {case.name for case in group.cases()}
    for comparison in group.comparisons:
        assert {comparison.case, *comparison.against} <= names


def test_a_skipped_step_is_one():
    bad = optimizer._gradients(((2,), (3,)), 1.0, True)
    assert [np.isinf(gradient.numpy()).sum() for gradient in bad] == [0, 1]
