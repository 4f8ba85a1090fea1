"""What an evaluation leads to: means over tasks, a table, videos."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import suites

VIDEO_STRIDE = 4  # environment steps per frame


def mean_episode(task: str, episodes: list[tuple[float, float]]) -> dict:
    """Means of `return`, `score` and, where the task defines it, `success` over its (return, success or NaN)."""
    succeeds = not math.isnan(episodes[0][1])
    scores = [suites.score(task, total, success if succeeds else None) for total, success in episodes]
    returns, successes = np.mean(episodes, axis=0).tolist()
    return {"return": returns} | ({"success": successes} if succeeds else {}) | {"score": float(np.mean(scores))}


def mean_result(results: list[dict]) -> dict:
    """Means over tasks of `return`, `success` (over the tasks that define it) and `score`."""
    return {
        metric: float(np.mean([result[metric] for result in results if metric in result]))
        for metric in ("return", "success", "score")
        if any(metric in result for result in results)
    }


def table(tasks: tuple[str, ...], results: list[dict]) -> str:
    """The results of an evaluation as text, a row per task and one for the mean."""
    width = max(len(task) for task in (*tasks, "mean"))
    lines = [f"{'task':<{width}}  {'return':>9}  {'success':>7}  {'score':>6}"]
    for task, result in [*zip(tasks, results, strict=True), ("mean", mean_result(results))]:
        success = f"{result['success']:7.2f}" if "success" in result else " " * 6 + "-"
        lines.append(f"{task:<{width}}  {result['return']:9.1f}  {success}  {result['score']:6.3f}")
    return "\n".join(lines)


def write_videos(tasks: tuple[str, ...], frames: list[list[np.ndarray]], run_dir: Path, env_step: int) -> Iterator[Any]:
    """Writes the frames of each task's episode as a GIF under `run_dir`/videos, and yields it as TensorBoard takes it.

    Raises OSError where the disk fails.
    """
    for task, episode in zip(tasks, frames):
        if episode:
            import imageio.v3 as imageio
            from tensorboard.compat.proto.summary_pb2 import Summary

            path = run_dir / "videos" / f"{task}-{env_step}.gif"
            path.parent.mkdir(exist_ok=True)
            imageio.imwrite(path, np.stack(episode), duration=20 * VIDEO_STRIDE, loop=0)
            image = Summary.Image(colorspace=3, encoded_image_string=path.read_bytes())
            yield Summary(value=[Summary.Value(tag=f"video/{task}", image=image)])
