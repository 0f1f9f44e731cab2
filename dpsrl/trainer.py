"""TrainerWorker: one DeepSpeed rank. It knows tensors and updates, not prompts, rewards or engines.

An update is `accumulate` for every micro-batch, in as many calls as it takes, and one `update` that divides by the
update's total weight and steps: the normalisation is written there and nowhere else. What a step leaves out, and what
would make that wrong: there is no critic and no dropout; the first update of a step meets the policy that the step
began with, so that its old logprobs need no pass of their own. Those of later updates are computed once, before it.
"""

from __future__ import annotations

import gc
import math
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpsrl.algo.losses import Rows, kl, load_loss, log_ratio, mismatch_metrics, policy_loss, rollout_correction
from dpsrl.algo.packing import MicroBatch, lay_out
from dpsrl.config import Config, TrainerConfig
from dpsrl.own import is_own
from dpsrl.policy import Policy, has_flash_attention, load_policy, packed_batch
from dpsrl.trainer_state import done_by_all, load_state, num_broken, save_state
from dpsrl.types import Sent, StateLost, TrainGroup, WeightMeta


class TrainerWorker:
    """Owns the policy, its optimizer, the reference if there is one, and the count of updates."""

    def __init__(self, config: Config, rank: int, num_threads: int) -> None:
        self.rank, self.world_size = rank, config.trainer.num_workers
        self.device = torch.device("cpu" if config.cluster.device == "cpu" else "cuda:0")
        self.num_threads = num_threads
        self._begin(config)

    def _begin(self, config: Config) -> None:
        self.config = config
        self.num_updates_done = 0
        self.sender: Any = None
        self.engine: Any = None
        self.reference: Any = None
        self.loss = load_loss(config.algo.loss) if is_own(config.algo.loss) else config.algo.loss
        self._sums: dict[str, float] = {}  # of the step under way: weighted sums over this rank's tokens
        self._skipped: list[bool] = []  # by update of the step under way
        self._busy_s = 0.0

    def free_port(self) -> int:
        """A port on this rank's machine for the others to meet it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, meeting: str) -> None:
        """Joins the other ranks and loads the model. meeting: where, as torch's `init_method`."""
        import deepspeed  # reads DS_ACCELERATOR, which the actor's environment sets, when it is imported

        config = self.config
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK="0")
        torch.set_num_threads(self.num_threads)

        # Its CPU collectives are compiled for a minute at the first start, for messages that gloo carries well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            "gloo" if config.cluster.device == "cpu" else "nccl", auto_mpi_discovery=False, init_method=meeting,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        self._load_all()
        # It takes vLLM along, seconds that are free while the engines still start.
        import dpsrl.weight_sync  # noqa: F401

    def renew(self, config: Config) -> None:
        """As after `start` with that configuration, which asks for the same device and ranks."""
        if self.sender is not None:
            self.sender.close()
        self._begin(config)
        gc.collect()  # what was held, in circles, is free before the next is loaded
        self._load_all()

    def _load_all(self) -> None:
        import deepspeed

        config = self.config
        torch.manual_seed(config.seed)
        policy = self._load()
        self.flash = has_flash_attention(self.device, getattr(torch, config.model.dtype))
        self.engine = deepspeed.initialize(
            model=policy,
            optimizer=self._optimizer(policy),
            config=_deepspeed_config(config),
        )[0]
        self.engine.clip_fp32_gradients = self._scale_and_clip
        if config.algo.kl_coef:
            self.reference = self._load_reference()

    def _load(self) -> Policy:
        """float32 logits on GPUs, as the engines compute them there."""
        config = self.config
        dtype = getattr(torch, config.model.dtype)
        head_dtype = torch.float32 if config.cluster.device == "gpu" else dtype
        trainer = config.trainer
        return load_policy(config.model.path, dtype, head_dtype, trainer.gradient_checkpointing, trainer.compile)

    def _optimizer(self, policy: Policy) -> torch.optim.Optimizer:
        trainer = self.config.trainer
        betas = (trainer.beta1, trainer.beta2)
        return torch.optim.AdamW(policy.parameters(), trainer.lr, betas, weight_decay=trainer.weight_decay)

    def _load_reference(self) -> Any:
        """The policy as it is before the first step, frozen; shared out over the ranks where the policy is."""
        import deepspeed

        reference = self._load().requires_grad_(False).eval()
        if self.config.trainer.zero_stage < 3:
            return reference.to(self.device)
        return deepspeed.initialize(model=reference, config=_deepspeed_config(self.config))[0]

    # --- training -----------------------------------------------------------------------------------

    def train_step(self, updates: list[tuple[list[MicroBatch], float, float]]) -> dict[str, Any]:
        """Metrics of one step: an update for each (this rank's micro-batches, total weight, weight trained on)."""
        with self._timed():
            old = [None, *([self._old_logprobs(micro) for micro in micro_batches] for micro_batches, *_ in updates[1:])]
        for (micro_batches, total_weight, trained_weight), old_logprobs in zip(updates, old, strict=True):
            self.accumulate(micro_batches, old_logprobs)
            self.update(total_weight, trained_weight)
        return self.finish_step()

    def accumulate(self, micro_batches: list[MicroBatch], old_logprobs: list[Tensor] | None = None) -> None:
        """Adds the gradients of the micro-batches to those of the update under way."""
        with self._timed():
            for place, micro in enumerate(micro_batches):
                self._backward(micro, None if old_logprobs is None else old_logprobs[place])

    def update(self, total_weight: float, trained_weight: float) -> None:
        """Divides the accumulated gradients by the update's total weight, over all ranks, clips and steps.

        If a loss or a gradient of any rank is not finite, all ranks skip the update: weights, moments and the count of
        updates stay as they are. StateLost when weights have ceased to be finite, which nothing here can mend.
        """
        with self._timed():
            lr = lr_at(
                self.num_updates_done, self.config.trainer, self.config.train.steps * self.config.train.num_updates
            )
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr
            # DeepSpeed averages gradients over ranks, and the loss is a sum over them.
            self._step(total_weight / self.world_size)
            norm = float(self.engine.get_global_grad_norm())
            if broken := num_broken(self.engine):
                raise StateLost(
                    f"the weights are no longer finite after update {self.num_updates_done + 1}: {broken} parts of "
                    f"parameters hold NaN or infinity; go on from a checkpoint, with a lower trainer.lr than {lr:.3g}"
                )
        own = {name: self._sums.pop(name) for name in list(self._sums) if "/" not in name}
        self._skipped.append(not math.isfinite(norm))
        if self._skipped[-1]:
            return
        self.num_updates_done += 1
        done = self._sums.setdefault
        for name, value in own.items():
            share = total_weight if name == "loss" else max(trained_weight, 1e-30)
            self._sums[f"step/{name}"] = done(f"step/{name}", 0.0) + value / share
        self._sums["step/grad_norm"] = done("step/grad_norm", 0.0) + norm / self.world_size
        self._sums["step/lr"] = lr / self.world_size

    def finish_step(self) -> dict[str, Any]:
        """Sums over ranks, means over the step's updates; `busy_s`, seconds this rank computed.

        `skipped` says of each update whether it was; those are in nothing else, and with no other, all else is left
        out.
        """
        sums, skipped, busy_s = self._sums, self._skipped, self._busy_s
        self._sums, self._skipped, self._busy_s = {}, [], 0.0
        metrics = {"skipped": skipped, "num_skipped": float(sum(skipped)), "busy_s": busy_s}
        if all(skipped):
            return metrics
        metrics["lr"] = sums.pop("step/lr") * self.world_size
        names = sorted(sums)
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        means = (values / skipped.count(False)).tolist()
        return metrics | {n.removeprefix("step/"): mean for n, mean in zip(names, means, strict=True)}

    def end_step(self, total_weight: float, trained_weight: float) -> dict[str, Any]:
        """The one update of a step that was accumulated before, and the step's metrics."""
        self.update(total_weight, trained_weight)
        return self.finish_step()

    def _step(self, divisor: float) -> None:
        """The optimizer's step on gradients divided by `divisor`, which is what a loss scale is for.

        DeepSpeed skips it, and says that the norm is infinite, where the norm at a ZeRO stage is not finite.
        """
        self._divisor = divisor
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "override_loss_scale"):  # ZeRO 1 to 3
            optimizer.custom_loss_scaler, optimizer.external_loss_scale = True, divisor
        self.engine.step()
        if hasattr(optimizer, "override_loss_scale"):
            optimizer.external_loss_scale = 1.0  # backward would multiply by it

    def _scale_and_clip(self) -> None:
        """What DeepSpeed calls without ZeRO in float32; its own forgets the norm."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        torch._foreach_div_([p.grad for p in parameters], self._divisor)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.trainer.max_grad_norm)
        self.engine._global_grad_norm = norm
        if not torch.isfinite(norm):
            self.engine.zero_grad()  # AdamW passes over a parameter without a gradient

    def _backward(self, micro: MicroBatch, old_logprobs_L: Tensor | None) -> None:
        algo = self.config.algo
        logprobs_L, entropy_L = self._logprobs(self.engine, micro, with_entropy=True)
        old_logprobs_L = logprobs_L.detach() if old_logprobs_L is None else old_logprobs_L
        rollout_L, weights_L = self._tensor(micro.rollout_L), self._tensor(micro.weights_L)
        rows = Rows(self._tensor(micro.row_L), micro.row_lengths_S.size)
        correction_L = rollout_correction(
            old_logprobs_L, rollout_L, rows, algo.correction, algo.min_importance_weight, algo.max_importance_weight
        )
        loss, metrics = policy_loss(
            logprobs_L, old_logprobs_L, self._tensor(micro.advantages_S)[rows.row_L], weights_L, rows,
            self.loss, algo.clip_low, algo.clip_high, algo.dual_clip, correction_L,
        )  # fmt: skip
        metrics |= mismatch_metrics(
            old_logprobs_L, rollout_L, correction_L, weights_L, rows, algo.max_importance_weight
        )
        entropy = (entropy_L * weights_L).sum()
        metrics["entropy"] = entropy.detach()
        if algo.entropy_coef:
            loss = loss - algo.entropy_coef * entropy
        if self.reference is not None and algo.kl_in == "loss":
            kl_L = kl(log_ratio(self._reference_logprobs(micro), logprobs_L), algo.kl_kind)
            reference_kl = (kl_L * weights_L).sum()
            loss, metrics["reference_kl"] = loss + algo.kl_coef * reference_kl, reference_kl.detach()
        if not torch.isfinite(loss):  # what is not finite can be clipped away from the gradient: make that so too
            loss = loss + math.nan * logprobs_L.sum()
        self.engine.backward(loss)
        for name, value in (metrics | {"loss": loss.detach()}).items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    @torch.no_grad()
    def _old_logprobs(self, micro: MicroBatch) -> Tensor:
        return self._logprobs(self.engine, micro)[0]

    @torch.no_grad()
    def _reference_logprobs(self, micro: MicroBatch) -> Tensor:
        return self._logprobs(self.reference, micro)[0]

    def reference_log_ratios(self, micro_batches: list[MicroBatch]) -> dict[int, float]:
        """For each rollout of this rank the sum over its tokens of log p_engine - log p_reference, by its id."""
        ratios: dict[int, float] = {}
        for micro in micro_batches:
            difference_L = self._tensor(micro.rollout_L) - self._reference_logprobs(micro)
            rows = Rows(self._tensor(micro.row_L), micro.row_lengths_S.size)
            ratios |= dict(zip(micro.ids_S.tolist(), rows.total(difference_L).tolist(), strict=True))
        return {i: ratio for i, ratio in ratios.items() if i >= 0}

    def _logprobs(self, model: Any, micro: MicroBatch, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        batch = packed_batch(micro, self.device, self.flash)
        return model(batch, self.config.rollout.temperature, with_entropy)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.device)  # a copy: arrays from Ray's object store are read-only

    @contextmanager
    def _timed(self):
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._busy_s += time.monotonic() - started

    @torch.no_grad()
    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 (len - 1,): log p(token t | tokens before t), temperature 1; called on every rank (ZeRO-3)."""
        ids = np.asarray(token_ids)
        group = TrainGroup(ids[:1], [ids[1:]], [np.zeros(ids.size - 1, dtype=np.float32)], np.zeros(1))
        ((micro,),) = lay_out([group], 1, 1, ids.size)[0].ranks
        return self.engine(packed_batch(micro, self.device, self.flash))[0].float().cpu().numpy()

    # --- weights ------------------------------------------------------------------------------------

    def weight_metas(self) -> list[WeightMeta]:
        """What a sync will send; the engines check each update against it."""
        from dpsrl.weight_sync import weight_metas

        return weight_metas(self._source())

    def connect(self, client: Any, backend: str, num_engine_gpus: int) -> None:
        """Opens the wire to the engines behind `client`; again after one of them was replaced."""
        from dpsrl.weight_sync import WeightSender, register_backends

        register_backends()
        if self.sender is not None:
            self.sender.close()
        self.sender = WeightSender(self._source(), client, backend, self.rank, num_engine_gpus)

    def send_weights(self, policy_version: int, canary: np.ndarray | None) -> Sent:
        """Rank 0's counts. The canary, where there is one, is scored while the engines load what was sent."""
        from dpsrl.weight_sync import share_cores

        share_cores(True, self.num_threads)
        self.sender.send(policy_version, canary)
        logprobs = None if canary is None else self.logprobs(canary)
        share_cores(False, self.num_threads)
        failures, answers = self.sender.wait()
        return Sent(failures, answers, logprobs)

    def checksums(self) -> dict[str, str]:
        """Of every tensor as it is sent; rank 0's count. Called on every rank (ZeRO-3)."""
        from dpsrl.engine_weights import checksum

        return {name: checksum(tensor) for name, tensor in self._source()}

    def sleep(self) -> None:
        """Moves what training alone needs to the host's memory; the weights stay, for the sync and the canary."""
        if self.device.type == "cuda" and hasattr(self.engine.optimizer, "offload_states"):
            from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

            self.engine.offload_states(include=[State.optim_states, State.hp_params, State.contiguous_grad_buffer])
            torch.cuda.empty_cache()

    def wake(self) -> None:
        if self.device.type == "cuda" and hasattr(self.engine.optimizer, "reload_states"):
            self.engine.reload_states()

    # --- state --------------------------------------------------------------------------------------

    def save_state(self, folder: str) -> None:
        """All that decides the next update, between two steps; called on every rank."""
        save_state(self.engine, Path(folder), self.num_updates_done)

    def load_state(self, folder: str) -> None:
        """Goes on where `folder` was saved, by whatever ranks; called on every rank, before the first step."""
        self.num_updates_done = load_state(self.engine, Path(folder))

    def save_model(self, folder: str) -> None:
        """A Hugging Face folder with this policy; called on every rank, written by rank 0."""
        weights = {}
        for name, tensor in self._source():  # all ranks take part, one keeps it
            if self.rank == 0:
                weights[name] = tensor.clone().cpu()

        def write() -> None:
            if self.rank == 0:
                model = self.engine.module.model
                model.save_pretrained(folder, state_dict=weights, safe_serialization=True)

        done_by_all(write, self.device)

    def _source(self):
        from dpsrl.weight_sync import ModelSource

        bucket_bytes = self.config.weight_sync.bucket_mib << 20
        return ModelSource(self.engine.module.model, getattr(torch, self.config.model.dtype), bucket_bytes)


def lr_at(update: int, config: TrainerConfig, total_updates: int) -> float:
    """Learning rate of update 0, 1, ...: linear warm-up, then constant, linear or cosine decay to zero."""
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    if config.lr_schedule == "constant":
        return config.lr
    progress = (update - config.warmup_updates) / max(1, total_updates - config.warmup_updates)
    if config.lr_schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def _deepspeed_config(config: Config) -> dict[str, Any]:
    half = config.model.dtype == "bfloat16"
    # Sums of hundreds of micro-batches need float32, or what is added last falls off the end of 8 bits. Of the stages
    # that take it, 2 is the lowest that takes a loss scale too.
    stage = max(2, config.trainer.zero_stage) if half else config.trainer.zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # any number of backward calls, then step()
        "gradient_clipping": config.trainer.max_grad_norm,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage} | _offload(config.trainer.offload),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _offload(what: str) -> dict[str, Any]:
    """DeepSpeed's keys for what is kept in the host's memory while it is not needed."""
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    keys = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}[what]
    return {key: to_cpu for key in keys}
