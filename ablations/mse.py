"""BRC with a mean squared error in place of the categorical cross-entropy (Figures 3, 4 and 6).

    python ablations/mse.py --suite demo            every argument, output and --resume as of brc_sac.py

Each critic has one output, its value, in place of K logits; the target is the mean of both target critics, as in BRC.
The rewards are still normalised, so that values lie within the v_max of the support that is gone; nothing clips them.
What the paper says of its MSE critics is that they are trained with it; mean and not minimum is our reading.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import brc_sac  # noqa: E402


class MseCritic(brc_sac.Critic):
    """One value [E, B, 1] per critic in place of the logits [E, B, K]."""

    def __init__(self, args: brc_sac.Args, *sizes: int):
        super().__init__(dataclasses.replace(args, num_atoms=1), *sizes)

    def q_values(self, values: Tensor) -> Tensor:
        return values.mean(0).squeeze(-1)  # [B]


def mse_loss(critic: brc_sac.Critic, target: brc_sac.Critic, actor: brc_sac.Actor, temperature: Tensor, gamma: float,
             batch: brc_sac.Batch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of both critics: r + gamma (1 - terminated)(Q' - alpha log pi) is the target."""
    with torch.no_grad():
        next_action, next_log_prob = brc_sac.sample_action(*actor(batch.next_obs, critic.embed(batch.task_id)), noise)
        next_q = target.q_values(target(batch.next_obs, next_action, target.embed(batch.task_id)))  # [B]
        target_q = brc_sac.target_positions(batch, next_log_prob, temperature, next_q.unsqueeze(-1), gamma)  # [B, 1]
    values = critic(batch.obs, batch.action, critic.embed(batch.task_id))  # [E, B, 1]
    loss = (values - target_q).square().mean((1, 2)).sum()
    return loss, {"critic_loss": loss.detach(), "target_q": target_q.mean()}


brc_sac.Critic, brc_sac.critic_loss = MseCritic, mse_loss

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
