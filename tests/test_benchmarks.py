"""The benchmark scripts: what they count, what they write, and what they refuse. No test looks at a time."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import harness
import suites
from benchmarks import report, throughput, trained_goals
from conftest import ROOT, Pendulum, read_csv

CPU, PEAKS = torch.device("cpu"), throughput.Peaks(1e12, 1e10)


@pytest.fixture
def small(monkeypatch):
    """Peaks at once, in place of seconds of measuring them."""
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, precision: PEAKS.flops_per_s)
    monkeypatch.setattr(throughput, "copy_bandwidth", lambda device: PEAKS.bytes_per_s)
    return dict(num_tasks=3, batch_size=8, repeats=3, device="cpu", compile=False, seconds=1)


def test_the_floor_is_the_papers_network_by_hand():
    args = throughput.Args(repeats=1, seconds=0)
    row = throughput.measure(args, throughput.make_case(args, 256, "fp32", False, False, CPU), PEAKS, CPU)
    critic = 2 * (75 * 256 + 4 * 256 * 256 + 256 * 101)  # weights of both: 39 + 4 + 32 in, 101 atoms out
    actor = 71 * 256 + 2 * 256 * 256 + 2 * 256 * 4
    all_of_critic = critic + 2 * (15 * 256 + 101) + 50 * 32  # with biases, norms and the embedding
    all_of_actor = actor + 9 * 256 + 2 * 4
    flops, moved = 2 * 1024 * (6 * critic + 4 * actor), 40 * all_of_critic + 28 * all_of_actor
    assert row["gflop"] == pytest.approx(flops / 1e9) and row["gflop"] == pytest.approx(8.8, abs=0.05)
    assert row["floor_ms"] == pytest.approx(1e3 * (flops / PEAKS.flops_per_s + moved / PEAKS.bytes_per_s))
    assert row["ratio"] == pytest.approx(row["ms"] / row["floor_ms"]) and row["updates"] == 6


def test_a_case_per_width_goes_into_both_files_with_its_kernels(small, tmp_path, capsys):
    throughput.main(throughput.Args(**small, widths=(16, 24), precisions=("fp32",), profile=True,
                                    json=tmp_path / "out.json", csv=tmp_path / "out.csv"))
    rows, table = json.loads((tmp_path / "out.json").read_text())["updates"], read_csv(tmp_path / "out.csv")
    assert [row["width"] for row in rows] == [16, 24] == [int(line["width"]) for line in table]
    for row, line in zip(rows, table, strict=True):
        assert float(line["ms"]) == pytest.approx(row["ms"], rel=1e-3) and line["hardware"] and line["command"]
        adam = [kernel["runs"] for kernel in row["kernels"] if kernel["kernel"] == "aten::_fused_adamw_"]
        assert adam == [pytest.approx(3)] and float(line["Polyak ms"]) > 0
        assert sum(kernel["ms"] for kernel in row["kernels"]) == pytest.approx(row["all ms"])


def test_the_loop_steps_real_environments_and_says_who_waits(small, tmp_path):
    throughput.main(throughput.Args(**small, widths=(16,), precisions=("fp32",), loop="demo", loop_steps=10, workers=0,
                                    json=tmp_path / "out.json"))
    (row,) = json.loads((tmp_path / "out.json").read_text())["loop"]
    parts = [row[f"ms_host_{part}"] for part in ("act", "update", "wait_for_environments", "store")]
    assert row["tasks"] == 3 and sum(parts) == pytest.approx(row["ms_step"], rel=0.05) and all(parts)
    assert row["waits"] == ("learner" if parts[2] > 0.1 * row["ms_step"] else "environments")


def make_run(folder, seed, values, **settings):
    """A run of two tasks `a` and `b`, where `values` of a task are its scores at steps 10, 20, ..."""
    folder.mkdir()
    args = {"exp_name": "idea", "seed": seed, "run_dir": str(folder), "tasks": list(values), "total_steps": 20,
            "learning_starts": 5, "updates_per_step": 2, "width": 64, "device": ("cpu", "cuda")[seed % 2]} | settings
    (folder / "args.json").write_text(json.dumps(args))
    rows = [f"idea,{task},{seed},score,{10 * n},{value}" for task in values for n, value in enumerate(values[task], 1)]
    (folder / "metrics.csv").write_text("\n".join(["exp_name,env_name,seed,metric,env_step,value", *rows]) + "\n")


def test_seeds_of_one_setting_are_averaged_and_other_settings_stand_apart(tmp_path, capsys):
    make_run(tmp_path / "0", 0, {"reach": [0.0, 0.5], "push": [0.0, 0.5]})
    make_run(tmp_path / "1", 1, {"reach": [0.5, 1.0], "push": [0.5, 1.0]})
    make_run(tmp_path / "wide", 2, {"reach": [1.0, 1.0], "push": [1.0, 1.0]}, width=128)
    report.main(report.Args((tmp_path,), ("mw",), mean_only=True, at=(0.5, 1), threshold=0.75, out=tmp_path / "out.png",
                            csv=tmp_path / "out.csv"))
    rows = [row for row in read_csv(tmp_path / "out.csv") if row["method"] != "authors, mw"]
    assert [(row["method"], row["seeds"], row["env_step"], row["value"]) for row in rows] == [
        ("idea (width 64)", "2", "10", "0.250"), ("idea (width 64)", "2", "20", "0.750"),
        ("idea (width 128)", "1", "10", "1.000"), ("idea (width 128)", "1", "20", "1.000")]
    assert rows[1]["low"] == "0.500" and rows[1]["high"] == "1.000" and rows[0]["reached"] == ">20 20"
    assert (tmp_path / "out.png").stat().st_size < 60_000
    out = capsys.readouterr().out
    with pytest.raises(harness.UsageError, match="--single other is none of the methods: they are idea"):
        report.main(report.Args((tmp_path,), single=("other",), out=tmp_path / "out.png"))
    report.main(report.Args((tmp_path,), single=("idea (width 64)",), mean_only=True, out=tmp_path / "out.png"))
    with pytest.raises(harness.UsageError, match="--methods other is none of the methods: they are idea"):
        report.main(report.Args((tmp_path,), methods=("other",), out=tmp_path / "out.png"))
    report.main(report.Args((tmp_path,), methods=("idea (width 128)", "idea (width 64)"), mean_only=True,
                            out=tmp_path / "out.png", csv=tmp_path / "two.csv"))
    assert [row["method"] for row in read_csv(tmp_path / "two.csv")] == ["idea (width 128)", "idea (width 64)"]
    report.main(report.Args((tmp_path,), methods=("idea (width 128)",), out=tmp_path / "out.png",
                            csv=tmp_path / "one.csv"))
    assert {row["method"] for row in read_csv(tmp_path / "one.csv")} == {"idea (width 128)"}
    assert "authors, mw | 5 |" in out and "| not reached, 1 of 2 |" in out  # the median of 20 and later
    make_run(tmp_path / "again", 0, {"reach": [1.0, 1.0]}, tasks=["reach", "push"])
    with pytest.raises(harness.UsageError, match="both seed 0 of idea on reach"):
        report.read_methods([tmp_path], "score")


@pytest.mark.parametrize(("single", "low", "high"), [(False, 0, 1), (True, 0.125, 0.875)])
def test_seeds_are_drawn_for_all_tasks_of_a_network_at_once(single, low, high):
    """Three seeds at 0, 0.5 and 1 on both tasks: all equal in 1 of 27 draws, and with two draws in 1 of 729."""
    curves = {task: {seed: {10: seed / 2} for seed in range(3)} for task in ("reach", "push")}
    method = report.Method(curves=curves, single=single)
    (row,) = report.evaluate(report.Args(), "mean", "idea", method, list(curves)).rows
    assert row["value"] == row["mean"] == 0.5 and (row["low"], row["high"]) == pytest.approx((low, high), abs=0.05)


def test_seeds_that_stopped_early_cut_the_curve_and_not_what_another_reached(tmp_path, capsys):
    make_run(tmp_path / "0", 0, {"reach": [0.1, 0.3, 0.8, 0.9], "push": [0.1, 0.3, 0.8, 0.9]}, total_steps=40)
    make_run(tmp_path / "1", 1, {"reach": [0.1], "push": [0.1]}, total_steps=40)
    make_run(tmp_path / "2", 2, {"push": [0.1]}, tasks=["reach", "push"], total_steps=40)
    report.main(report.Args((tmp_path,), at=(0.25, 1), threshold=0.6, out=tmp_path / "x.png", csv=tmp_path / "x.csv"))
    out, error = capsys.readouterr()
    rows = {(row["task"], row["at"]): row for row in read_csv(tmp_path / "x.csv")}
    assert [rows[task, "0.25"]["reached"] for task in ("reach", "push", "mean of 2 tasks")] == [
        "30 >10", "30 >10 >10", "30 >10"]
    assert rows["reach", "0.25"]["env_step"] == "10" and rows["reach", "1"]["env_step"] == ""
    assert "| not reached, 1 of 2 |" in out
    assert "idea on push: only 1 of 4 steps, as not all seeds have the others." in error
    assert "idea on mean of 2 tasks: only 2 of 3 seeds, as others lack a task and 1 of 4 steps" in error


def test_shares_are_of_each_tasks_own_budget_and_the_mean_ends_with_the_given_one(tmp_path, capsys):
    make_run(tmp_path / "0", 0, {"reach": [0.0, 1.0]}, total_steps=20)
    make_run(tmp_path / "1", 0, {"push": [0.0, 0.2, 0.4, 1.0]}, total_steps=40)
    args = report.Args((tmp_path,), at=(0.5,), out=tmp_path / "x.png", csv=tmp_path / "x.csv")
    report.main(args)
    rows = read_csv(tmp_path / "x.csv")
    assert [(row["task"], row["env_step"]) for row in rows] == [
        ("reach", "10"), ("push", "20"), ("mean of 2 tasks", "")]
    assert "no shares of a budget, as its tasks have from 20 to 40 steps" in capsys.readouterr().err
    report.main(dataclasses.replace(args, budget=30, tasks=("push", "push")))
    (row,) = read_csv(tmp_path / "x.csv")
    assert (row["env_step"], row["value"], row["mean"]) == ("10", "0.000", "0.200")


def test_many_methods_fit_and_names_are_no_markup(tmp_path, capsys):
    for index in range(25):
        make_run(tmp_path / str(index), 0, {"reach": [0.0, 0.5]}, program=f"a|$\\frac${index}")
    report.main(report.Args((tmp_path,), out=tmp_path / "x.png"))
    assert capsys.readouterr().out.count(r"a\|$\frac$") == 25
    with Image.open(tmp_path / "x.png") as image:
        assert image.height > 90 * (2.4 + 25 * 0.2)  # a panel and a line of the legend for each


def test_runs_with_and_without_arguments_stand_apart(tmp_path):
    make_run(tmp_path / "0", 0, {"reach": [0.0, 0.5]}, program="/here/idea.py")
    make_run(tmp_path / "1", 1, {"reach": [0.0, 0.5]}, program="/there/idea.py")
    make_run(tmp_path / "2", 2, {"reach": [0.0, 0.5]}, program="/here/other.py")
    make_run(tmp_path / "3", 3, {"reach": [0.0, 0.5]})
    (tmp_path / "3" / "args.json").unlink()
    methods = report.read_methods([tmp_path], "score")
    assert {name: len(method.files) for name, method in methods.items()} == {
        "idea (program idea.py)": 2, "idea (program other.py)": 1, "idea (no args.json)": 1}
    with pytest.raises(harness.UsageError, match="has no args.json beside it"):
        methods["idea (no args.json)"].x_of([10], "updates", 1)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("metrics.csv", "exp_name,env_name,seed,metric,env_step,value\nidea,reach,0,score,30\n", "row 1"),
    ("metrics.csv", "exp_name,env_name,seed,metric,env_step,value\nidea,reach,0,score,30,abc\n", "cannot be read"),
    ("metrics.csv", f"exp_name,env_name,seed,metric,env_step,value\nidea,reach,0,score,{10**25},1\n", "a step of 1000"),
    ("metrics.csv", "exp_name,env_name,seed,env_step,value\nidea,reach,0,30,1", "cannot be read"),
    ("metrics.csv", "exp_name,env_name,seed,metric,env_step,value" + 2 * "\nidea,reach,0,score,30,1", "has two values"),
    ("args.json", "{", "not that of a run"), ("args.json", "[]", "not that of a run"),
    ("args.json", "{}", "not that of a run"),
    ("args.json", '{"tasks": ["reach"], "total_steps": null}', "not that of a run .*total_steps: None"),
    ("table.csv", "task,method,seeds\nreach,idea,1", "cannot be read"),
    ("map.csv", "task,reach,push\n", "no complete embedding_map.csv"),
    ("map.csv", "task,reach,push\nsweep,0.5", "no complete embedding_map.csv")])
def test_damaged_files_are_refused_in_a_sentence(tmp_path, name, text, message):
    make_run(tmp_path / "run", 0, {"reach": [0.0, 0.5]})
    (tmp_path / "run" / name).write_text(text)
    given = tmp_path / "run" / name if name in ("table.csv", "map.csv") else tmp_path
    with pytest.raises(harness.UsageError, match=message):
        report.main(report.Args((given,), out=tmp_path / "out.png"))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("cut", ["idea,pu", "idea,push,0,score,20,", "idea,push,0,score,20,-"])
def test_a_line_that_was_cut_short_is_left_out_and_named(tmp_path, capsys, cut):
    make_run(tmp_path / "run", 0, {"reach": [0.0, 0.5], "push": [0.1, 0.5]})
    metrics = tmp_path / "run" / "metrics.csv"
    metrics.write_text(metrics.read_text().removesuffix("idea,push,0,score,20,0.5\n") + cut)
    curves = report.read_methods([tmp_path], "score")["idea"].curves
    assert curves == {"reach": {0: {10: 0.0, 20: 0.5}}, "push": {0: {10: 0.1}}}
    assert f"ends within a line, which is left out: {cut}" in capsys.readouterr().err
    metrics.write_text(metrics.read_text().removesuffix(cut) + "idea,push,0,score,20,0.5")
    assert report.read_methods([tmp_path], "score")["idea"].curves["push"] == {0: {10: 0.1, 20: 0.5}}
    assert "ends within a line, which is used, though" in capsys.readouterr().err


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    make_run(tmp_path / "0", 0, {"reach": [0.0, float("nan")], "push": [0.1, 0.5]})
    make_run(tmp_path / "1", 0, {"walker-run": [0.5]}, exp_name="other")
    (tmp_path / "1" / "metrics.csv").write_text((tmp_path / "1" / "metrics.csv").read_text().replace("idea", "other"))
    args = report.Args((tmp_path,), ("mw",), out=tmp_path / "x.png", csv=tmp_path / "x.csv", budget=15)
    report.main(args)
    error = capsys.readouterr().err
    assert "is not finite on reach at step 20, and 0 times more" in error
    assert "No mean over tasks, as all methods have none in common." in error
    assert "not of the same steps" not in error  # the authors' first evaluation is behind the budget
    assert {row["mean"] for row in read_csv(tmp_path / "x.csv") if "authors" in row["method"]} == {""}
    assert "authors, mw on reach: no evaluation by step 15, and so no mean." in error
    report.main(dataclasses.replace(args, tasks=("reach", "push"), budget=None))
    error = capsys.readouterr().err
    assert "Not drawn, having none of these tasks: other." in error
    assert "as on reach (idea: 2 from 10 to 20; authors, mw: 20 from 25,000 to 500,000)." in error


def test_tasks_without_goals_join_those_with_frozen_ones(tmp_path):
    make_run(tmp_path / "0", 0, {"reach": [0.0, 0.5]}, goals="frozen")
    make_run(tmp_path / "1", 0, {"cartpole-balance": [0.0, 0.5]}, goals="fresh")  # as brc_sac.py says of such a task
    assert set(report.read_methods([tmp_path], "score")) == {"idea"}
    make_run(tmp_path / "2", 0, {"push": [0.0, 0.5]}, goals="fresh")
    assert set(report.read_methods([tmp_path / "0", tmp_path / "2"], "score")) == {
        "idea (goals frozen)", "idea (goals fresh)"}


def test_what_is_read_is_not_written_over(tmp_path):
    make_run(tmp_path / "run", 0, {"reach": [0.0, 0.5]})
    metrics = tmp_path / "run" / "metrics.csv"
    before = metrics.read_text()
    for name in ("metrics.csv", "args.json"):
        with pytest.raises(harness.UsageError, match="is there, and no table of this script"):
            report.main(report.Args((metrics,), csv=tmp_path / "run" / ".." / "run" / name))
    assert metrics.read_text() == before
    with pytest.raises(harness.UsageError, match="are both"):
        report.main(report.Args((metrics,), out=tmp_path / "x.svg", csv=tmp_path / "x.svg"))
    named_as_a_figure = tmp_path / "metrics.svg"
    named_as_a_figure.write_text(before)
    with pytest.raises(harness.UsageError, match="is a file of these runs"):
        report.main(report.Args((named_as_a_figure,), out=tmp_path / "run" / ".." / "metrics.svg"))
    assert named_as_a_figure.read_text() == before
    (tmp_path / "map.csv").write_text("task,reach\nsweep,0.5\n")
    with pytest.raises(harness.UsageError, match="give it alone"):
        report.main(report.Args((tmp_path / "map.csv", metrics), out=tmp_path / "x.png"))
    with pytest.raises(harness.RunError, match="/dev/full cannot be written .No space"):
        report.main(report.Args((metrics,), out=tmp_path / "x.png", csv=Path("/dev/full")))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(columns=0), "--columns is 0"), (dict(reps=0), "--reps is 0"), (dict(budget=-5), "--budget is -5"),
    (dict(at=()), "--at is empty"), (dict(at=(0.5, 2)), "--at is 0.5 2"), (dict(csv=ROOT), "cannot be written"),
    (dict(threshold=float("nan")), "--threshold is nan"), (dict(csv=ROOT / ("x" * 300) / "x"), "cannot be written"),
    (dict(out=ROOT / "none" / "x.png"), "cannot be written"), (dict(out=ROOT / "x.foo"), "ends in .png, .pdf or .svg")])
def test_arguments_of_the_report_are_checked_before_it_reads(arguments, message):
    with pytest.raises(harness.UsageError, match=message):
        report.main(report.Args(official=("mw",), **arguments))


def test_updates_count_every_network_of_single_task_runs():
    steps = [5, 25]
    assert report.Method(learning_starts=5).x_of(steps, "updates", 3).tolist() == [0, 40]
    assert report.Method(learning_starts=5, single=True).x_of(steps, "updates", 3).tolist() == [0, 120]


def test_offline_runs_count_updates_themselves(tmp_path):
    make_run(tmp_path / "run", 0, {"reach": [0.0, 0.5]}, learning_starts=1, updates_per_step=1, updates=40)
    assert report.read_methods([tmp_path], "score")["idea"].x_of([40], "updates", 1).tolist() == [40]


@pytest.mark.parametrize(("command", "message"), [
    ("throughput.py --cuda-graph True --device cpu", "NVIDIA GPU"), ("report.py {}", "no evaluation of 'score' yet"),
    ("report.py --official mv", "the names are cpu"), ("env_steps.py --suites mv", "Unknown suite"),
    ("gpu_day.sh dance {}", "unknown piece 'dance'"), ("ablations.sh dance 0 {}", "unknown piece 'dance'"),
    ("ablations.sh methods", "1 arguments"), ("metaworld.sh 128", "1 arguments")])
def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path, command, message):
    (tmp_path / "metrics.csv").write_text("exp_name,env_name,seed,metric,env_step,value\n")
    script, *arguments = command.format(tmp_path).split()
    process = subprocess.run(["bash" if script.endswith(".sh") else sys.executable, f"benchmarks/{script}", *arguments],
                             cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and message in process.stderr and process.stderr.count("\n") == 1


def test_an_agent_is_evaluated_on_the_goals_it_was_trained_with(sac, tmp_path, monkeypatch):
    made = []

    def make(task, seed, render_mode=None, goals="fresh"):
        made.append((task, seed, goals))
        env = Pendulum()
        env.step = lambda action: (*Pendulum.step(env, action)[:4], {"success": float(seed < 42)})
        return env

    monkeypatch.setattr(suites, "make", make)
    args = sac.args(goals="frozen", seed=3, total_steps=20)
    sac.module.train(args)
    in_training, made[:] = set(made), []
    trained_goals.main(trained_goals.Args((Path(args.run_dir),), out=tmp_path / "x.csv"))
    assert set(made) == in_training and {goals for *_, goals in made} == {"frozen"}
    rows = {(row["exp_name"], row["env_name"]): row for row in read_csv(tmp_path / "x.csv") if row["metric"] == "success"}
    assert {key: (row["seed"], row["env_step"], row["value"]) for key, row in rows.items()} == {
        (f"test, {goals} goals", task): ("3", "20", value)
        for goals, value in (("trained", "1"), ("tested", "0")) for task in ("reach", "drawer-close")}
    with pytest.raises(harness.UsageError, match="a file that is not there"):
        trained_goals.main(trained_goals.Args((Path(args.run_dir),), out=tmp_path / "x.csv"))
    sac.module.train(sac.args(run_dir=str(tmp_path / "fresh"), total_steps=20))
    with pytest.raises(harness.UsageError, match="fresh is no run of brc_sac.py in one process with --goals frozen"):
        trained_goals.main(trained_goals.Args((tmp_path / "fresh",), out=tmp_path / "y.csv"))
