"""Rotating an object in a Shadow Hand to a goal orientation (geometry-dex, Huang et al. 2021), a task per object.

The models are not on PyPI: `dex_envs/assets` of github.com/huangwl18/geometry-dex, or of
github.com/naumix/BiggerRegularizedCategorical, holds them. Say where that folder is, with
--assets or

    export SHADOWHAND_ASSETS=<clone>/dex_envs/assets

The environment follows the original, which builds on gymnasium-robotics, and needs mujoco only.
"""

import os
from pathlib import Path

import gymnasium as gym
import numpy as np

from suites.base import Camera, Seeded, Suite, SuiteError, missing_file

EPISODE_STEPS = 100

TASKS = tuple(
    f"sh-{name}"
    for name in """
    e_toy_airplane knife flat_screwdriver elephant apple scissors i_cups cup foam_brick pudding_box wristwatch padlock
    power_drill binoculars b_lego_duplo ps_controller mouse hammer f_lego_duplo piggy_bank can extra_large_clamp peach
    a_lego_duplo racquetball tuna_fish_can a_cups pan strawberry d_toy_airplane wood_block small_marker sugar_box ball
    torus i_toy_airplane chain j_cups c_toy_airplane airplane nine_hole_peg_test water_bottle c_cups medium_clamp
    large_marker h_cups b_colored_wood_blocks j_lego_duplo f_toy_airplane toothbrush tennis_ball mug sponge k_lego_duplo
    phillips_screwdriver f_cups c_lego_duplo d_marbles d_cups camera d_lego_duplo golf_ball k_toy_airplane b_cups
    softball wine_glass chips_can cube master_chef_can alarm_clock gelatin_box h_lego_duplo baseball light_bulb banana
    rubber_duck headphones i_lego_duplo b_toy_airplane pitcher_base j_toy_airplane g_lego_duplo cracker_box orange
    e_cups
    """.split()
)
TRANSFER = tuple(
    f"sh-{name}"
    for name in """
    rubiks_cube dice bleach_cleanser pear e_lego_duplo pyramid stapler flashlight large_clamp a_toy_airplane
    tomato_soup_can fork cell_phone m_lego_duplo toothpaste flute stanford_bunny a_marbles potted_meat_can timer lemon
    utah_teapot train g_cups l_lego_duplo bowl door_knob mustard_bottle plum
    """.split()
)

SUITES = {"sh": Suite(tasks=TASKS, steps=1_000_000, pretrain=TASKS, transfer=TRANSFER)}


def owns(task: str) -> bool:
    return task in TASKS or task in TRANSFER


def check(tasks: tuple[str, ...]) -> None:
    """Raises SuiteError if SHADOWHAND_ASSETS is not the assets folder, or lacks a file that one of the tasks needs."""
    for task in tasks:
        _model_path(task)


def make(task: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """The task: observations float32 [68], actions [20]; truncated after 100 steps, of 0.04 s; `info["success"]`.

    Raises SuiteError if SHADOWHAND_ASSETS is not the assets folder, or if a file that the task needs is missing.
    """
    model_path = _model_path(task)
    try:
        import mujoco  # noqa: F401
    except ImportError as error:
        raise SuiteError(f"Task '{task}' needs mujoco ({error}): run pip install -r requirements.txt.") from error
    return Seeded(gym.wrappers.TimeLimit(ShadowHand(model_path, render_mode), EPISODE_STEPS), seed)


def score(task: str, episode_return: float, success: float | None) -> float:
    """Success: 1 if the object was in its goal orientation at any step of the episode."""
    return float(success)


def _model_path(task: str) -> Path:
    assets = os.environ.get("SHADOWHAND_ASSETS")
    where = "set it, or --assets, to the folder dex_envs/assets of a clone of github.com/huangwl18/geometry-dex"
    if not assets:
        raise SuiteError(f"The ShadowHand models are needed for {task}, and SHADOWHAND_ASSETS is not set: {where}.")
    model = Path(assets, "hand", f"manipulate_{task.removeprefix('sh-')}.xml")
    if not model.parent.is_dir():
        raise SuiteError(f"SHADOWHAND_ASSETS={assets} has no folder 'hand', so {task} cannot be made: {where}.")
    if missing := missing_file(model):
        raise SuiteError(
            f"The ShadowHand assets lack {missing.resolve()}, which {task} needs: "
            f"copy the file from a complete clone, or use --tasks to leave {task} out."
        )
    return model


def _z_rotation(angle: float) -> np.ndarray:
    """The unit quaternion (w, x, y, z) of a rotation by `angle` radians about the z axis."""
    return np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)])


