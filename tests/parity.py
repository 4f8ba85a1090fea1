"""Compares the agent of brc_sac.py with reference vectors of the authors' JAX code, number for number.

    python -m tests.parity tests/reference/multitask.npz
    python -m tests.parity tests/reference/*.npz
    python -m tests.parity --compile --precision bf16 tests/reference/multitask.npz
    python -m tests.parity --device cuda --precision tf32 tests/reference/multitask.npz

A file holds inputs (parameters, a batch, noise) and every number that the authors' code made of them. Here the agent's
own functions, the ones that training calls, get the same inputs; what they compute on the way is recorded and compared.
Three kinds of file are told apart by their keys; sizes and seeds are read from the file:

    updates     consecutive updates of a whole agent, single-task or multi-task     multitask.npz, singletask.npz
    units       AdamW, temperature, LayerNorm, embedding and projection on edge cases           units.npz
    normalizer  traces of the return normaliser                                            normalizer.npz

Prints a row per quantity. `max abs error` is over all entries and `max rel` that over the largest reference entry;
`tolerance` is that of the worst entry, the one that uses most of its own, and `used` the share that it uses. Exits 1 if
any row is out, 2 with one sentence if a file cannot be read.

Every entry has its own tolerance: what float32 leaves undetermined, on any processor, see RandomRounding. So an entry
that is known to seven digits is held to seven digits, next to one that is the rest of a cancellation. A compiled
update, or one on a GPU, is held to the same in what can be seen from outside; one in bf16 or tf32 to LOW_PRECISION.

Adam's first steps are nearly sign(gradient): m / (sqrt(v) + 1e-8) turns the rounding of a gradient that is little else
than rounding into a step of any size up to the learning rate, in either direction. Therefore an update is compared in
two parts: the agent's gradients with the file's, and then its optimisers' steps, which start from the file's
gradients. `official_after2` is the whole: two updates without that, whose tolerances come from such updates too.
"""

import argparse
import copy
import functools
import inspect
import re
import sys
import zipfile
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Callable, Iterable, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import brc_sac
import devices
from harness import UsageError

STEPS = ["critic", "Polyak", "actor", "temperature", "end"]  # of an update, in this order
ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-4}
OPTIMIZERS = {"critic AdamW": ADAMW, "actor AdamW": ADAMW,
              "temperature Adam": ADAMW | {"beta1": 0.5, "weight_decay": 0.0}}
# How far an update whose matrix products are rounded to 8 or 11 bits may be off: L2 error over L2 norm of each tensor,
# of gradients and their norm, and of all else (losses, log-probabilities). The vectors' networks are small: hard.
# On an H200 in tf32 a gradient is off by 0.045, and by the same to three digits on a CPU whose products' inputs are
# rounded to 11 bits: it is that rounding and nothing else. bf16 is for the critics' bodies, tf32 for every product.
LOW_PRECISION = {"bf16": (0.2, 0.01), "tf32": (0.1, 0.00125)}


def release(**changes) -> brc_sac.Args:
    """The agent's own defaults in the release's variant, from whose code the vectors come, but for the changes."""
    return replace(brc_sac.resolve(brc_sac.Args(variant="release")), **changes)


# ---------------------------------------------------------------------------------------------------- files and rows


class Vectors:
    """The arrays of one file; remembers which were read, so that none is left out unnoticed."""

    def __init__(self, path: str):
        self.path, self.read = path, set()
        try:
            with np.load(path, allow_pickle=False) as file:
                self.arrays = {name: file[name] for name in file.files}
        except FileNotFoundError:
            raise UsageError(f"There is no file {path}: give an .npz file of reference vectors.") from None
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
            raise UsageError(f"{path} cannot be read as an .npz archive of plain arrays.") from None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise UsageError(f"{self.path} is not in the format of the reference vectors: it lacks '{name}'.")
        self.read.add(name)
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        return torch.tensor(self[name])

    def names(self, prefix: str) -> list[str]:
        """The names under `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.arrays if name.startswith(prefix)]


class Row(NamedTuple):
    name: str
    abs_error: float
    rel_error: float
    tolerance: float
    used: float  # share of its tolerance that the worst entry uses
    ok: bool


def compare(name: str, value, reference, tolerance) -> Row:
    """One row of the table; `tolerance` is one number or one per entry."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape or reference.size == 0:
        shapes = f"shape {list(value.shape)}, in the file {list(reference.shape)}"
        return Row(f"{name} {shapes}", np.inf, np.inf, 0.0, np.inf, False)
    with np.errstate(invalid="ignore"):
        error = np.abs(value - reference)
    same = (value == reference) | (np.isnan(value) & np.isnan(reference))  # infinities too
    error = np.where(same, 0.0, np.nan_to_num(error, nan=np.inf))
    tolerance = np.broadcast_to(tolerance, error.shape)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        used = np.where(error > 0, error / tolerance, 0.0)
    worst = np.argmax(used) if used.any() else np.argmax(tolerance)
    scale = np.abs(reference[np.isfinite(reference)]).max(initial=0.0) or np.nan  # no share of a reference of zeros
    ok = bool((error <= tolerance).all())
    return Row(name, error.max(), error.max() / scale, tolerance.flat[worst], used.flat[worst], ok)


