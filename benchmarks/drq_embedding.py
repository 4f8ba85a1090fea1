"""Whether brc_drq.py's critic sees its task embedding: how much Q varies with it, at first and after some updates.

    python benchmarks/drq_embedding.py --csv-path benchmarks/results/drq_embedding/small.csv

Of observations of all games, the standard deviation of Q over the embeddings of all tasks, over a shift of the image by
two pixels, over actions and over observations; and the lengths of the embedding and of the normalised features, which
the first dense layer sees side by side.
"""

import csv
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_drq  # noqa: E402


@torch.no_grad()
def spread(agent: brc_drq.Agent, batch: brc_drq.Batch) -> dict[str, float]:
    images = torch.stack([batch.obs, batch.obs.roll(2, -1)])  # [2, B, 4, 84, 84]
    q = torch.stack([torch.stack([agent.q_values(obs, torch.full_like(batch.task_id, task)) for obs in images])
                     for task in agent.task_ids.tolist()])  # [N, 2, B, A]
    features = agent.critic.norm(agent.critic.encoder(batch.obs.float() / 255)).norm(dim=-1).mean()
    sizes = {"features_l2": features, "embedding_l2": agent.critic.embed(agent.task_ids).norm(dim=-1).mean()}
    axes = zip(("sd_tasks", "sd_shift", "sd_actions", "sd_obs"), (0, 1, 3, 2))
    return sizes | {name: q.std(dim).mean() for name, dim in axes}


def main(tasks: tuple[str, ...] = ("Pong", "Breakout", "Freeway"), updates: int = 300, encoder_scale: float = 0.0625,
         csv_path: Path | None = None) -> None:
    rows = []

    def prepare(run, agent, normalizer, buffer):
        def measured(batch):
            step = run.bar.n - run.args.learning_starts
            if step % (updates // 3) == 0 or step == updates - 1:
                numbers = {name: f"{value:.4g}" for name, value in spread(agent, buffer.sample(64)).items()}
                rows.append({"norm": run.args.embedding_norm, "updates": step} | numbers)
                print(rows[-1], flush=True)
            return update(batch)

        update, agent.update = agent.update, measured
        return buffer

    for norm in ("l1", "l2"):
        args = brc_drq.Args(tasks=tasks, small=True, encoder_scale=encoder_scale, total_steps=400 + updates,
                            learning_starts=400, eval_interval=10**6, eval_episodes=1, max_frames=400, device="cpu",
                            learning_rate=1e-3, embedding_norm=norm, exp_name=f"drq-embedding-{norm}")
        brc_drq.train(brc_drq.resolve(args), brc_drq.Start(prepare))
    if csv_path:
        with open(csv_path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    brc_drq.harness.exit_on_error(lambda: tyro.cli(main))
