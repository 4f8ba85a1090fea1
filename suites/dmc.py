"""DeepMind Control Suite (Tassa et al. 2018): all stock tasks, and eleven custom ones of TD-MPC2 (Hansen et al. 2024).

A task is named `domain-task` in dm_control's own words: `walker-walk`, `ball_in_cup-catch`, `cheetah-run_backwards`.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np

from suites.base import Camera, Suite, SuiteError

EPISODE_STEPS = 1000

# The tasks of dm_control 1.0.28, written out so that a name can be checked without importing the simulator.
STOCK = {
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse two_poles three_poles",
    "cheetah": "run",
    "dog": "stand walk trot run fetch",
    "finger": "spin turn_easy turn_hard",
    "fish": "upright swim",
    "hopper": "stand hop",
    "humanoid": "stand walk run run_pure_state",
    "humanoid_CMU": "stand walk run",
    "lqr": "lqr_2_1 lqr_6_2",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "walk run escape fetch",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "stand walk run",
}
# Custom tasks and the stock task of the same domain that each one alters.
CUSTOM = {
    "walker-walk_backwards": "walk",
    "walker-run_backwards": "run",
    "cheetah-run_backwards": "run",
    "cheetah-run_front": "run",
    "cheetah-run_back": "run",
    "cheetah-jump": "run",
    "reacher-three_easy": "easy",
    "reacher-three_hard": "hard",
    "pendulum-spin": "swingup",
    "ball_in_cup-spin": "catch",
    "hopper-hop_backwards": "hop",
}
TASKS = frozenset(f"{domain}-{task}" for domain, tasks in STOCK.items() for task in tasks.split()) | CUSTOM.keys()

TASKS_30 = (
    "walker-stand", "walker-walk", "walker-run", "walker-walk_backwards", "walker-run_backwards",
    "cheetah-run", "cheetah-run_backwards", "cheetah-run_front", "cheetah-run_back", "cheetah-jump",
    "reacher-easy", "reacher-hard", "reacher-three_easy", "reacher-three_hard",
    "acrobot-swingup", "pendulum-swingup", "pendulum-spin",
    "cartpole-balance", "cartpole-balance_sparse", "cartpole-swingup", "cartpole-swingup_sparse",
    "ball_in_cup-catch", "ball_in_cup-spin", "finger-spin", "finger-turn_easy", "finger-turn_hard", "fish-swim",
    "hopper-stand", "hopper-hop", "hopper-hop_backwards",
)  # fmt: skip

SUITES = {
    "dmc-dogs": Suite(tasks=("dog-stand", "dog-walk", "dog-trot", "dog-run"), steps=500_000),
    "dmc-humanoids": Suite(tasks=("humanoid-stand", "humanoid-walk", "humanoid-run"), steps=500_000),
}


def owns(task: str) -> bool:
    return task in TASKS


def make(task: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """The environment of one task; its episodes are truncated after 1000 steps.

    Observation (O,): the task's observation dictionary, flattened in its own order. Action (A,): -1 and 1 are the
    limits of each actuator. Raises SuiteError when dm_control is missing.
    """
    env = DMControl(_load(task, seed), render_mode)
    # The stock time limits all come to 1000 control steps, but lqr has none.
    return gym.wrappers.TimeLimit(env, EPISODE_STEPS)


def score(task: str, episode_return: float, success: float | None) -> float:
    """Return / 1000: a step's reward is at most 1."""
    return episode_return / EPISODE_STEPS


