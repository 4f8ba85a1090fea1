"""offline.py: what it reads of both kinds of data, its losses against brc_sac.py's, and whole runs."""

import copy
import dataclasses
import functools
import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import brc_sac
import harness
import offline
from conftest import ROOT, Program
from offline_data import tdmpc2
from offline_data.runs import RunReplay
from offline_data.transitions import Transitions

TASKS = ("pendulum-swingup", "cartpole-swingup")  # observations of 3 and 5, actions of 1
SIZES = {"pendulum-swingup": (3, 1), "cartpole-swingup": (5, 1), "reach": (39, 4), "walker-stand": (24, 6)}
SMALL = dict(tasks=TASKS, width=16, actor_width=16, embedding_norm="l1", compile=False, eval_episodes=10)
ARGS = brc_sac.Args(**brc_sac.PAPER | SMALL)


def environments(tasks: tuple[str, ...]) -> SimpleNamespace:
    """What of a VectorEnv is needed to read data."""
    obs_dims, act_dims = np.array([SIZES[task] for task in tasks]).T
    return SimpleNamespace(tasks=tasks, obs_dims=obs_dims, act_dims=act_dims, obs_dim=obs_dims.max(),
                           act_dim=act_dims.max())


def write_run(path: Path, tasks=TASKS, steps=100, lengths=(30, 43), terminates=1, capacity=100, seed=0) -> dict:
    """A run directory with a replay; task i has episodes of lengths[i] steps, terminated only in task `terminates`.

    Returns the transitions (obs, action, reward, terminated, next_obs) of each task.
    """
    rng, sizes = np.random.default_rng(seed), np.max([SIZES[task] for task in tasks], axis=0)
    buffer = brc_sac.ReplayBuffer(len(tasks), *sizes, capacity)
    record = {task: [] for task in tasks}
    own = np.arange(sizes[0]) < np.array([[SIZES[task][0]] for task in tasks])
    obs = own * rng.normal(size=own.shape).astype(np.float32)
    for step in range(1, steps + 1):
        action = rng.uniform(-1, 1, (len(tasks), sizes[1])).astype(np.float32)
        reward, next_obs = rng.normal(size=len(tasks)), own * rng.normal(size=own.shape)
        reward, next_obs = reward.astype(np.float32), next_obs.astype(np.float32)
        ended = step % np.array(lengths) == 0
        terminated = ended & (np.arange(len(tasks)) == terminates)
        buffer.add(obs, action, reward, terminated, ended & ~terminated, next_obs)
        for i, task in enumerate(tasks):
            record[task].append((obs[i], action[i], reward[i], np.float32(terminated[i]), next_obs[i]))
        obs = np.where(ended[:, None], own * rng.normal(size=own.shape), next_obs).astype(np.float32)
    path.mkdir(parents=True)
    agent = {"sizes": (*sizes.tolist(), len(tasks), len(tasks))}
    state = {"format": harness.FORMAT, "env_step": steps, "buffer": buffer.state_dict(), "agent": agent,
             "replay": harness.append_replay(path / "replay", buffer, {})}
    torch.save(state, path / "checkpoint.pt")
    facts = {"format": harness.FORMAT, "tasks": tasks, "program": "brc_sac.py", "ranks": 1}
    (path / "args.json").write_text(json.dumps(facts))
    return record