# -------------------------------------------------------------------------------------------------------- tolerances

RUNS = 32  # random roundings per computation

# Operations that move, select or compare numbers; all others round their result, and sums their terms as well.
EXACT = set("cat stack index index_put_ gather clone copy_ _to_copy detach neg abs sign clamp floor relu "
            "threshold_backward zeros zeros_like new_zeros ones ones_like empty new_empty fill_ zero_ min max".split())
MATMULS = set("mm addmm mv".split())
SUMS = MATMULS | set("sum mean native_layer_norm native_layer_norm_backward index_put embedding_dense_backward "
                     "_softmax_backward_data _log_softmax_backward_data".split())
ARITHMETIC = set("add sub rsub mul div sqrt".split())  # rounded to half a last bit, by every machine
IN_PLACE = re.compile("_fused_adam|_foreach_|lerp_|mul_|add_|addc")  # steps of optimisers, Polyak


class RandomRounding(TorchDispatchMode):
    """Moves the result of every floating-point operation, forward and backward, by about five last bits of float32.

    Two correct programs differ by their roundings, and so do two runs under this mode (Monte Carlo arithmetic, Parker
    1997). Kernels round one last bit, or sqrt(terms) / 3 of them where they add terms one after the other. The rest is
    room, and it is in the runs, not in a factor on their spread: where a ReLU or AdamW answers a small change with a
    large one, a spread at the kernels' own scale does not tell what a change a few times as large does, and those
    happen. Runs at five times that scale have made them.
    """

    LAST_BITS = 5 * 2.0**-24
    STEP = 1.5e-5  # of an optimiser's step: the authors' Adam forms 1 - 0.999^t in float32, off by 2e-5 of itself

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        if name in EXACT or function.is_view:
            return function(*args, **kwargs)
        if IN_PLACE.match(name):
            written = [tensor for argument, value in zip(function._schema.arguments, args)
                       if argument.alias_info and argument.alias_info.is_write for tensor in tree_leaves(value)]
            before = [tensor.clone() for tensor in written]
            output = function(*args, **kwargs)
            step = self.STEP * torch.randn((), generator=self.generator)  # the same for all entries, as 1 - 0.999^t is
            for tensor, old in zip(written, before):
                tensor.copy_(self.round(tensor + step * (tensor - old)))
            return output
        if name in SUMS:
            terms = args[-2].shape[-1] if name in MATMULS else 1
            args = [self.round(x, max(1.0, terms**0.5 / 3)) for x in args]
        output, bits = function(*args, **kwargs), 0.5 if name in ARITHMETIC else 1.0
        return self.round(output, bits) if isinstance(output, Tensor) else tree_map(self.round, output)

    def round(self, x, bits: float = 1.0):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.addcmul(x, x, torch.randn(x.shape, generator=self.generator), value=bits * self.LAST_BITS)


def numbers(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().double().cpu().numpy() for name, value in values.items()}


def measure(observe: Callable[[], dict[str, Tensor]]) -> tuple[dict, dict]:
    """What `observe` computes, by name, and the tolerance of every entry: how far random roundings move it.

    That is twice their standard deviation, ten of a kernel's, or more than the largest of them where a few are large.
    """
    values, variance, largest = numbers(observe()), defaultdict(float), defaultdict(float)
    for seed in range(RUNS):
        with RandomRounding(seed):
            run = numbers(observe())
        for name, value in run.items():
            with np.errstate(invalid="ignore"):
                change = np.nan_to_num(np.abs(value - values[name]))
            variance[name] += change**2 / RUNS
            largest[name] = np.maximum(largest[name], change)
    last_bit = {name: np.nan_to_num(np.spacing(np.abs(value).astype(np.float32))) for name, value in values.items()}
    spread = {name: np.maximum(2 * variance[name] ** 0.5, 1.2 * largest[name]) for name in values}
    return values, {name: spread[name] + last_bit[name] for name in values}


# ------------------------------------------------------------------------------------------- parameters by their names


