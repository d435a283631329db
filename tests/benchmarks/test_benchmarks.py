"""The harness's arithmetic and its tables. No test asserts a time."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import aot, attention, ceiling, distribution, harness, layers, optimizer, summary, training, workloads
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


def hundred_mib() -> list[Case]:
    """A case that the test below runs in a separate process."""
    fill = tf.function(lambda: tf.reduce_sum(tf.random.uniform([100 * 2**18])))
    return [Case("100 MiB", lambda: fill().numpy()), Case("nothing", lambda: None)]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lets the peak be reset")
def test_memory_is_that_of_what_a_run_allocates_and_gives_back():
    memory = harness.memory_in_child("tests.benchmarks.test_benchmarks:hundred_mib")
    # The reduction may take some scratch memory, and the system some pages.
    assert all(99 < value < 105 for value in memory["100 MiB"])
    assert all(0 <= value < 1 for value in memory["nothing"])


def test_a_child_that_fails_is_an_error_that_says_why(capfd):
    with pytest.raises(subprocess.CalledProcessError):
        harness.run_module("benchmarks.no_such_module")
    assert "no_such_module" in capfd.readouterr().err


WITH_MEMORY = {
    **RESULTS,
    "groups": [
        {
            "name": "with memory",
            "notes": {},
            "times_ms": {"a": [1.0], "b": [2.0], "c": [4.0]},
            "memory_mib": {"a": [30.0, 10.0, 20.0], "b": [40.0]},
            "not_run": {"d": "not run: too large"},
            "comparisons": [
                {"case": "a", "against": ["b"], "at_most": 1.0, "memory_at_most": 0.4},
                {"case": "a", "against": ["c"], "at_most": None, "memory_at_most": None},
            ],
        }
    ],
    "grids": [{"name": "a grid", "unit": "MiB", "corner": "row", "columns": ["x", "y"], "rows": {"one": [1.0, None]}}],
}


def test_the_table_has_memory_and_what_was_not_run():
    lines = harness.table(WITH_MEMORY).splitlines()
    assert "| a | 1.00 | 1.00 to 1.00 | 20.0 |" in lines
    assert "| c | 4.00 | 4.00 to 4.00 |  |" in lines
    assert "| d (not run: too large) | | | |" in lines
    assert "| a | b | 0.50 | 0.4, missed |" in lines
    assert [line for line in lines if line.startswith("| a | c |")] == ["| a | c | 0.25 | 0.25 to 0.25 |  |"]


def test_the_table_has_grids():
    lines = harness.table(WITH_MEMORY).splitlines()
    start = lines.index("## a grid, MiB")
    assert lines[start + 2 : start + 5] == ["| row | x | y |", "|---|---:|---:|", "| one | 1.00 |  |"]


def test_workloads_have_different_names():
    names = [workload.name for workload in layers.WORKLOADS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("workload", layers.WORKLOADS, ids=lambda workload: workload.name)
def test_a_layers_step_is_that_of_the_stock_layer(workload):
    small = workload.small()
    stock, ours = (
        tf.function(layers.make_step(small, layers.find(small, ours), "float32", depth=1, seed=0), autograph=False)()
        for ours in (False, True)
    )
    assert len(stock) == len(ours) >= 2
    largest = max(float(np.abs(result.numpy()).max()) for result in stock)
    for theirs, mine in zip(stock, ours, strict=True):
        # float32 sums in another order; relative to the largest number of each result, or to
        # that of all where a result is 0 but for rounding, as the gradient to the bias of an attention's keys.
        size = max(1e-2 * largest, float(np.abs(theirs.numpy()).max()))
        np.testing.assert_allclose(mine.numpy() / size, theirs.numpy() / size, atol=2e-4)


@pytest.mark.parametrize("workload", layers.WORKLOADS, ids=lambda workload: workload.name)
def test_what_is_compared_of_a_layer_is_timed_and_its_memory_taken(workload, monkeypatch):
    monkeypatch.setattr(layers, "make_step", lambda *args, **kwargs: list)
    group = layers.group(workload)
    names = {case.name for case in group.cases()}
    for comparison in group.comparisons:
        assert {comparison.case, *comparison.against} <= names
    target, *arguments = group.memory
    assert target == "benchmarks.layers:stacked"
    assert {case.name for case in layers.stacked(*arguments)} == {n for n in names if "mixed_float16" not in n}


def test_a_chain_of_layers_reaches_each_of_them():
    workload = next(w for w in layers.WORKLOADS if w.name == "LayerNormalization").small()
    one, four = (
        tf.function(layers.make_step(workload, layers.find(workload, False), "float32", depth=depth))()
        for depth in (1, layers.DEPTH)
    )
    assert len(one) == 1 + 1 + 2
    assert len(four) == 1 + 1 + 2 * layers.DEPTH
    assert all(np.abs(gradient.numpy()).max() > 0 for gradient in four)


def _attention_results(tmp_path):
    groups = [
        {
            **WITH_MEMORY["groups"][0],
            "name": attention.group_name(length, causal),
            "length": length,
            "causal": causal,
            "comparisons": [],
            "memory_mib": {
                "stock, float32": [length**2 / 2**15],
                "ours, mixed_bfloat16": [length / 64],
            },
            "times_ms": {"stock, float32": [1.0], "ours, mixed_bfloat16": [1.0]},
        }
        for causal in (False, True)
        for length in (512, 1024)
    ]
    harness.write({"theme": "attention", "machine": MACHINE, "groups": groups}, tmp_path)
    rows = {attention.group_name(length, True): [None, length / 32] for length in (512, 1024)}
    grid = harness.Grid("TPU v5e: temporaries", "MiB", "attention", ["stock, float32", "ours, float32"], rows)
    harness.write({"theme": "attention_aot", "machine": MACHINE, "grids": [grid.as_json()]}, tmp_path)


def test_the_plot_is_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    _attention_results(tmp_path)
    plot = tmp_path / "plot.png"
    result = CliRunner().invoke(attention.app, ["--plot-only", "--output", str(tmp_path), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_curves_hold_what_the_results_hold(tmp_path):
    _attention_results(tmp_path)
    results, aot = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("attention", "attention_aot"))
    curves = attention.cpu_curves(results)
    assert curves["stock, float32, causal"] == {512: 8.0, 1024: 32.0}
    assert curves["ours, mixed_bfloat16"] == {512: 8.0, 1024: 16.0}
    assert attention.compiler_curves(aot["grids"][0]) == {"ours, float32, causal": {512: 16.0, 1024: 32.0}}


def test_a_length_of_attention_leaves_out_what_would_not_fit(monkeypatch):
    taken = []

    def memory(target, *words):
        taken.append(words[:4])
        return {case.name: [1.0] for case in attention.one_case(*words)}

    monkeypatch.setattr(harness, "memory_in_child", memory)
    before = {"stock, float32": 100.0, "stock, mixed_bfloat16": 50.0, "ours, float32": 1000.0}
    stock = "keras.layers.MultiHeadAttention"
    group = attention.run_length(16, True, before, path=stock, limit=250.0, rounds=1)
    assert ("16", "causal", "stock", "float32") not in taken
    assert len(taken) == 3
    assert set(group["times_ms"]) == {"ours, float32", "stock, mixed_bfloat16", "ours, mixed_bfloat16"}
    assert group["not_run"].keys() == {"stock, float32"}
    assert {comparison["against"][0] for comparison in group["comparisons"]} == {"stock, mixed_bfloat16"}
    harness.table({"theme": "attention", "machine": MACHINE, "groups": [group]})


def test_every_step_is_compiled_for_accelerators():
    names = [workload.name for workload in layers.WORKLOADS]
    assert list(aot.layer_steps()) == names
    assert set(aot.attention_steps()) == {
        attention.group_name(length, causal) for length in attention.LENGTHS for causal in (False, True)
    }


def test_whole_training_steps_have_every_case():
    assert list(aot.training_steps()) == [workload.name for workload in aot.TRAINING]
    cases = {layers.case_name(ours, policy) for policy in attention.POLICIES for ours in (False, True)}
    assert all(set(row) == cases for row in aot.training_steps().values())


@pytest.mark.parametrize("ours", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(workload, id=workload.name, marks=pytest.mark.slow if "ResNet" in workload.name else ())
        for workload in aot.TRAINING
    ],
)
def test_a_whole_training_step_is_compiled_for_accelerators(workload, ours):
    """It has static shapes and the update in it: TensorFlow lowers and runs it here as well."""
    small = workload.smaller()
    model = workloads.make(small, workloads.OURS if ours else workloads.STOCK, "float32", jit_compile=True)
    step = aot.whole_step(model, small.batches(1))
    before = [variable.numpy() for variable in model.trainable_variables]
    logs = tf.function(step, jit_compile=True, autograph=False)()
    assert np.isfinite(logs["loss"])
    assert model.optimizer.iterations == 1
    after = [variable.numpy() for variable in model.trainable_variables]
    assert all((old != new).any() for old, new in zip(before, after, strict=True))


def test_a_missing_compiler_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(aot, "PACKAGES", {"no_such_compiler": "no-such-compiler"})
    result = CliRunner().invoke(aot.app, [])
    assert result.exit_code == 1
    assert "no-such-compiler" in result.output
    assert "pip install -e '.[cpu,aot]'" in result.output


def test_the_table_of_layers_in_the_docs():
    assert doctest.testmod(summary).failed == 0
    results = json.loads(summary.RESULTS.read_text())
    page = (Path(__file__).parents[2] / "docs" / "measured.md").read_text()
    assert "\n".join(summary.rows(results)) in page, "python -m benchmarks.summary prints the table"


def test_ways_to_train_that_are_timed_against_each_other_train_alike(mirrored, monkeypatch):
    monkeypatch.setattr(
        distribution, "_strategy", lambda count: tf.distribute.get_strategy() if count == 1 else mirrored(2)
    )
    names = [distribution.STOCK, distribution.OURS_XLA, distribution.OURS_TWO]
    losses = {}
    for setting in (each for each in distribution.CASES if each.name in names):
        keras.utils.set_random_seed(0)
        case = distribution.make_case("perceptron", setting, distribution.SIZES["quick"], "float32")
        losses[case.name] = [case.run() for _ in range(3)]
    assert set(losses) == set(names)
    for values in losses.values():
        np.testing.assert_allclose(values, losses[distribution.STOCK], rtol=1e-4)
    for group in distribution.groups(distribution.SIZES["quick"]):
        for comparison in group.comparisons:
            assert {comparison.case, *comparison.against} <= {each.name for each in distribution.CASES}


def test_the_first_epochs_are_counted_and_shown():
    found = distribution.epochs(distribution.OURS_XLA, distribution.SIZES["quick"])
    assert len(found["seconds"]) == len(found["graphs"]) == distribution.EPOCHS
    # One graph when the model was made, and at least one for each size of a batch. Later epochs make none.
    assert found["graphs"][0] >= 2
    assert found["graphs"][1:] == [found["graphs"][0]] * 2
    grids = [grid.as_json() for grid in distribution.count_traces({"a": found})]
    graphs = " | ".join([f"{found['graphs'][0]:.2f}"] * distribution.EPOCHS)
    assert f"| a | {graphs} |" in harness.table({"theme": "example", "machine": MACHINE, "grids": grids})


EVERY_WORKLOAD = [*workloads.WORKLOADS, workloads.LANGUAGE_MODEL]


@pytest.mark.parametrize("workload", EVERY_WORKLOAD, ids=lambda workload: workload.name)
def test_a_workload_is_the_same_model_in_both_kits(workload):
    """The same seed gives the same weights, and outputs that agree to float32 rounding."""
    small = workload.smaller()
    x, y = small.batches(1)
    stock, ours = (workloads.make(small, kit, "float32") for kit in (workloads.STOCK, workloads.OURS))
    for one, other in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(ours.predict(x, verbose=0), stock.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    again = small.batches(1)
    np.testing.assert_array_equal(y, again[1])


@pytest.mark.parametrize("name", [name for name, case in training.CASES.items() if not case[2]])
def test_a_training_case_trains(name):
    case = training.make_case(workloads.WORKLOADS[0].smaller(), name)
    losses = [case.run()["loss"] for _ in range(20)]
    assert losses[-1] < losses[0]


def test_curves_are_those_of_the_seed():
    small = workloads.WORKLOADS[0].smaller()
    one, same, other = (training.loss_curve(small, training.STOCK_FLOAT32, seed, 8) for seed in (0, 0, 1))
    assert len(one) == 8
    np.testing.assert_allclose(one, same, rtol=1e-5)
    assert np.abs(np.subtract(one, other)).max() > 1e-3


def test_curves_are_compared_by_the_spread_of_the_seeds():
    curves = {"seed 0": [1.0] * 100, "seed 1": [3.0] * 100, "seed 2": [2.0] * 100, "ours": [1.0] * 90 + [2.0] * 10}
    found = training.compare_curves(curves)
    # Seed 1 lies 2 from seed 0, where the spread of seeds 0 and 2 is 1; seed 2 lies 1, where that of 0 and 1 is 2.
    another = {training.ANOTHER_SEED: pytest.approx((2 / 1 + 1 / 2) / 2)}
    assert found == {"ours": 0.5, "ours at the end": pytest.approx(0.1), **another}


def test_the_summary_of_training_is_made_of_the_results():
    names = [training.STOCK_FLOAT32, training.STOCK_MIXED, training.OURS_FLOAT32, training.OURS_MIXED]
    group = {"name": "MLP, batch 256", "times_ms": dict(zip(names, [[6.0], [3.0], [4.0], [2.0]], strict=True))}
    peaks, of_rows = (
        {"columns": names, "rows": {"MLP, batch 256": values}}
        for values in ([200.0, 190.0, 180.0, 120.0], [100.0, 90.0, 80.0, 30.0])
    )
    curves = {"grids": [{"rows": {"MLP": [0.25, 0.1, 0.2, 0.3]}}]}
    lines = list(training.summary({"groups": [group], "grids": [peaks, of_rows]}, curves))
    assert lines[2] == "| MLP, batch 256 | 2.00 | 1.50 | 3.00 |  |  |  |  | 0.60 | 0.30 | 0.25 |"
    assert lines[3].startswith("| geometric mean, workloads | 2.00 | 1.50 | 3.00 |")


def test_a_summary_of_other_results_leaves_the_readmes_plot(tmp_path):
    runner, plot = CliRunner(), training.PLOT.read_bytes()
    missing = runner.invoke(training.app, ["summary", "--output", str(tmp_path)])
    assert missing.exit_code == 2
    assert "Run `python -m benchmarks.training` first" in " ".join(missing.output.replace("│", "").split())
    for name in ("training.json", "training_curves.json"):
        (tmp_path / name).write_bytes((training.harness.RESULTS / name).read_bytes())
    assert runner.invoke(training.app, ["summary", "--output", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert training.PLOT.read_bytes() == plot


def test_training_is_timed_without_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "WORKLOADS", [workloads.WORKLOADS[0].smaller()])
    names = [training.STOCK_FLOAT32, training.OURS_MIXED, f"{training.OURS_MIXED}, XLA"]
    monkeypatch.setattr(training, "CASES", {name: training.CASES[name] for name in names})
    command = ["--only", "MLP", "--no-memory", "--rounds", "1", "--loaded", "--output", str(tmp_path)]
    assert CliRunner().invoke(training.app, command).exit_code == 0
    found = json.loads((tmp_path / "training.json").read_text())
    assert [group["name"] for group in found["groups"]] == ["MLP, batch 8"]
    assert set(found["groups"][0]["times_ms"]) == set(training.CASES)
    assert [grid["rows"] for grid in found["grids"]] == [{}, {}]


def test_the_products_of_a_step_and_its_update_are_told_apart():
    case = training.make_case(workloads.WORKLOADS[0].smaller(), training.OURS_FLOAT32)
    case.run()
    kinds = ceiling.time_ops(case.run, steps=2)
    assert any("MatMul" in kind for kind in kinds)
    assert "ResourceApplyAdam" in kinds
    found = ceiling.parts(case.run, steps=2)
    assert 0 < found.products < found.step
    assert 0 < found.updates < found.step


@pytest.mark.parametrize(("app", "command"), [(training.app, []), (training.app, ["curves"]), (ceiling.app, [])])
def test_training_of_no_workload_is_refused(app, command, tmp_path):
    result = CliRunner().invoke(app, [*command, "--only", "Nope", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "No workload has 'Nope' in its name" in " ".join(result.output.replace("│", "").split())


def test_the_plot_of_training_is_a_picture(tmp_path):
    names = [training.STOCK_FLOAT32, training.STOCK_MIXED, training.OURS_FLOAT32, training.OURS_MIXED]
    group = {"name": "MLP, batch 256", "times_ms": dict(zip(names, [[6.0], [3.0], [4.0], [2.0]], strict=True))}
    training.plot({"groups": [group]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