def write_chunks(folder: Path, numbers: list[list[int]], rows=101, sizes=(39, 6), filler=float("nan")) -> list[dict]:
    """Files with an episode of task numbers[file][episode] each; returns their fields."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks, generator = [], torch.Generator().manual_seed(0)
    for name, of_file in enumerate(numbers):
        shape = len(of_file), rows
        task = torch.tensor(of_file)[:, None].expand(shape).clone()
        own = [torch.tensor([SIZES[tdmpc2.TASKS[number]] for number in of_file])[:, i, None, None] for i in range(2)]
        obs = torch.randn(*shape, sizes[0], generator=generator) * (torch.arange(sizes[0]) < own[0])
        action = torch.rand(*shape, sizes[1], generator=generator) * (torch.arange(sizes[1]) < own[1])
        reward = torch.rand(shape, generator=generator)
        action[:, 0], reward[:, 0] = filler, filler
        chunks.append({"obs": obs, "action": action, "reward": reward, "task": task})
        torch.save(TensorDict(chunks[-1], batch_size=shape), folder / f"chunk_{name}.pt")
    return chunks


def read(sources: list, tasks: tuple[str, ...], variant="paper"
         ) -> tuple[offline.Transitions, brc_sac.ReturnNormalizer]:
    envs = environments(tasks)
    normalizer = brc_sac.ReturnNormalizer(dataclasses.replace(ARGS, variant=variant), len(tasks), envs.act_dim)
    observe = functools.partial(offline.observe_returns, normalizer)
    return Transitions(sources, envs, observe, torch.device("cpu")), normalizer


def transitions(data: offline.Transitions, task: int) -> list[np.ndarray]:
    """(obs, action, reward, terminated, next_obs) of every row that can be sampled."""
    rows = data.place[data.first[task]:data.first[task] + data.count[task]]
    return [*data.rows[rows].split(data.fields, -1), data.rows[rows + 1, :data.fields[0]]]


@pytest.mark.parametrize("options", [{}, {"last": 25}, {"last": 55}, {"steps": 86, "last": 50}, {"steps": 250}])
def test_a_run(tmp_path, options):
    last = options.pop("last", None)
    steps, kept = options.get("steps", 100), min(last or 100, options.get("steps", 100), 100)
    record = write_run(tmp_path / "run", **options)
    source = RunReplay(tmp_path / "run", None, last)
    data, _ = read([source], TASKS)
    ends = sum(stop % length == 0 for length in (30, 43) for stop in range(steps - kept + 1, steps + 1))
    assert source.transitions == dict.fromkeys(TASKS, kept) and data.count.tolist() == [kept, kept]
    assert len(data.rows) == 2 * kept + ends + sum(steps % length > 0 for length in (30, 43))
    for i, task in enumerate(TASKS):
        expected = record[task][-min(last or 100, 100):]
        for values, field in zip(transitions(data, i), zip(*expected)):
            np.testing.assert_array_equal(values.squeeze(-1) if values.shape[1] == 1 else values,
                                          np.squeeze(np.array(field)))


def test_runs_without_transitions_of_ours_are_refused(tmp_path):
    for task, reason in (("Pong", "Atari"), ("reach", "holds no replay")):
        (tmp_path / task).mkdir()
        facts = {"format": harness.FORMAT, "tasks": [task], "program": "x.py", "ranks": 1}
        (tmp_path / task / "args.json").write_text(json.dumps(facts))
        torch.save({"format": harness.FORMAT, "env_step": 1}, tmp_path / task / "checkpoint.pt")
        with pytest.raises(harness.UsageError, match=reason):
            RunReplay(tmp_path / task, None, None)
    with pytest.raises(harness.UsageError, match="holds no replay"):
        RunReplay(ROOT / "pretrained" / "mw7", None, None)
    write_run(tmp_path / "unborn", steps=0)
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "args.json").write_text(json.dumps({"format": harness.FORMAT, "program": "transfer.py"}))
    for name, reason in (("unborn", "holds no transitions yet"), ("several", "holds the runs of several tasks")):
        with pytest.raises(harness.UsageError, match=f"{name} {reason}"):
            RunReplay(tmp_path / name, None, None)


@pytest.mark.parametrize("name", ["rows", "last_obs", "end"])
def test_of_a_damaged_replay_the_checkpoint_before_it_is_counted_and_read(tmp_path, capsys, name):
    record = write_run(tmp_path / "before", steps=60)
    write_run(tmp_path / "run", steps=100)  # the same, and 40 more
    (tmp_path / "before" / "checkpoint.pt").rename(tmp_path / "run" / "checkpoint.previous.pt")
    path = tmp_path / "run" / "replay" / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    source = RunReplay(tmp_path / "run", None, None)
    data, _ = read([source], TASKS)
    assert source.transitions == dict.fromkeys(TASKS, 60) and len(data.rows) == 120 + 3 + 1
    assert transitions(data, 0)[2].flatten().tolist() == [row[2] for row in record[TASKS[0]]]
    said = capsys.readouterr().err
    assert f"{name}.bin fail their checksum); checkpoint.previous.pt, of step 60, takes its place" in said


def test_runs_of_different_tasks_are_joined_by_name(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", ("reach", "pendulum-swingup"), seed=1)
    data, _ = read([RunReplay(tmp_path / name, None, None) for name in ("one", "two")], (*TASKS, "reach"))
    assert data.count.tolist() == [200, 100, 100] and data.fields == (39, 4, 1, 1)
    obs, action, reward, _, next_obs = transitions(data, 0)
    assert reward.flatten().tolist() == [row[2] for run in (one, two) for row in run["pendulum-swingup"]]
    assert not obs[:, 3:].any() and not next_obs[:, 3:].any() and not action[:100, 1:].any()
    torch.manual_seed(0)
    batch = data.sample(30_000)
    assert np.abs(np.bincount(batch.task_id) / 30_000 - 1 / 3).max() < 0.02  # tasks, not transitions, are even
    assert len(set(batch.reward.tolist())) == 400
    stored = {row[2].item(): row for task in range(3) for row in zip(*transitions(data, task))}
    for i, reward in enumerate(batch.reward[:1000].tolist()):
        assert torch.equal(batch.obs[i], stored[reward][0]) and torch.equal(batch.next_obs[i], stored[reward][4])


def test_return_scales_are_those_of_whole_episodes(tmp_path):
    record = write_run(tmp_path / "run", steps=250)
    for variant in ("paper", "release"):
        _, normalizer = read([RunReplay(tmp_path / "run", None, None)], TASKS, variant)
        for task, (name, length, stops) in enumerate(zip(TASKS, (30, 43), ((210, 240), (215,)))):
            largest = 0.0
            for stop in stops:
                rewards = np.array([row[2] for row in record[name][stop - length:stop]], np.float64)
                value = 0.0 if task == 1 else rewards.mean() / 0.01
                for reward in rewards[::-1]:
                    value = reward + 0.99 * value
                    largest = max(largest, abs(value))
            assert normalizer.return_scale[task].item() == pytest.approx(largest, rel=1e-6)
    _, normalizer = read([RunReplay(tmp_path / "run", None, 5)], TASKS)  # no whole one: what there is counts
    assert normalizer.return_scale.isfinite().all()


@pytest.mark.parametrize("rows, sizes, numbers, filler", [
    (101, (39, 6), [[7, 65, 7], [10, 7]], float("nan")), (501, (24, 6), [[0, 7], [7]], 0.5)])
def test_published_files(tmp_path, rows, sizes, numbers, filler):
    chunks = write_chunks(tmp_path / "data", numbers, rows, sizes, filler)
    source = tdmpc2.Dataset(tmp_path / "data")
    held = sorted({number for of_file in numbers for number in of_file})
    assert source.tasks == tuple(tdmpc2.TASKS[number] for number in held)
    data, normalizer = read([source], source.tasks)
    for task, number in enumerate(held):
        episodes = [{name: chunk[name][i] for name in chunk}
                    for chunk, of_file in zip(chunks, numbers) for i in np.flatnonzero(np.array(of_file) == number)]
        obs, action, reward, terminated, next_obs = transitions(data, task)
        padded = [torch.cat([episode["obs"][start:stop, :data.fields[0]] for episode in episodes])
                  for start, stop in ((0, -1), (1, None))]
        assert torch.equal(obs, padded[0]) and torch.equal(next_obs, padded[1]) and not terminated.any()
        assert torch.equal(action, torch.cat([episode["action"][1:, :data.fields[1]] for episode in episodes]))
        assert torch.equal(reward[:, 0], torch.cat([episode["reward"][1:] for episode in episodes]))
    assert normalizer.return_scale.isfinite().all()


def test_max_transitions_are_drawn_evenly(tmp_path):
    chunks = write_chunks(tmp_path / "data", [[7] * 20, [7] * 20, [10, 7, 7]])
    rewards = torch.cat([chunk["reward"][chunk["task"][:, 0] == 7, 1:] for chunk in chunks])  # [42, 100]
    for wanted in (50, 400, 1050, 10_000):
        source = tdmpc2.Dataset(tmp_path / "data", ("pendulum-swingup",), wanted)
        data, _ = read([source], source.tasks)
        assert source.transitions["pendulum-swingup"] == data.count.item() == min(wanted, 4200)
        assert len(data.rows) == data.count + -(-min(wanted, 4200) // 100)
        found = transitions(data, 0)[2].flatten()
        drawn = [int((rewards[:, 0] == first).nonzero()) for first in found[::100]]
        assert torch.equal(found, rewards[drawn].flatten()[:len(found)])
        count = len(drawn)
        assert all(42 * i // count <= episode < 42 * (i + 1) // count for i, episode in enumerate(drawn))


BAD = {
    "reward": ("no field reward", lambda chunk: chunk.pop("reward")),
    "length": ("100 rows|100, 39", lambda chunk: chunk.update({name: value[:, 1:] for name, value in chunk.items()})),
    "width": ("of shape", lambda chunk: chunk.update(obs=chunk["obs"][..., 1:])),
    "obs": ("observation that is not finite, in row 0 of episode 2", lambda chunk: chunk["obs"][2, 0].fill_(np.nan)),
    "nan": ("reward that is not finite, in row 100 of episode 1", lambda chunk: chunk["reward"][1, 100].fill_(np.nan)),
    "range": (r"outside \[-1, 1\], in row 3 of episode 0", lambda chunk: chunk["action"][0, 3, 5].fill_(-1.01)),
    "task": ("no whole number from 0 to 79, in row 0 of episode 1", lambda chunk: chunk["task"][1].fill_(80)),
    "fraction": ("no whole number .* row 0 of episode 0", lambda chunk: chunk.update(task=chunk["task"] + 0.5)),
    "bool": ("task as .*bool", lambda chunk: chunk.update(task=chunk["task"] > 0)),
    "complex": ("obs as .*complex64", lambda chunk: chunk.update(obs=chunk["obs"].to(torch.complex64))),
    "no tensor": ("obs as TensorDict", lambda chunk: chunk.update(obs=TensorDict({}, batch_size=(3, 101)))),
    "padding": ("pendulum.* after its first 3, in row 0 of episode 2", lambda chunk: chunk["obs"][2, 0, 38].fill_(1)),
    "last padding": ("after its first 5, in row 100 of episode 1", lambda chunk: chunk["obs"][1, 100, 5].fill_(1)),
    "action": ("action .* after its first 1, in row 7 of episode 1", lambda chunk: chunk["action"][1, 7, 1].fill_(1)),
    "none": ("all empty", lambda chunk: chunk.update({name: value[:0] for name, value in chunk.items()})),
    "mixed": ("another task .*, in row 50 of episode 1", lambda chunk: chunk["task"][1, 50:].fill_(8)),
    "short": ("not a file of torch.save's, or cut short", lambda file: file[:-5000]),
    "empty": ("not a file of torch.save's, or cut short", lambda file: b""),
    "text": ("not a file of torch.save's, or cut short", lambda file: b"text"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_with_file_and_place(tmp_path, what):
    chunk, = write_chunks(tmp_path, [[7, 10, 7]])
    path, (message, damage) = tmp_path / "chunk_0.pt", BAD[what]
    if isinstance(damaged := damage(chunk if what not in ("short", "empty", "text") else path.read_bytes()), bytes):
        path.write_bytes(damaged)
    else:
        torch.save(TensorDict(chunk, batch_size=chunk["action"].shape[:2]), path)
    with pytest.raises(harness.UsageError, match=f"{tmp_path}.*({message})"):
        list(tdmpc2.Dataset(tmp_path).read(SIZES))


@pytest.mark.parametrize("held", [{3: torch.zeros(1)}, [1], {name: name for name in tdmpc2.FIELDS}, Path("object")])
def test_files_of_other_things_are_refused_with_what_they_hold(tmp_path, held):
    torch.save(held, tmp_path / "chunk_0.pt")
    with pytest.raises(harness.UsageError, match="chunk_0.pt.*(no field|obs as str|holds a list|holds other things)"):
        tdmpc2.Dataset(tmp_path)


@pytest.mark.parametrize("field", ["obs", "last_obs"])
def test_padding_of_a_run_that_is_not_zero_is_refused(tmp_path, monkeypatch, field):
    write_run(tmp_path / "run")
    episodes = list(RunReplay(tmp_path / "run", None, None).read(SIZES))
    getattr(episodes[0], field)[-1, 3] = 1
    source = SimpleNamespace(rows=300, block=0, nbytes=0, transitions={}, read=lambda own: episodes)
    with pytest.raises(harness.UsageError, match="run has an observation of pendulum-swingup .* after its first 3"):
        read([source], TASKS)


def test_the_memory_said_before_it_is_taken(tmp_path, capsys):
    write_chunks(tmp_path / "data", [[7] * 300] * 2)
    write_run(tmp_path / "run")
    sources = [RunReplay(tmp_path / "run", None, None), tdmpc2.Dataset(tmp_path / "data")]
    data, _ = read(sources, TASKS)
    said, more = re.findall(r": ([\d.]+) GB on cpu, and .* up to ([\d.]+) GB more", capsys.readouterr().out)[0]
    assert float(said) == pytest.approx((data.rows.nbytes + data.place.nbytes) / 1e9, abs=6e-4)
    file = (tmp_path / "data" / "chunk_0.pt").stat().st_size
    assert 1e9 * float(more) > sources[1].nbytes > file + 3 * 300 * 100 * 4 * 47
    assert sources[0].nbytes > 2 * 100 * (4 * 8 + 4) + 100 * 4 * 8  # the ring, and a task's copy


def test_evaluation_repeats_actions():
    for task, steps in (("pendulum-swingup", 500), ("reach", 100)):
        once, twice = brc_sac.suites.make(task, 3), tdmpc2.make(task, 3)
        once.reset()
        twice.reset()
        for step in range(1, steps + 1):
            action = np.full(once.action_space.shape, np.sin(step), np.float32)
            expected = [once.step(action) for _ in range(2)]
            obs, reward, terminated, truncated, _ = twice.step(action)
            np.testing.assert_array_equal(obs, expected[1][0])
            assert reward == pytest.approx(expected[0][1] + expected[1][1])
            assert (terminated, truncated) == (False, step == steps)


def test_the_critic_learns_as_online_and_the_cloning_term_by_hand():
    torch.manual_seed(0)
    agent = brc_sac.Agent(ARGS, 5, 2, 2)
    batch = brc_sac.Batch(torch.randn(32, 5), torch.rand(32, 2) * 2 - 1, torch.randn(32), torch.zeros(32),
                          torch.randn(32, 5), torch.arange(32) % 2)
    noise = torch.randn(2, 32, 2)
    other = copy.deepcopy(agent)
    other.actor_loss = functools.partial(offline.actor_loss, 0.7)
    (online, log_prob), (metrics, other_log_prob) = agent.update(batch, *noise), other.update(batch, *noise)
    assert torch.equal(online["critic_loss"], metrics["critic_loss"]) and torch.equal(log_prob, other_log_prob)
    for name in ("critic", "target"):
        for mine, theirs in zip(getattr(agent, name).parameters(), getattr(other, name).parameters()):
            assert torch.equal(mine, theirs)
    assert not torch.equal(agent.actor.mean.weight, other.actor.mean.weight)

    embedding = agent.critic.embed(batch.task_id).detach()
    mean = agent.actor(batch.obs, embedding)[0].detach().numpy().astype(np.float64)
    by_hand = np.mean(np.sum((np.tanh(mean) - batch.action.numpy()) ** 2, axis=1))
    assert offline.cloning_loss(agent.actor, embedding, batch).item() == pytest.approx(by_hand, rel=1e-6)
    plain = brc_sac.actor_loss(agent.critic, agent.actor, agent.temperature, batch, noise[1])[0]
    both = offline.actor_loss(0.7, agent.critic, agent.actor, agent.temperature, batch, noise[1])[0]
    assert both.item() == pytest.approx(plain.item() + 0.7 * by_hand, rel=1e-5)

    before, losses = copy.deepcopy(agent.critic.state_dict()), [offline.clone(agent, batch) for _ in range(200)]
    assert losses[-1]["cloning_loss"] < 0.8 * losses[0]["cloning_loss"]  # of random actions
    assert all(torch.equal(value, before[name]) for name, value in agent.critic.state_dict().items())


# ----------------------------------------------------------------------------------------------------- whole runs

FLAGS = "--width 16 --batch-size 16 --eval-episodes 1 --device cpu --workers 0 --log-interval 50"


@pytest.fixture
def program(tmp_path, monkeypatch) -> Program:
    monkeypatch.setattr(harness, "PROGRAM", Path("offline.py"))
    return Program(offline, tmp_path)


def test_kill_and_resume(program):
    folder, deadline = program.folder, time.monotonic() + 300
    write_run(folder / "source")
    arguments = f"--data source --updates 90 --eval-interval 60 --checkpoint-interval 10 {FLAGS} --run-dir"
    assert program.run(f"{arguments} whole") == 0, program.err
    process = program.start(f"{arguments} killed")
    while not (folder / "killed" / "checkpoint.previous.pt").exists():
        assert time.monotonic() < deadline, program.err
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert program.wait(process) == -signal.SIGKILL
    assert program.run("--resume killed") == 0, program.err
    states = [torch.load(folder / name / "checkpoint.pt") for name in ("whole", "killed")]
    assert [state["env_step"] for state in states] == [90, 90]
    for part in ("critic", "target", "actor"):
        for name, value in states[0]["agent"][part].items():
            assert torch.equal(value, states[1]["agent"][part][name]), (part, name)
    rows = [[line.split(",", 1)[1] for line in (folder / name / "metrics.csv").read_text().splitlines()]
            for name in ("whole", "killed")]
    assert rows[0] == rows[1] and {row.split(",")[3] for row in rows[0][1:]} == {"60", "90"}

    (folder / "source").rename(folder / "moved")
    assert program.refused("--resume killed").endswith(": if it has moved, give --data beside --resume.")
    write_run(folder / "other", seed=1)
    assert "not the transitions with which" in program.refused("--resume killed --data other --updates 120")
    assert program.run("--evaluate killed --eval-episodes 2") == 0, program.err
    assert "at step 90, 2 episodes" in program.out


def test_published_files_end_to_end(program):
    write_chunks(program.folder / "mt80", [[7, 10], [7]])
    for name, options, count in (("paper", "--max-transitions 150", 250), ("paper-bc", "--bc-only", 300)):
        assert program.run(f"--data mt80 {options} --updates 40 --eval-interval 40 {FLAGS} --run-dir {name}") == 0
        assert f"{count} transitions of 2 tasks: " in program.out
        last = (program.folder / name / "metrics.csv").read_text().splitlines()[-1]
        assert last.startswith(f"offline-pendulum-swingup-cartpole-swingup-{name},mean,0,score,40,")
        assert json.loads((program.folder / name / "args.json").read_text())["action_repeat"] == 2


def test_what_cannot_be_learned_from_is_refused_in_one_sentence(program, monkeypatch):
    write_chunks(program.folder / "mt80", [[7]])
    bad, = write_chunks(program.folder / "bad", [[7]])
    bad["reward"][0, 1] = np.inf
    torch.save(TensorDict(bad, batch_size=(1, 101)), program.folder / "bad" / "chunk_0.pt")
    write_run(program.folder / "source")
    for arguments, reason in (
            ("bad", "chunk_0.pt"), ("source mt80", "cannot be joined"), ("nothing", "neither a run"),
            ("mt80 --tasks reach", "no transitions of reach"), ("mt80 --last 5", "--last is for runs"),
            ("mt80 --bc-only --bc-weight 5", "--bc-weight has no effect with --bc-only")):
        assert reason in program.refused(f"--data {arguments} {FLAGS}")
    monkeypatch.setenv("MUJOCO_GL", "off")  # before anything is created
    for source in ("source", "mt80"):
        assert "can be drawn" in program.refused(f"--data {source} --updates 40 {FLAGS} --capture-video --run-dir run")
        assert not (program.folder / "run").exists()