def reference_name(name: str) -> str:
    """The file's name of a parameter: critic.members.0.0.blocks.1.ln2.weight -> critic.0.block2.ln2.scale."""
    name = re.sub(r"members\.(\d)\.0\.", r"\1.", name)
    name = re.sub(r"members\.(\d)\.1\.", r"\1.out.", name)
    name = re.sub(r"blocks\.(\d+)", lambda match: f"block{int(match[1]) + 1}", name).replace("body.", "")
    name = re.sub(r"(ln\d)\.weight", r"\1.scale", name.replace("embedding.weight", "embedding"))
    return name.replace(".weight", ".kernel")


def as_reference(name: str, x: Tensor) -> Tensor:
    """A parameter or its gradient as the file has it: kernels are [in, out] there, torch's weights [out, in]."""
    return (x.T if name.endswith("kernel") else x).detach()


def named_parameters(agent: brc_sac.Agent) -> dict[str, torch.nn.Parameter]:
    """The agent's parameters by the file's names."""
    parameters = {reference_name(f"{prefix}.{name}"): parameter for prefix in ("critic", "target", "actor")
                  for name, parameter in getattr(agent, prefix).named_parameters()}
    return parameters | {"log_temp": agent.log_temperature}


def fresh_agent(vectors: Vectors, device: str = "cpu", precision: str = "fp32", compile: bool = False) -> brc_sac.Agent:
    """An agent of the file's sizes, freshly initialised; whatever is not a size has the agent's own default."""
    init = vectors.names("init/")
    tasks = vectors["init/critic.embedding"].shape if "critic.embedding" in init else (1, 32)
    depth = {net: sum(name.startswith(f"{net}.block") and name.endswith("dense1.bias") for name in init)
             for net in ("critic.0", "actor")}
    args = release(
        width=len(vectors["init/critic.0.dense0.bias"]), critic_depth=depth["critic.0"],
        actor_width=len(vectors["init/actor.dense0.bias"]), actor_depth=depth["actor"], embedding_dim=tasks[1],
        batch_size=vectors["batch/observations"].shape[1], num_atoms=len(vectors["init/critic.0.out.bias"]),
        v_max=float(vectors["cfg/v_max"]), precision=precision, compile=compile)
    torch.manual_seed(0)
    sizes = vectors["batch/observations"].shape[-1], vectors["batch/actions"].shape[-1], tasks[0]
    return brc_sac.Agent(args, *sizes, device=device)


def load_parameters(agent: brc_sac.Agent, vectors: Vectors) -> None:
    """Starts `agent` from the file's init/*."""
    for name, parameter in named_parameters(agent).items():
        value, slot = vectors.tensor(f"init/{name}"), as_reference(name, parameter)
        if value.shape != slot.shape:
            raise UsageError(f"{vectors.path} is not in the format of the reference vectors: 'init/{name}' has shape "
                              f"{list(value.shape)} where its other sizes give {list(slot.shape)}.")
        slot.copy_(value)


# --------------------------------------------------------------------------------------------------------- recording


class Call(NamedTuple):
    """One call of a function or network: its arguments, its result, and the torch operations inside."""

    inputs: dict[str, Tensor]
    output: Tensor
    operations: list[tuple[str, tuple, Tensor]]  # name, arguments, result

    def operation(self, name: str) -> tuple[tuple, Tensor]:
        """Arguments and result of the first operation of this name."""
        return next((args, result) for other, args, result in self.operations if other == name)


class Operations(TorchFunctionMode):
    """Lists the torch operations that run under it."""

    def __enter__(self):
        self.operations = []
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function.__name__, args, result))
        return result