class DMControl(gym.Env):
    """A dm_control environment behind Gymnasium's interface."""

    def __init__(self, env: Any, render_mode: str | None = None):
        self.dm_env = env
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / env.control_timestep())}
        # Not dm_control's own renderer: it settles on a GL backend, display or none, when dm_control is imported.
        self._camera = Camera(env.physics.model.ptr, env.physics.data.ptr, camera=0)
        size = sum(int(np.prod(spec.shape)) for spec in env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        spec = env.action_spec()
        self.action_space = gym.spaces.Box(-1.0, 1.0, spec.shape, np.float32)
        # Actuators range over [-1, 1] but for quadruped's, and lqr's, which have no limits (1e10) and are left as is.
        limited = env.physics.model.actuator_ctrllimited.astype(bool)
        self._center = np.where(limited, (spec.maximum + spec.minimum) / 2, 0.0)
        self._half_range = np.where(limited, (spec.maximum - spec.minimum) / 2, 1.0)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.dm_env.task.random.seed(seed)
        return self._flatten(self.dm_env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        # Out-of-range actions are clipped on purpose: MuJoCo clips what reaches the actuators, but some rewards charge
        # for the control as it was given.
        timestep = self.dm_env.step(self._center + self._half_range * np.clip(action, -1.0, 1.0))
        terminated = timestep.last() and timestep.discount == 0.0
        truncated = timestep.last() and not terminated
        return self._flatten(timestep.observation), float(timestep.reward), terminated, truncated, {}

    def render(self) -> np.ndarray:
        """A frame (480, 480, 3), uint8, of the domain's first camera."""
        return self._camera.frame()

    def close(self) -> None:
        self._camera.close()
        self.dm_env.close()

    @staticmethod
    def _flatten(observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)


def _load(task: str, seed: int) -> Any:
    """The dm_control environment of a stock or custom task."""
    try:
        with warnings.catch_warnings():
            # dm_control looks for a display when it is imported, which nothing needs before a frame is rendered.
            warnings.filterwarnings("ignore", message=".*DISPLAY environment variable is missing")
            from dm_control import suite
    except ImportError as error:
        raise SuiteError(f"Task '{task}' needs dm_control ({error}): run pip install -r requirements.txt.") from error

    domain, name = task.split("-")
    if domain == "quadruped":
        if not hasattr(np, "in1d"):
            np.in1d = np.isin  # removed in numpy 2.4; quadruped still calls it
        # At its reset, escape would open a GL context, only to show its new terrain. Frames keep showing the first one.
        suite.quadruped.Physics.contexts = None
    if task.startswith("reacher-three_"):
        env = _three_link_reacher(target_size=0.05 if name == "three_easy" else 0.015, seed=seed)
    else:
        env = suite.load(domain, CUSTOM.get(task, name), task_kwargs={"random": seed})
    # A custom task is the stock one with its reward, and for one its start, replaced on the instance.
    if task in REWARDS:
        env.task.get_reward = REWARDS[task]
    if task == "ball_in_cup-spin":
        env.task.initialize_episode = partial(_start_ball_in_cup_spin, env.task)
    return env


# ---------------------------------------------------------------------------- custom tasks (TD-MPC2)
def _gaussian(x: float, lower: float, upper: float, margin: float) -> float:
    """1 within the bounds, falling off as a Gaussian to 0.1 at `margin` outside them."""
    from dm_control.utils import rewards

    return rewards.tolerance(x, bounds=(lower, upper), margin=margin)


def _linear(x: float, lower: float, upper: float, margin: float, value_at_margin: float = 0.0) -> float:
    """1 within the bounds, falling off linearly to `value_at_margin` at `margin` outside them; 0 further out."""
    from dm_control.utils import rewards

    return rewards.tolerance(
        x, bounds=(lower, upper), margin=margin, sigmoid="linear", value_at_margin=value_at_margin
    )


def _walker_backwards(physics: Any, speed: float) -> float:
    upright = (1 + physics.torso_upright()) / 2
    stand = (3 * _gaussian(physics.torso_height(), 1.2, np.inf, margin=0.6) + upright) / 4
    move = _linear(physics.horizontal_velocity(), -np.inf, -speed, margin=speed / 2, value_at_margin=0.5)
    return stand * (5 * move + 1) / 6


def _cheetah_run_backwards(physics: Any) -> float:
    return _linear(physics.speed(), -np.inf, -8, margin=8)


def _cheetah_run_raised(physics: Any, foot: str) -> float:
    """Run with the torso and one foot up: on the other leg."""
    foot_up, torso_up = (
        _gaussian(physics.named.data.xpos[body, "z"], 1.2, np.inf, margin=0.6) for body in (foot, "torso")
    )
    return (3 * foot_up + 2 * torso_up) / 5 * (5 * _linear(physics.speed(), 6, np.inf, margin=6) + 1) / 6


def _cheetah_jump(physics: Any) -> float:
    torso, front, back = physics.named.data.xpos[["torso", "ffoot", "bfoot"], "z"]
    still = _linear(physics.speed(), -0.5, 0.5, margin=0.5)
    return sum((5 * _gaussian((torso + foot) / 2, 1.2, np.inf, margin=0.6) + still) / 6 for foot in (front, back)) / 2


def _hopper_hop_backwards(physics: Any) -> float:
    stand = _gaussian(physics.height(), 0.6, 2, margin=0)
    return stand * _linear(physics.speed(), -np.inf, -1, margin=0.5, value_at_margin=0.5)


def _pendulum_spin(physics: Any) -> float:
    return _linear(abs(physics.angular_velocity()[0]), 9, np.inf, margin=4.5, value_at_margin=0.5)


def _ball_in_cup_spin(physics: Any) -> float:
    distance = np.linalg.norm(physics.ball_to_target())
    speed = np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]])
    far = _linear(distance, 0.5, np.inf, margin=0.25, value_at_margin=0.5)
    fast = _linear(speed, 6, np.inf, margin=3, value_at_margin=0.5)
    return (1 - physics.in_target()) * (far + 2 * fast) / 3


