"""HumanoidBench (Sferrazza et al. 2024): the Unitree H1 humanoid, alone (h1-*) or with two Shadow Hands (h1hand-*).

It is not on PyPI, and a plain install ships no models, so it is installed from a clone:

    git clone https://github.com/carlosferrazza/humanoid-bench && pip install --no-deps -e humanoid-bench

`--no-deps` because it pins old versions that it does not need; requirements.txt suffices. Written against its commit
791405f. A control step is 0.02 s. Falling terminates an episode; 1,000 steps truncate it, 500 in insert_*, basketball
and push. The package is used as it is: spoon's stirring phase and truck's lists of packages even outlive a reset.
"""

import contextlib
import functools
import importlib.util
import io
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np

from suites.base import Camera, Seeded, Suite, SuiteError, missing_file, table

INSTALL = "git clone https://github.com/carlosferrazza/humanoid-bench && pip install --no-deps -e humanoid-bench"

# A task, the return of a random agent, and the target above which HumanoidBench counts the task as solved.
RETURNS = table("""
h1-walk                     2.377     700.0
h1-stand                   10.545     800.0
h1-run                       2.02     700.0
h1-stair                    3.112     700.0
h1-crawl                  272.658     700.0
h1-pole                     20.09     700.0
h1-slide                    3.191     700.0
h1-hurdle                   2.214     700.0
h1-maze                   106.441    1200.0
h1hand-walk                 2.505     700.0
h1hand-stand               11.973     800.0
h1hand-run                  1.927     700.0
h1hand-stair                3.161     700.0
h1hand-crawl              278.868     800.0
h1hand-pole                19.721     700.0
h1hand-slide                3.142     700.0
h1hand-hurdle               2.371     700.0
h1hand-maze               106.233    1200.0
h1hand-sit_simple          10.768     750.0
h1hand-sit_hard             2.477     750.0
h1hand-balance_simple       10.17     800.0
h1hand-balance_hard        10.032     800.0
h1hand-reach              -50.024   12000.0
h1hand-spoon                4.661     650.0
h1hand-window               2.713     650.0
h1hand-insert_small         1.653     350.0
h1hand-insert_normal        1.673     350.0
h1hand-bookshelf_simple    16.777    2000.0
h1hand-bookshelf_hard      14.848    2000.0
h1hand-truck              562.419    3000.0
h1hand-powerlift           17.638     800.0
h1hand-room                 3.018     400.0
h1hand-door                 2.771     600.0
h1hand-basketball           8.979    1200.0
h1hand-push                -526.8     700.0
h1hand-cabinet             37.733    2500.0
""")

H1 = tuple(f"h1-{name}" for name in "walk stand run stair crawl pole slide hurdle maze".split())
H1HAND = tuple(
    f"h1hand-{name}"
    for name in """
    walk stand run stair crawl pole slide hurdle maze sit_simple sit_hard balance_simple balance_hard reach spoon window
    insert_small insert_normal bookshelf_simple bookshelf_hard
    """.split()
)

SUITES = {
    "hb-medium": Suite(
        tasks=H1,
        steps=1_000_000,
        pretrain=("h1-walk", "h1-stand", "h1-stair", "h1-crawl", "h1-pole", "h1-slide"),
        transfer=("h1-run", "h1-hurdle", "h1-maze"),
    ),
    "hb-hard": Suite(
        tasks=H1HAND,
        steps=2_000_000,
        pretrain=H1HAND,
        transfer=tuple(f"h1hand-{name}" for name in "truck powerlift room door basketball push cabinet".split()),
    ),
}


def owns(task: str) -> bool:
    return task in RETURNS


def check(tasks: tuple[str, ...]) -> None:
    """Raises SuiteError if HumanoidBench is not installed, or if a file that one of the tasks needs is missing."""
    spec = importlib.util.find_spec("humanoid_bench")
    if spec is None or not spec.submodule_search_locations:
        raise SuiteError(f"HumanoidBench is not installed and {tasks[0]} needs it: run `{INSTALL}`.")
    for task in tasks:
        robot, name = task.split("-")
        model = Path(spec.submodule_search_locations[0], "assets", "envs", f"{robot}_pos_{name}.xml")
        if missing := missing_file(model):
            raise SuiteError(
                f"HumanoidBench's installation lacks {missing.resolve()}, which {task} needs: "
                f"install it from a complete clone, `{INSTALL}`, or use --tasks without {task}."
            )