@contextmanager
def recorded(agent: brc_sac.Agent):
    """Yields the calls that the agent makes of its functions and networks: a list per name, in order."""
    calls: dict[str, list[Call]] = defaultdict(list)

    def recorder(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            with Operations() as mode:
                output = function(*args, **kwargs)
            inputs = inspect.signature(function).bind(*args, **kwargs).arguments
            calls[name].append(Call(inputs, output, mode.operations))
            return output
        return call

    with ExitStack() as stack:
        for name in ("sample_action", "target_positions", "project_categorical"):
            stack.enter_context(mock.patch.object(brc_sac, name, recorder(name, getattr(brc_sac, name))))
        q_values = recorder("q_values", brc_sac.Critic.q_values)
        stack.enter_context(mock.patch.object(brc_sac.Critic, "q_values", q_values))
        for name, network in (("critic", agent.critic), ("target", agent.target), ("actor", agent.actor),
                              ("actor.body", agent.actor.body)):
            hook = network.register_forward_hook(
                lambda module, args, output, name=name: calls[name].append(Call({"x": args[0]}, output, [])))
            stack.callback(hook.remove)
        yield calls


# -------------------------------------------------------------------------------------------------- kind 1: updates


def read_batch(vectors: Vectors, u: int) -> tuple[brc_sac.Batch, Tensor, Tensor]:
    """What update u = 0, 1, ... takes: its batch, whose rewards are normalised already, and both noises."""
    fields = ("observations", "actions", "rewards", "masks", "next_observations", "task_ids")
    obs, action, reward, mask, next_obs, task_id = (vectors.tensor(f"batch/{name}")[u] for name in fields)
    batch = brc_sac.Batch(obs, action, reward, 1 - mask, next_obs, task_id.long())
    return batch, vectors.tensor(f"u{u + 1}/noise_critic"), vectors.tensor(f"u{u + 1}/noise_actor")


def observe_policy(agent: brc_sac.Agent, vectors: Vectors, batch: brc_sac.Batch, prefix: str, noise: list
                   ) -> dict[str, Tensor]:
    """The policy before an update, and its samples from the file's own mean and log_std."""
    with recorded(agent) as calls, torch.no_grad():
        mean, log_std = agent.actor(batch.obs, agent.critic.embed(batch.task_id))
        brc_sac.sample_action(mean, log_std, torch.zeros_like(mean))
        std = calls["sample_action"].pop().operation("exp")[1]
        values = {"policy_old_emb/mean": mean, "policy_old_emb/log_std": log_std, "policy_old_emb/std": std}
        # Once more alone (*), from the file's mean and log_std: without their rounding it is held to its last digits.
        for name, x in zip(("next", "actor"), noise):
            brc_sac.sample_action(vectors.tensor(f"{prefix}{name}/mean"), vectors.tensor(f"{prefix}{name}/log_std"), x)
            sample = calls["sample_action"].pop()
            values |= {f"{name}/pre_tanh*": sample.operation("tanh")[0][0], f"{name}/actions*": sample.output[0],
                       f"{name}/log_probs*": sample.output[1]}
    return values


def observe_update(agent: brc_sac.Agent, vectors: Vectors, u: int) -> dict[str, Tensor]:
    """Every number of the file's update u, as the agent's own update computes it."""
    (batch, *noise), prefix = read_batch(vectors, u), f"u{u + 1}/"
    outside_only = agent.args.precision != "fp32" or agent.args.compile or agent.device.type != "cpu"
    parameters = named_parameters(agent)
    values = {} if outside_only else observe_policy(agent, vectors, batch, prefix, noise)
    old_target, order = copy.deepcopy(agent.target.state_dict()), []

    def note(step: str) -> None:
        if "Polyak" not in order and any((x != old_target[key]).any() for key, x in agent.target.state_dict().items()):
            order.append("Polyak")
        order.append(step)

    def before_step(optimizer, name: str) -> None:
        note(name)
        group = [p for group in optimizer.param_groups for p in group["params"]]
        if name != "temperature":  # which has no norms in the file
            values[f"{name}_gnorm"] = torch.nn.utils.get_total_norm([p.grad for p in group])
            values[f"{name}_pnorm"] = torch.nn.utils.get_total_norm([p.detach() for p in group])
        for key, parameter in parameters.items():
            if any(parameter is p for p in group):
                gradient = as_reference(key, parameter.grad)
                values[f"grad/{key}"] = gradient.clone()
                gradient.copy_(vectors.tensor(f"{prefix}grad/{key}"))

    with ExitStack() as stack:
        for name in ("critic", "actor", "temperature"):
            hook = getattr(agent, f"{name}_optimizer").register_step_pre_hook(
                lambda optimizer, args, kwargs, name=name: before_step(optimizer, name))
            stack.callback(hook.remove)
        calls = stack.enter_context(nullcontext() if outside_only else recorded(agent))
        with nullcontext() if outside_only else Operations() as mode:
            metrics, log_prob = agent.update(batch, *noise)

    note("end")
    values["order of the steps"] = torch.tensor([STEPS.index(step) for step in order])
    values |= {f"new/{key}": as_reference(key, parameter).clone() for key, parameter in parameters.items()}
    values |= {
        "critic_loss": metrics["critic_loss"], "q_mean": metrics["target_q"], "actor_loss": metrics["actor_loss"],
        "entropy": metrics["entropy"], "actor/log_probs": log_prob, "temperature_old": metrics["temperature"],
        "temp_loss": metrics["temperature_loss"]}
    if outside_only:
        return values
    for name, sample, net_input, net_output in zip(("next", "actor"), calls["sample_action"], calls["actor.body"],
                                                   calls["actor"]):
        values |= {
            f"{name}/{'actor_input' if name == 'next' else 'input'}": net_input.inputs["x"],
            f"{name}/mean": net_output.output[0], f"{name}/log_std": net_output.output[1],
            f"{name}/std": sample.operation("exp")[1], f"{name}/pre_tanh": sample.operation("tanh")[0][0],
            f"{name}/actions": sample.output[0], f"{name}/log_probs": sample.output[1]}
    (projection,), (positions,) = calls["project_categorical"], calls["target_positions"]
    weighted = next(result for name, args, result in mode.operations
                    if "mul" in name and args[0] is projection.output and args[1] is agent.critic.atoms)
    target_q = next(result for name, args, result in mode.operations if "sum" in name and args[0] is weighted)
    return values | {
        "next/target_logits": calls["target"][0].output, "next/probs": projection.inputs["probs"],
        "target/bin_values_unclipped": positions.output,
        "target/bin_values_clipped": projection.operation("clamp")[1],
        "target/probs": projection.output, "target/q": target_q,
        "q_min": target_q.min(), "q_max": target_q.max(), "critic_logits": calls["critic"][0].output,
        "actor/q_logits": calls["critic"][1].output, "actor/q_values": calls["q_values"][0].output}


def rounded(atoms: Tensor) -> Tensor:
    """The same, but under RandomRounding, where linspace rounds every atom by about a last bit of the largest."""
    return atoms + atoms[-1] * (torch.ones_like(atoms) * 1 - 1)


def check_updates(vectors: Vectors, precision: str = "fp32", compile: bool = False, device: str = "cpu") -> list[Row]:
    agent = fresh_agent(vectors)
    rows = check_initialisers(vectors, agent)
    load_parameters(agent, vectors)
    rows += check_settings(vectors, agent)
    updates = range(len(vectors["batch/observations"]))

    def observe(agent: brc_sac.Agent = agent) -> dict[str, Tensor]:
        learner = copy.deepcopy(agent)
        learner.critic.atoms = rounded(agent.critic.atoms)
        values = {"eval/actions_temperature0": learner.act(vectors.tensor("eval/observations"), None)}
        for u in updates:
            values |= {f"u{u + 1}/{name}": value for name, value in observe_update(learner, vectors, u).items()}
        if agent.args.precision == "fp32":
            learner = copy.deepcopy(agent)
            learner.critic.atoms = rounded(agent.critic.atoms)
            for u in updates:
                learner.update(*read_batch(vectors, u))
            values |= {f"official_after2/{key}": as_reference(key, x) for key, x in named_parameters(learner).items()}
        return values

    values, tolerance = measure(observe)
    if (compile, precision, device) != (False, "fp32", "cpu"):
        with torch.device(device):  # where Vectors.tensor then makes its tensors
            fast = fresh_agent(vectors, device, precision=precision, compile=compile)
            load_parameters(fast, vectors)
            values = numbers(observe(fast))
    for u in updates:
        order = values.pop(f"u{u + 1}/order of the steps")
        rows.append(compare(f"u{u + 1}/order of the steps", order, np.arange(len(STEPS)), 0.0))
    for name, value in values.items():
        allowed, reference = tolerance[name], vectors[name.rstrip("*")]
        if precision != "fp32" and "/new/" not in name:
            size, error = np.linalg.norm(reference), np.linalg.norm(value - reference)
            share = LOW_PRECISION[precision]["/grad/" not in name and "gnorm" not in name]
            rows.append(compare(f"{name}, L2 error", error, 0.0, allowed.max() + share * size))
            continue
        if name.endswith("norm"):  # only the release adds up all parameters in float32
            network = agent.critic if "critic" in name else agent.actor
            allowed = (100 + count(network.parameters()) ** 0.5) * 2.0**-24 * reference
        rows.append(compare(name, value, reference, allowed))
    return rows


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def check_settings(vectors: Vectors, agent: brc_sac.Agent) -> list[Row]:
    """The file's cfg/* and the constants of the authors' optimisers, against the agent's."""
    masks, task_ids = vectors["batch/masks"], vectors["batch/task_ids"]
    optimizers = {name: getattr(agent, f"{name}_optimizer").param_groups for name in ("critic", "actor", "temperature")}
    settings = {
        "discount": agent.args.gamma, "tau": agent.args.tau, "target_entropy": agent.target_entropy,
        "num_bins": len(agent.critic.atoms), "v_max": agent.critic.atoms[-1].item(),
        "num_tasks": agent.num_tasks, "act_dim": agent.sizes[1],
        "obs_dim": vectors["batch/next_observations"].shape[-1],
        "width_critic": agent.critic.members[0][0].dense0.out_features,
        "width_actor": agent.actor.body.dense0.out_features, "batch": len(masks[0]),
        "actor_lr": optimizers["actor"][0]["lr"], "critic_lr": optimizers["critic"][0]["lr"],
        "temp_lr": optimizers["temperature"][0]["lr"]}
    rows = [compare(f"cfg/{name}", value, vectors[f"cfg/{name}"], 1e-6 * abs(vectors[f"cfg/{name}"]))
            for name, value in settings.items()]
    for name, constants in OPTIMIZERS.items():
        network, held = name.split()[0], 0
        for group in optimizers[network]:
            given = {"beta1": group["betas"][0], "beta2": group["betas"][1], **group}
            held += count(group["params"])
            rows += [compare(f"{name} {key}", given[key], value, 1e-6 * value) for key, value in constants.items()]
        if network != "temperature":  # every parameter of the network, without a mask
            rows.append(compare(f"{name} parameters", held, count(getattr(agent, network).parameters()), 0.0))
    norms = [module.eps for network in (agent.critic, agent.target, agent.actor) for module in network.modules()
             if isinstance(module, torch.nn.LayerNorm)]
    rows.append(compare("LayerNorm eps", norms, np.full(len(norms), 1e-6), 1e-12))
    # Inputs that must be exact: a mask is 0 or 1, a task is one of the file's.
    rows.append(compare("batch/masks are 0 or 1", masks, masks.round().clip(0, 1), 0.0))
    return rows + [compare("batch/task_ids are tasks", task_ids, task_ids.clip(0, agent.num_tasks - 1), 0.0)]


def check_initialisers(vectors: Vectors, agent: brc_sac.Agent) -> list[Row]:
    """The statistics of the release's initial values and of a fresh agent's."""
    fresh = {name: as_reference(name, parameter).numpy() for name, parameter in named_parameters(agent).items()}
    pristine = {name: vectors[f"pristine/{name}"] for name in fresh if not name.startswith(("target.", "log_temp"))}
    rows = []
    for source, parameters in (("pristine", pristine), ("fresh agent", fresh)):
        for name, x in parameters.items():
            if name.endswith("kernel"):  # W W^T = gain^2 I along the smaller side
                gain = 1.0 if name == "actor.log_std.kernel" else 2**0.5
                w = (x if x.shape[0] <= x.shape[1] else x.T).astype(np.float64) / gain
                tolerance = 1.5e-6 * max(1.0, len(w) / 128) ** 0.5  # float32 QR: 0.9e-6 at width 128 or 512
                rows.append(compare(f"{source}/{name} orthogonality", w @ w.T, np.eye(len(w)), tolerance))
            elif name.endswith(("bias", "scale")):
                rows.append(compare(f"{source}/{name}", x, np.full_like(x, name.endswith("scale")), 0.0))
            elif name == "critic.embedding":  # N(0, 1/dim), whatever the number of tasks
                rows.append(check_normal(f"{source}/{name}", x))
        different = not np.array_equal(parameters["critic.0.dense0.kernel"], parameters["critic.1.dense0.kernel"])
        rows.append(compare(f"{source}/critic members differ", different, True, 0.0))
    rows += [compare(f"fresh agent/{name} = critic", x, fresh[name.replace("target.", "critic.")], 0.0)
             for name, x in fresh.items() if name.startswith("target.")]
    rows.append(compare("fresh agent/temperature", agent.temperature.item(), 0.1, 1e-7))
    if agent.num_tasks > 1:  # a table long enough to tell the standard deviation to 1 %
        many = brc_sac.TaskEmbedding(4096, agent.args.embedding_dim, "l2").weight.detach().numpy()
        rows.append(check_normal("fresh embedding of 4096 tasks", many))
    return rows


def check_normal(name: str, table: np.ndarray) -> Row:
    """Mean and standard deviation of an embedding table [N, dim], in units of 1/sqrt(dim), to 5 standard errors."""
    x = table * table.shape[1] ** 0.5
    return compare(f"{name} mean, std", [x.mean(), x.std()], [0.0, 1.0], 5 / x.size**0.5)


# ---------------------------------------------------------------------------------------------------- kind 2: units


def trace(parameter: torch.nn.Parameter, optimizer, losses: Iterable[Callable[[], Tensor]]) -> tuple[Tensor, Tensor]:
    """A step for each loss; returns the losses, and the parameter after each step."""
    values, steps = [], []
    for loss in losses:
        values.append(loss())
        brc_sac.optimize(optimizer, values[-1])
        steps.append(parameter.detach().clone())
    return torch.stack(values).detach(), torch.stack(steps)


def observe_units(vectors: Vectors, atoms: Tensor, cases: list[str]) -> dict[str, Tensor]:
    """Adam on scripted entropies and gradients; a layer norm, an embedding and a projection on edge cases."""
    alpha, target_entropy = torch.nn.Parameter(vectors.tensor("temp/log_temp0")), float(vectors["temp/target_entropy"])
    adam = brc_sac.make_adamw([alpha], release(), beta1=0.5, decays=False)
    losses, log_temps = trace(alpha, adam, [functools.partial(brc_sac.temperature_loss, alpha, entropy, target_entropy)
                                            for entropy in vectors.tensor("temp/entropies")])
    norm = brc_sac.layer_norm(vectors["layernorm/x"].shape[-1])
    embedding = brc_sac.TaskEmbedding(*vectors["embedding/table"].shape, "l2")
    for parameter, name in ((norm.weight, "layernorm/scale"), (norm.bias, "layernorm/bias"),
                            (embedding.weight, "embedding/table")):
        parameter.data.copy_(vectors.tensor(name))
    values = {"temp/losses": losses, "temp/log_temps": log_temps, "layernorm/y": norm(vectors.tensor("layernorm/x")),
              "embedding/out": embedding(vectors.tensor("embedding/ids").long())}
    probs = vectors.tensor("projection/next_probs")
    batch = brc_sac.Batch(obs=None, action=None, reward=vectors.tensor("projection/rewards"),
                          terminated=1 - vectors.tensor("projection/masks"), next_obs=None, task_id=None)
    positions = brc_sac.target_positions(batch, vectors.tensor("projection/log_probs"),
                                         vectors.tensor("projection/temperature"), atoms, release().gamma)
    values["projection/target_probs"] = brc_sac.project_categorical(probs, positions, atoms)
    for case in cases:
        parameter = torch.nn.Parameter(vectors.tensor(f"{case}/param0"))
        adamw = brc_sac.make_adamw([parameter], release(learning_rate=float(vectors[f"{case}/lr"])))
        values[f"{case}/params"] = trace(parameter, adamw, [lambda x=gradient: (parameter * x).sum()
                                                            for gradient in vectors.tensor(f"{case}/grads")])[1]
    return values


def check_units(vectors: Vectors) -> list[Row]:
    cases = sorted({name.split("/")[0] for name in vectors.arrays if name.endswith("/param0")})
    v_max = float(vectors["projection/v_max"])
    args = release(width=1, num_atoms=len(vectors["projection/bins"]), v_max=v_max)
    atoms = brc_sac.Critic(args, obs_dim=1, act_dim=1, num_embeddings=0).atoms
    values, tolerance = measure(lambda: observe_units(vectors, rounded(atoms), cases))
    for case in cases:
        steps = 1 + np.arange(len(vectors[f"{case}/grads"]))[:, None]
        # torch multiplies by 1 - lr weight_decay, which in float32 is off by up to a last bit in every step.
        tolerance[f"{case}/params"] += steps * np.spacing(np.abs(vectors[f"{case}/param0"]))
    rows = [compare(name, value, vectors[name], tolerance[name]) for name, value in values.items()]
    rows.append(compare("projection/bins", atoms, vectors["projection/bins"], 3e-7 * v_max))
    rows.append(compare("projection/discount", release().gamma, vectors["projection/discount"], 1e-6))
    masks = vectors["projection/masks"]
    return rows + [compare("projection/masks are 0 or 1", masks, masks.round().clip(0, 1), 0.0)]


# ----------------------------------------------------------------------------------------------- kind 3: normalizer


def observe_normalizer(vectors: Vectors) -> dict[str, Tensor]:
    rewards, act_dim = vectors["rewards"], int(vectors["act_dim"])
    steps, num_tasks = rewards.shape
    args = release(v_max=float(vectors["v_max"]))
    normalizer = brc_sac.ReturnNormalizer(args, num_tasks, act_dim)
    buffer = brc_sac.ReplayBuffer(num_tasks, obs_dim=1, act_dim=act_dim, capacity=2 * steps)
    batch_rewards, task_ids = vectors.tensor("batch_rewards"), vectors.tensor("batch_task_ids").long()
    truncated = vectors["truncations"] == 1
    # The release counts a step that is terminal and truncated as truncated, a known defect that the agent does not
    # copy: there terminated wins. So such a step comes here as the release saw it.
    terminated = (vectors["terminals"] == 1) & ~truncated

    def normalize() -> Tensor:
        return torch.stack([torch.stack([normalizer.normalize(reward, task_id, temperature)
                                         for reward, task_id in zip(batch_rewards, task_ids)])
                            for temperature in vectors.tensor("temperatures")])

    when = vectors["normalized_after_step"].tolist()  # -1: before the first
    normalized, low, high = {-1: normalize()}, [], []
    for t in range(steps):
        normalizer.observe(rewards[t], terminated[t], truncated[t])
        low.append(torch.tensor(normalizer.return_min))
        high.append(torch.tensor(normalizer.return_max))
        if t in when:
            normalized[t] = normalize()
        obs = np.full((num_tasks, 1), t, np.float32)
        buffer.add(obs, np.zeros((num_tasks, act_dim), np.float32), rewards[t], terminated[t], truncated[t], obs + 1)

    # Enough samples to meet every transition; the observation says which step it is.
    batch = buffer.sample(50 * rewards.size)
    masks = torch.full(rewards.shape, torch.nan)
    masks[batch.obs[:, 0].long(), batch.task_id] = 1 - batch.terminated
    # 0 / 0 and 1 / 0: a task whose returns were all 0, at temperature 0, which training never reaches.
    zero = brc_sac.ReturnNormalizer(args, 1, act_dim)
    zero.observe(np.zeros(1), np.ones(1, bool), np.zeros(1, bool))
    zero_over_zero = zero.normalize(torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.long), torch.tensor(0.0))
    return {
        "returns_min": torch.stack(low), "returns_max": torch.stack(high), "masks": masks,
        "normalized_rewards": torch.stack([normalized[t] for t in when]),
        "zero_task_zero_temperature": zero_over_zero[None]}


