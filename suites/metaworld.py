"""MetaWorld (Yu et al. 2019), version 3: 50 manipulation tasks of one robot arm.

What it calls a goal are the places of the objects and of where they have to go. Ours are fresh: drawn at every reset.
MetaWorld itself draws one when an environment is made and keeps it, and so do the authors: goals="frozen".
"""

from typing import Any

import gymnasium as gym
import numpy as np

from suites.base import Camera, Suite, SuiteError

EPISODE_STEPS = 200
GOALS = ("fresh", "frozen")

TASKS = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press-topdown", "button-press-topdown-wall",
    "button-press", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble",
    "door-close", "door-lock", "door-open", "door-unlock", "hand-insert", "drawer-close", "drawer-open",
    "faucet-open", "faucet-close", "hammer", "handle-press-side", "handle-press", "handle-pull-side", "handle-pull",
    "lever-pull", "pick-place-wall", "pick-out-of-hole", "pick-place", "plate-slide", "plate-slide-side",
    "plate-slide-back", "plate-slide-back-side", "peg-insert-side", "peg-unplug-side", "soccer", "stick-push",
    "stick-pull", "push", "push-wall", "push-back", "reach", "reach-wall", "shelf-place", "sweep-into", "sweep",
    "window-open", "window-close",
)  # fmt: skip
TRANSFER = ("assembly", "disassemble", "dial-turn", "lever-pull", "push-back")

SUITES = {
    "mw": Suite(
        tasks=TASKS,
        steps=500_000,
        pretrain=tuple(task for task in TASKS if task not in TRANSFER),
        transfer=TRANSFER,
    ),
    # What a newcomer runs first, on a laptop's CPU in minutes: three of the easiest.
    "demo": Suite(tasks=("drawer-close", "button-press", "door-close"), steps=16_000),
}


def owns(task: str) -> bool:
    return task in TASKS


def make(task: str, seed: int, render_mode: str | None = None, goals: str = "fresh") -> gym.Env:
    """The environment of one task; it never terminates, its episodes are truncated after 200 steps.

    Observation (39,): hand, gripper and objects now and one step before, then the goal. Action (4,): the hand's
    motion, of at most 1 cm along each axis, and the gripper's effort. goals: "fresh" draws one at every reset; "frozen"
    keeps the one that MetaWorld draws from `seed`, which no later seed changes. Raises SuiteError when metaworld is
    missing.
    """
    if goals not in GOALS:
        raise ValueError(f"goals is '{goals}', which is none of {', '.join(GOALS)}.")
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    except ImportError as error:
        raise SuiteError(f"Task '{task}' needs metaworld ({error}): run pip install -r requirements.txt.") from error

    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=seed, render_mode=render_mode)
    return gym.wrappers.TimeLimit(MetaWorld(env, goals), EPISODE_STEPS)


def score(task: str, episode_return: float, success: float | None) -> float:
    """Success: 1 if the task was solved at any step of the episode."""
    return float(success)


class MetaWorld(gym.Wrapper):
    """A MetaWorld task with float32 observations, whose goals depend on its seed only."""

    def __init__(self, env: Any, goals: str):
        super().__init__(env)
        env._freeze_rand_vec = goals == "frozen"
        env.seeded_rand_vec = True  # fresh goals are not drawn from the global np.random
        self._camera = Camera(env.model, env.data, camera=env.model.camera("corner2").id)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.env.seed(seed)  # its reset ignores the seed it is given
        obs, _ = self.env.reset()
        return obs.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        # Out-of-range actions are clipped on purpose, here for every task alike: MetaWorld clips the hand's motion, but
        # leaves the gripper's effort to MuJoCo and to what each reward makes of it.
        obs, reward, _, _, info = self.env.step(np.clip(action, -1.0, 1.0))
        return obs.astype(np.float32), float(reward), False, False, {"success": float(info["success"])}

    def render(self) -> np.ndarray:
        """A frame (480, 480, 3), uint8, from the corner."""
        return self._camera.frame()[::-1, ::-1].copy()  # the corner cameras hang upside down

    def close(self) -> None:
        self._camera.close()
        self.env.close()
