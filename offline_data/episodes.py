"""What a reader of transitions yields."""

from pathlib import Path
from typing import Any, NamedTuple

from suites.base import UsageError


class Episodes(NamedTuple):
    """E episodes of one task with T transitions in all, one after another: tensors on the host."""

    path: Path  # where they are from, for messages
    task: str
    obs: Any  # [T, O]
    action: Any  # [T, A]
    reward: Any  # [T]
    terminated: Any  # [T], 1.0 where the episode ended in a terminal state
    last_obs: Any  # [E, O], what each episode's last transition led to
    lengths: Any  # [E] transitions
    whole: Any  # [E], False where the episode had begun before or went on after


def fit(episodes: Episodes, own: tuple[int, int], widths: tuple[int, int]) -> Episodes:
    """Observations and actions padded with zeros to `widths`, or without the padding beyond.

    own: the task's sizes of both. Raises UsageError for data that are not of these.
    """
    from torch.nn.functional import pad

    found = episodes.obs.shape[1], episodes.action.shape[1]
    if found[0] < own[0] or found[1] < own[1]:
        raise UsageError(
            f"{episodes.path} has {found[0]} numbers in an observation of {episodes.task} and {found[1]} in an action: "
            f"these are not of that task, which has {own[0]} and {own[1]}."
        )
    if episodes.obs[:, own[0] :].any() or episodes.last_obs[:, own[0] :].any():
        raise UsageError(
            f"{episodes.path} has an observation of {episodes.task} with other numbers than 0 after its first "
            f"{own[0]}, which are all that the task has: leave the task out, or give data of this version of it."
        )
    obs, last_obs = (pad(values, (0, widths[0] - found[0])) for values in (episodes.obs, episodes.last_obs))
    return episodes._replace(obs=obs, last_obs=last_obs, action=pad(episodes.action, (0, widths[1] - found[1])))