def check_normalizer(vectors: Vectors) -> list[Row]:
    values, tolerance = measure(lambda: observe_normalizer(vectors))
    rows = [compare(name, value, vectors[name], tolerance[name]) for name, value in values.items()]
    target_entropy = brc_sac.ReturnNormalizer(release(), 1, int(vectors["act_dim"])).target_entropy
    rows.append(compare("target_entropy", target_entropy, vectors["target_entropy"], 1e-6))
    return rows + [compare("discount", release().gamma, vectors["discount"], 1e-6)]


# -------------------------------------------------------------------------------------------------------------- main

KINDS = {"init/log_temp": check_updates, "layernorm/x": check_units, "returns_min": check_normalizer}


def check(path: str, precision: str = "fp32", compile: bool = False, device: str = "cpu") -> list[Row]:
    """All rows of the comparison with the vectors in `path`; raises UsageError."""
    vectors = Vectors(path)
    kinds = [function for key, function in KINDS.items() if key in vectors.arrays]
    if not kinds:
        raise UsageError(f"{path} is not in the format of the reference vectors: it has none of "
                          f"{', '.join(repr(key) for key in KINDS)}.")
    if kinds[0] is check_updates and (compile, precision, device) != (False, "fp32", "cpu"):
        return check_updates(vectors, precision, compile, device)
    rows = kinds[0](vectors)
    # Settings beyond those of the format are no quantities: a seed, say.
    unread = sorted(name for name in set(vectors.arrays) - vectors.read if "/" in name and not name.startswith("cfg/"))
    return rows + [Row(f"{name}: not compared", np.nan, np.nan, np.nan, np.nan, False) for name in unread]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the updates")
    parser.add_argument("--device", default="cpu", help="of the updates")
    parser.add_argument("--compile", action="store_true", help="torch.compile the losses of the updates")
    torch.set_num_threads(1)  # the vectors are small: threads would only wait for each other
    args, bad, total = parser.parse_args(arguments), 0, 0
    if args.precision == "tf32" and args.device == "cpu":
        parser.error("--precision tf32 is NVIDIA GPUs': give --device cuda too, or fp32 or bf16")
    for path in args.files:
        try:
            rows = check(path, args.precision, args.compile, str(devices.choose_device(args.device)))
        except UsageError as error:
            print(f"parity: {error}", file=sys.stderr)
            return 2
        width = max(len(row.name) for row in rows)
        print(f"{path}\n{'quantity':<{width}}  max abs error  max rel  tolerance  used     ok")
        for row in rows:
            print(f"{row.name:<{width}}  {row.abs_error:<13.2e}  {row.rel_error:<7.1e}  {row.tolerance:<9.1e}  "
                  f"{row.used:<7.2f}  {'yes' if row.ok else 'NO'}")
        bad, total = bad + sum(not row.ok for row in rows), total + len(rows)
        print()
    print(f"{total - bad} of {total} quantities agree" + (f", {bad} do NOT" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
