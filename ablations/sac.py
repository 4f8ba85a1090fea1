"""Plain SAC (Haarnoja et al. 2018), the baseline of Figure 1: one task per run, or several told apart by a one-hot.

    python ablations/sac.py --tasks reach           single-task SAC
    python ablations/sac.py --suite demo            the same network on all tasks; the figure's is mh_sac.py

Two critics and an actor of two dense layers of 256 units (with the suite demo an actor of its 128), mean squared error,
the minimum of both critics in the target and in the actor's loss, raw rewards, no weight decay. What is neither network
nor loss stays BRC's, so that it cannot be what makes the difference: updates per step, batch, step sizes, initial
temperature, target entropy, orthogonal initial weights. The one-hot in place of the embedding is that of Meta-World's
multi-task SAC (Yu et al. 2019).
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch.nn.functional as F  # noqa: E402

import brc_sac  # noqa: E402
from ablations import mlp, mse_raw  # noqa: E402, F401  mse_raw's critic on mlp's, its loss and its normaliser

resolve_brc = brc_sac.resolve


@dataclasses.dataclass(frozen=True)
class Args(brc_sac.Args):
    width: int | None = 256
    """Critic width H in units."""
    actor_depth: int = 2
    """Dense layers of the actor."""
    weight_decay: float = 0.0
    """Decoupled, on every parameter of critic and actor."""


class SacCritic(brc_sac.Critic):
    def q_values(self, values):
        return values.amin(0).squeeze(-1)  # [E, B, 1] -> [B]


class SacActor(brc_sac.Actor):
    Body = mlp.MLP


def one_hot(num_tasks, dim, norm):
    return lambda task_id: F.one_hot(task_id, num_tasks).float()  # [B] -> [B, N]


def resolve(args):  # with an embedding as long as the one-hot
    args = resolve_brc(args)
    return dataclasses.replace(args, embedding_dim=len(args.tasks))


brc_sac.Critic, brc_sac.Actor, brc_sac.TaskEmbedding = SacCritic, SacActor, one_hot
brc_sac.Args, brc_sac.resolve = Args, resolve

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
