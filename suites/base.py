"""What the benchmark files share."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np


@dataclass(frozen=True)
class Suite:
    """A named collection of tasks, as the paper trains on it."""

    tasks: tuple[str, ...]
    steps: int  # environment steps per task
    pretrain: tuple[str, ...] = ()
    transfer: tuple[str, ...] = ()


class UsageError(ValueError):
    """Input that cannot be used; its message is one sentence for the user."""


class SuiteError(UsageError):
    """A task or suite that cannot be used."""


def table(text: str) -> dict[str, tuple[float, float]]:
    """A row per line of `text`: a task name and two numbers."""
    rows = [line.split() for line in text.strip().splitlines()]
    return {task: (float(first), float(second)) for task, first, second in rows}


class Seeded(gym.Wrapper):
    """Seeds the first reset with `seed`, unless that reset is given another, to fix all episodes from the start."""

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        self._seed = seed

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        seed = self._seed if seed is None else seed
        self._seed = None
        return self.env.reset(seed=seed, options=options)


def missing_file(model: Path) -> Path | None:
    """The first file that the MJCF file `model` needs, itself included, and that does not exist; None if all do.

    Reads the XML only, in milliseconds; compiling a model takes up to a second.
    """
    # MuJoCo resolves every path, those in included files too, relative to the folder of the main file.
    folder, pending, assets, compiler = model.parent, [model], [], {}
    while pending:
        xml = pending.pop()
        if not xml.is_file():
            return xml
        for element in ElementTree.parse(xml).iter():
            if element.tag == "compiler":
                compiler.update(element.attrib)
            elif element.tag == "include":
                pending.append(folder / element.attrib["file"])
            elif "file" in element.attrib:
                assets.append(element)
    for element in assets:
        directory = "texturedir" if element.tag == "texture" else "meshdir"
        path = folder / compiler.get(directory, compiler.get("assetdir", "")) / element.attrib["file"]
        if not path.is_file():
            return path
    return None


class Camera:
    """RGB frames of a MuJoCo simulation. Its GL context is opened at the first frame, in the process that asks for it.

    model, data: mujoco's own. camera: an id, or -1 for a free camera that sees the whole scene. Where there is no
    display, EGL is chosen, unless the environment variable MUJOCO_GL says otherwise.
    """

    def __init__(self, model: Any, data: Any, camera: int):
        self.model, self.data, self.camera = model, data, camera
        self.viewer: Any = None

    def frame(self) -> np.ndarray:
        """(480, 480, 3) uint8."""
        if self.viewer is None:
            if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                os.environ.setdefault("MUJOCO_GL", "egl")
            import mujoco
            from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer

            try:
                self.viewer = OffScreenViewer(self.model, self.data, 480, 480)
            except Exception as error:  # each backend raises what it likes
                raise SuiteError(
                    f"No frame could be rendered ({error}): set MUJOCO_GL to egl, osmesa or glfw, whichever works here."
                ) from error
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self.viewer.scn.flags[flag] = False  # five sixths of a frame's time, where a CPU draws
        self.viewer.make_context_current()  # each environment of a process has a context of its own
        return np.ascontiguousarray(self.viewer.render("rgb_array", camera_id=self.camera))

    def close(self) -> None:
        if self.viewer is not None:
            self.viewer.close()
            self.viewer = None