class ShadowHand(gym.Env):
    """An object lies in the palm; success is to hold it within 0.1 rad of a goal orientation, wherever it is.

    Observation, float32 [68]: positions of the hand's 24 joints [rad] and their velocities [rad/s]; the object's linear
    [m/s] and angular [rad/s] velocity, 6; its position [m] and quaternion, 7; the goal's position and quaternion, 7.
    Action [20]: targets of the position actuators, -1 and 1 being the ends of their ranges. Reward: success - 1.
    Random numbers of a reset, from Gymnasium's `np_random` (PCG64): the object's angle, uniform, and its displacement,
    normal, both again while the object does not stay in the palm; then the goal's angle, uniform.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    SUBSTEPS = 20  # of 0.002 s
    SETTLE_STEPS = 10
    SUCCESS_ANGLE = 0.1  # rad
    FALLEN_HEIGHT = 0.04  # m

    def __init__(self, model_path: Path, render_mode: str | None = None):
        import mujoco

        self.render_mode = render_mode
        self._mujoco = mujoco
        self.model = mujoco.MjModel.from_xml_path(str(model_path))
        self.data = mujoco.MjData(self.model)
        self.model.stat.extent = 0.5  # metres that the camera sees; the floor would make it two
        self._camera = Camera(self.model, self.data, camera=-1)

        joints = [self.model.joint(i) for i in range(self.model.njnt)]
        hand = [joint for joint in joints if joint.name.startswith("robot0:")]
        self._hand_qpos = np.concatenate([joint.qposadr for joint in hand])
        self._hand_qvel = np.concatenate([joint.dofadr for joint in hand])
        joint = self.model.joint("object:joint")
        self._object_qpos = slice(joint.qposadr[0], joint.qposadr[0] + 7)
        self._object_qvel = slice(joint.dofadr[0], joint.dofadr[0] + 6)
        low, high = self.model.actuator_ctrlrange.T
        self._ctrl_center, self._ctrl_half_range = (high + low) / 2, (high - low) / 2

        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (len(hand) * 2 + 6 + 7 + 7,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.model.nu,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        while not self._place_object():
            pass
        position = self.data.qpos[self._object_qpos][:3]
        self.goal = np.concatenate([position, _z_rotation(self.np_random.uniform(-np.pi, np.pi))])
        return self._obs(), {}

    def step(self, action: np.ndarray):
        self.data.ctrl[:] = self._ctrl_center + np.clip(action, -1.0, 1.0) * self._ctrl_half_range
        self._mujoco.mj_step(self.model, self.data, self.SUBSTEPS)
        # The angle between the quaternions. One and its negative are the same orientation, but here 2 pi apart, as in
        # the original: taking the absolute value would change the task.
        quaternion = self.data.qpos[self._object_qpos][3:]
        angle = 2 * np.arccos(np.clip(quaternion @ self.goal[3:], -1.0, 1.0))
        success = float(angle < self.SUCCESS_ANGLE)
        return self._obs(), success - 1.0, False, False, {"success": success}

    def render(self) -> np.ndarray:
        """A frame (480, 480, 3), uint8, of the hand."""
        return self._camera.frame()

    def close(self) -> None:
        self._camera.close()

    def _place_object(self) -> bool:
        """Drops the object into the palm, turned and displaced at random. Returns whether it stays there."""
        mujoco, model, data = self._mujoco, self.model, self.data
        mujoco.mj_resetData(model, data)
        # Twice, as in the original's first reset: each pass improves the contact solver's warm start, and in the last
        # digits the episode depends on it.
        mujoco.mj_forward(model, data)
        mujoco.mj_forward(model, data)
        position, quaternion = data.qpos[self._object_qpos][:3], data.qpos[self._object_qpos][3:]
        turned = np.empty(4)
        mujoco.mju_mulQuat(turned, quaternion, _z_rotation(self.np_random.uniform(-np.pi, np.pi)))
        position += self.np_random.normal(scale=0.005, size=3)
        quaternion[:] = turned / np.linalg.norm(turned)
        data.ctrl[:] = self._ctrl_center
        for _ in range(self.SETTLE_STEPS):
            mujoco.mj_step(model, data, self.SUBSTEPS)
        mujoco.mj_forward(model, data)
        return data.site("object:center").xpos[2] > self.FALLEN_HEIGHT

    def _obs(self) -> np.ndarray:
        qpos, qvel = self.data.qpos, self.data.qvel
        hand = qpos[self._hand_qpos], qvel[self._hand_qvel]
        object_ = qvel[self._object_qvel], qpos[self._object_qpos]
        return np.concatenate([*hand, *object_, self.goal]).astype(np.float32)
