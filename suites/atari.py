"""Atari 2600 games of the Arcade Learning Environment (Bellemare et al. 2013), set up as Atari-100k is.

26 games to train on (Kaiser et al. 2020) and 20 held out for transfer. The ROMs come with ale-py. 100k steps of the
agent are 400k frames, for each step repeats its action for four of them.

There are two environments here. Agents train on `Games`, ale-py's native one, many games in lockstep. `make` is one
game behind Gymnasium's interface and wrappers: the reference that the tests hold `Games` to.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from suites.base import Seeded, Suite, SuiteError, table

TASKS = (
    "Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout", "ChopperCommand",
    "CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero", "Jamesbond", "Kangaroo", "Krull",
    "KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert", "RoadRunner", "Seaquest", "UpNDown",
)  # fmt: skip
TRANSFER = (
    "Asteroids", "Atlantis", "BeamRider", "Berzerk", "Bowling", "Centipede", "DoubleDunk", "FishingDerby", "Gravitar",
    "IceHockey", "NameThisGame", "Pitfall", "Riverraid", "StarGunner", "TimePilot", "Tutankham", "Venture",
    "VideoPinball", "WizardOfWor", "YarsRevenge",
)  # fmt: skip

SUITES = {"atari": Suite(tasks=TASKS, steps=100_000, pretrain=TASKS, transfer=TRANSFER)}

# A game, and the returns of a random agent and of a human tester, as tabulated in Wang et al. 2016 (dueling networks).
RETURNS = table("""
Alien              227.8    7127.7
Amidar               5.8    1719.5
Assault            222.4     742.0
Asterix            210.0    8503.3
BankHeist           14.2     753.1
BattleZone        2360.0   37187.5
Boxing               0.1      12.1
Breakout             1.7      30.5
ChopperCommand     811.0    7387.8
CrazyClimber     10780.5   35829.4
DemonAttack        152.1    1971.0
Freeway              0.0      29.6
Frostbite           65.2    4334.7
Gopher             257.6    2412.5
Hero              1027.0   30826.4
Jamesbond           29.0     302.8
Kangaroo            52.0    3035.0
Krull             1598.0    2665.5
KungFuMaster       258.5   22736.3
MsPacman           307.3    6951.6
Pong               -20.7      14.6
PrivateEye          24.9   69571.3
Qbert              163.9   13455.0
RoadRunner          11.5    7845.0
Seaquest            68.4   42054.7
UpNDown            533.4   11693.2
Asteroids          719.1   47388.7
Atlantis         12850.0   29028.1
BeamRider          363.9   16926.5
Berzerk            123.7    2630.4
Bowling             23.1     160.7
Centipede         2090.9   12017.0
DoubleDunk         -18.6     -16.4
FishingDerby       -91.7     -38.7
Gravitar           173.0    3351.4
IceHockey          -11.2       0.9
NameThisGame      2292.3    8049.0
Pitfall           -229.4    6463.7
Riverraid         1338.5   17118.0
StarGunner         664.0   10250.0
TimePilot         3568.0    5229.2
Tutankham           11.4     167.6
Venture              0.0    1187.5
VideoPinball         0.0   17667.9
WizardOfWor        563.5    4756.5
YarsRevenge       3092.9   54576.9
""")


def owns(task: str) -> bool:
    return task in RETURNS


def make(task: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """The game by Gymnasium's wrappers: what `Games`, which agents train on, is tested against.

    Observations are uint8 [4, 84, 84], grey frames with the newest last; 18 actions; raw rewards. No sticky actions;
    every action lasts four frames, of which the last two are max-pooled; 1 to 30 no-ops after a reset; an episode is a
    whole game, truncated at 108,000 frames. `info["lives"]` are those left. After a reset the three older frames are
    zero, as in Dopamine. Raises SuiteError if a package is missing.
    """
    try:
        import ale_py
        import cv2  # noqa: F401  AtariPreprocessing imports it at every frame
    except ImportError as error:
        message = f"Task '{task}' needs ale-py and OpenCV ({error}): run pip install -r requirements.txt."
        raise SuiteError(message) from error

    gym.register_envs(ale_py)
    env = gym.make(
        f"ALE/{task}-v5",
        render_mode=render_mode,
        disable_env_checker=True,
        frameskip=1,
        full_action_space=True,
        repeat_action_probability=0.0,
        max_num_frames_per_episode=108_000,
    )
    env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84)
    return Seeded(gym.wrappers.FrameStackObservation(env, stack_size=4, padding_type="zero"), seed)


class Step(NamedTuple):
    """What one step of n games led to."""

    next_obs: np.ndarray  # [n, 4, 84, 84] uint8, the true next observation, also where an episode ended
    reward: np.ndarray  # [n] float32, raw
    terminated: np.ndarray  # [n] bool, the game is over
    truncated: np.ndarray  # [n] bool, a time limit ended the episode
    life_lost: np.ndarray  # [n] bool, a life was lost and the game goes on
    obs: np.ndarray  # [n, 4, 84, 84] uint8, what to act on next: the reset's where an episode ended, next_obs elsewhere


class Games:
    """N games that step together, each in a C++ thread of its own: ale-py's native environment, one instance a game.

        games = Games(("Pong", "Breakout"))
        obs = games.reset(seed=0)             # [2, 4, 84, 84]
        step = games.step(np.array([2, 1]))
        games.step_async(action); ...; step = games.step_wait()

    Frames, rewards, lives and ends equal those of `make`, bit for bit (tests/test_atari_suite.py runs both). They
    differ in the time limit, where Gymnasium counts the no-ops' frames among the 108,000 and this does not, and in the
    no-ops at the start: 1 to 30 frames by Gymnasium, 0 to 29 here, as in the runner that DrQ-eps was released with
    (Dopamine's eval_run_experiment.py of 2021; atari_100k_runner.py of 2023 draws 0 to 29 steps of four frames).
    In both environments, the newest frame of an episode's final observation lacks the emulator's very last frame in its
    maximum, and a lost life ends nothing: Dopamine breaks off the four frames there and has the frame stack, acting and
    stored, start from zeros. Native, because its threads step beside the updates without worker processes, and at no
    lower speed: benchmarks/README.md.

    max_frames: the time limit of an episode. Raises SuiteError if ale-py is missing.
    """

    def __init__(self, tasks: Sequence[str], max_frames: int = 108_000):
        try:
            from ale_py import ALEInterface, AtariVectorEnv, LoggerMode
        except ImportError as error:
            message = f"Task '{tasks[0]}' needs ale-py ({error}): run pip install -r requirements.txt."
            raise SuiteError(message) from error

        ALEInterface.setLoggerMode(LoggerMode.Error)  # no banner for every game
        self.tasks, self.num_envs = tuple(tasks), len(tasks)
        self.envs = [
            AtariVectorEnv(
                re.sub(r"(?<!^)(?=[A-Z])", "_", task).lower(),
                num_envs=1,
                num_threads=1,
                full_action_space=True,
                repeat_action_probability=0.0,
                reward_clipping=False,
                use_fire_reset=False,
                noop_max=30,  # one more than the most that are drawn
                max_num_frames_per_episode=max_frames,
                autoreset_mode="SameStep",  # the true final observation is then in info
            )
            for task in tasks
        ]
        self.lives = np.zeros(self.num_envs, np.int64)

    def reset(self, seed: int) -> np.ndarray:
        """Starts an episode of every game, all seeded from `seed`. Returns obs [N, 4, 84, 84]."""
        seeds = (np.random.SeedSequence(seed).generate_state(self.num_envs) >> 1).tolist()  # 31 bits
        with ThreadPoolExecutor() as pool:  # seeding loads the ROM again: a tenth of a second and more
            starts = list(pool.map(lambda env, env_seed: env.reset(seed=env_seed), self.envs, seeds))
        self.lives[:] = [info["lives"][0] for _, info in starts]
        return np.concatenate([obs for obs, _ in starts])

    def step_async(self, action: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Sends actions [n], integers from 0 to 17, to the games `rows` [n], by default all; their threads step."""
        self.rows = np.arange(self.num_envs) if rows is None else rows
        for row, choice in zip(self.rows, action, strict=True):
            self.envs[row].send(np.array([choice]))

    def step_wait(self) -> Step:
        """What the actions that were sent last led to."""
        results = [self.envs[row].recv() for row in self.rows]
        obs, reward, terminated, truncated = (np.concatenate(column) for column in list(zip(*results, strict=True))[:4])
        over = terminated | truncated
        lives = np.array([info["lives"][0] for *_, info in results])  # the new episode's where one ended
        life_lost = (lives < self.lives[self.rows]) & ~over
        self.lives[self.rows] = lives
        next_obs = obs.copy()
        for n in np.flatnonzero(over):
            next_obs[n] = results[n][-1]["final_obs"][0]
        return Step(next_obs, reward.astype(np.float32), terminated, truncated & ~terminated, life_lost, obs)

    def step(self, action: np.ndarray, rows: np.ndarray | None = None) -> Step:
        """`step_async` and `step_wait`."""
        self.step_async(action, rows)
        return self.step_wait()

    def close(self) -> None:
        """Ends the threads."""
        self.envs = []


def score(task: str, episode_return: float, success: float | None) -> float:
    """The human-normalised score: 0 is a random agent, 1 a human."""
    random, human = RETURNS[task]
    return (episode_return - random) / (human - random)