def make(task: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """The task: observation float32 [51] for h1-*, [151] to [308] for h1hand-*; action [19] or [61], clipped to ±1.

    `info["success"]` exists in bookshelf_*, truck, basketball, push and cabinet. Raises SuiteError if HumanoidBench or
    one of its files is missing.
    """
    check((task,))
    _register()
    # It prints a remark about bookshelf_*, once per environment.
    with contextlib.redirect_stdout(io.StringIO()):
        # Given a render mode here, it would open a GL context at once.
        env = gym.make(f"{task}-v0", render_mode=None, disable_env_checker=True)
    env.unwrapped.render_mode = render_mode
    return Seeded(HumanoidBench(env), seed)


def score(task: str, episode_return: float, success: float | None) -> float:
    """(return - random) / (target - random): 0 is a random agent, 1 a solved task."""
    random, target = RETURNS[task]
    return (episode_return - random) / (target - random)


@functools.cache
def _register() -> None:
    """Imports humanoid_bench, which registers its environments, so that it works with current versions."""
    # It imports these two names for hierarchical policies only, from a module that needs jax.
    stub = types.ModuleType("humanoid_bench.mjx.flax_to_torch")
    stub.TorchModel = stub.TorchPolicy = None
    sys.modules.setdefault(stub.__name__, stub)

    try:
        import mujoco
        from humanoid_bench.dmc_deps import dmc_sizes
    except ImportError as error:
        message = f"HumanoidBench could not be imported ({error}): run pip install -r requirements.txt."
        raise SuiteError(message) from error

    # Its list of mujoco's fields is of an older version: drop those that are gone.
    for struct, fields in (("mjmodel", mujoco.MjModel), ("mjdata", mujoco.MjData)):
        sizes = dmc_sizes.array_sizes[struct]
        for name in [name for name in sizes if not hasattr(fields, name)]:
            del sizes[name]


class HumanoidBench(gym.Wrapper):
    """Float32 spaces, clipped actions, success as a float, lazy rendering, and random numbers of its own.

    `reset(seed)` of the wrapped environment seeds the noise of the joints alone. Several tasks also draw from numpy's
    global generator, which everything in the process shares. Here each environment owns a generator, seeded as
    `np.random.seed(seed)` would, and puts it in the global one's place while it resets or steps: episodes depend on the
    seed only, not on what else runs in the process. Not for threads, which would meet each other's generators.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self._bit_generator = np.random.MT19937()
        # The environment's own render() passes arguments that gymnasium's renderer no longer takes.
        renderer = env.unwrapped.mujoco_renderer
        self._camera = Camera(renderer.model, renderer.data, camera=renderer.camera_id)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self._bit_generator.state = np.random.RandomState(seed).get_state(legacy=False)
        with self._own_random_numbers():
            obs, info = self.env.reset(seed=seed, options=options)
        return obs.astype(np.float32), info

    def step(self, action: np.ndarray):
        with self._own_random_numbers():
            obs, reward, terminated, truncated, info = self.env.step(np.clip(action, -1.0, 1.0))
        if "success" in info:
            info["success"] = float(info["success"])
        return obs.astype(np.float32), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray:
        """A frame (480, 480, 3), uint8, from the camera that the task chose."""
        return self._camera.frame()

    def close(self) -> None:
        self._camera.close()
        self.env.close()

    @contextlib.contextmanager
    def _own_random_numbers(self):
        # Exchanging the generators takes under a microsecond; copying their states in and out would take a hundred, and
        # gain only that the global one kept the second of a pair of normal draws.
        shared = np.random.get_bit_generator()
        np.random.set_bit_generator(self._bit_generator)
        try:
            yield
        finally:
            np.random.set_bit_generator(shared)