def _start_ball_in_cup_spin(task: Any, physics: Any) -> None:
    """Place the ball at random, free of contact; 9 times in 10 it has to be in the cup."""
    anywhere = task.random.uniform() < 0.1
    while True:
        physics.named.data.qpos["ball_x"] = task.random.uniform(-0.2, 0.2)
        physics.named.data.qpos["ball_z"] = task.random.uniform(0.2, 0.5)
        physics.after_reset()  # contacts and site positions of this state
        if physics.data.ncon == 0 and (anywhere or physics.in_target()):
            return


def _three_link_reacher(target_size: float, seed: int) -> Any:
    """The stock reacher with an arm of three links: 0.09, 0.09 and the hand's 0.1; observation (8,), action (3,).

    target_size is the target's radius in metres.
    """
    from dm_control.rl import control
    from dm_control.suite import common, reacher

    model = ElementTree.fromstring(common.read_model("reacher.xml"))
    link0 = model.find(".//body[@name='arm']")
    hand = link0.find("body")
    link0.find("geom").set("fromto", "0 0 0 0.09 0 0")
    hand.set("pos", "0.09 0 0")
    hand.find("joint").set("range", "-80 80")
    hand.find("body").set("pos", "0.09 0 0")

    # The new link is a copy of the first, put between it and the hand.
    link0.remove(hand)
    link1 = copy.deepcopy(link0)
    link1.set("pos", "0.09 0 0")
    link1.find("joint").attrib.update(limited="true", range="-80 80")
    for index, link in enumerate((link0, link1)):
        link.set("name", f"arm{index}")
        link.find("geom").set("name", f"arm{index}")
        link.find("joint").set("name", f"shoulder{index}")
    link1.append(hand)
    link0.append(link1)

    actuator = model.find("actuator")
    actuator.clear()
    for joint in ("shoulder0", "shoulder1", "wrist"):
        ElementTree.SubElement(actuator, "motor", name=joint, joint=joint)

    physics = reacher.Physics.from_xml_string(ElementTree.tostring(model), common.ASSETS)
    task = reacher.Reacher(target_size=target_size, random=seed)
    return control.Environment(physics, task, time_limit=20)


REWARDS: dict[str, Callable[[Any], float]] = {
    "walker-walk_backwards": partial(_walker_backwards, speed=1),
    "walker-run_backwards": partial(_walker_backwards, speed=8),
    "cheetah-run_backwards": _cheetah_run_backwards,
    "cheetah-run_front": partial(_cheetah_run_raised, foot="bfoot"),
    "cheetah-run_back": partial(_cheetah_run_raised, foot="ffoot"),
    "cheetah-jump": _cheetah_jump,
    "hopper-hop_backwards": _hopper_hop_backwards,
    "pendulum-spin": _pendulum_spin,
    "ball_in_cup-spin": _ball_in_cup_spin,
}
