"""TrainerWorker: one DeepSpeed rank. It knows tensors and updates, not prompts, rewards or engines.

What a step leaves out, and what would make that wrong: there is no critic, no reference model and no
dropout; with one update per step the policy that sampled is the policy that is updated, so its logprobs
need no pass of their own. With several, those of the later updates are computed once, before the first.
"""

from __future__ import annotations

import math
import os
import socket
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dpsrl.algo.losses import mismatch_metrics, policy_loss, rollout_correction, token_logprobs
from dpsrl.algo.packing import MicroBatch
from dpsrl.config import Config, TrainerConfig
from dpsrl.types import WeightMeta


class TrainerWorker:
    """Owns the policy, its optimizer, and the count of updates."""

    def __init__(self, config: Config, rank: int, num_threads: int) -> None:
        self.config = config
        self.rank, self.world_size = rank, config.trainer.num_workers
        self.device = torch.device("cpu" if config.cluster.device == "cpu" else "cuda:0")
        self.num_threads = num_threads
        self.num_updates_done = 0
        self.sender = None

    def free_port(self) -> int:
        """A port on this rank's machine for the others to meet it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, master_address: str, master_port: int) -> None:
        """Joins the other ranks and loads the model."""
        import deepspeed  # reads DS_ACCELERATOR, which the actor's environment sets, when it is imported

        config = self.config
        os.environ.update(
            RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK="0",
            MASTER_ADDR=master_address, MASTER_PORT=str(master_port),
        )  # fmt: skip
        torch.set_num_threads(self.num_threads)

        # Its CPU collectives are compiled for a minute at the first start, for messages that gloo carries well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if config.cluster.device == "cpu" else "nccl")
        torch.manual_seed(config.seed)
        self.engine = deepspeed.initialize(
            model=(model := _load_model(config)),
            optimizer=torch.optim.AdamW(
                model.parameters(),
                lr=config.trainer.lr,
                betas=(config.trainer.beta1, config.trainer.beta2),
                weight_decay=config.trainer.weight_decay,
            ),
            config=_deepspeed_config(config),
        )[0]
        self.engine.clip_fp32_gradients = self._clip_gradients

    # --- training -----------------------------------------------------------------------------------

    def train_step(self, updates: list[list[MicroBatch]]) -> dict[str, float]:
        """Metrics of one step: an optimizer update for each list of this rank's micro-batches.

        The loss of an update is sum(token loss * weight), with weights that sum to one over all ranks, so
        it does not depend on how the update is split (`algo/packing.py`).
        """
        # The first update meets the policy that its step began with: its old logprobs are its own.
        first, *later = updates
        old = [[None] * len(first), *([self._old_logprobs(micro) for micro in update] for update in later)]
        totals: dict[str, float] = {}
        for index, update in enumerate(updates):
            lr = lr_at(self.num_updates_done, self.config.trainer, self._total_updates())
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr
            for micro, old_logprobs_BT in zip(update, old[index], strict=True):
                self._backward(micro, old_logprobs_BT, totals)
            self.engine.step()
            self.num_updates_done += 1
            totals["grad_norm"] = totals.get("grad_norm", 0.0) + self._grad_norm() / self.world_size
        return self._reduce(totals, len(updates)) | {"lr": lr}

    def _clip_gradients(self) -> None:
        """What DeepSpeed calls without ZeRO in float32; its own forgets the norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.config.trainer.max_grad_norm)
        self.engine._global_grad_norm = norm

    def _grad_norm(self) -> float:
        """Of the last update, over all ranks, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def _backward(self, micro: MicroBatch, old_logprobs_BT: Tensor | None, totals: dict[str, float]) -> None:
        algo = self.config.algo
        mask_BT, weights_BT = self._tensor(micro.loss_mask_BT), self._tensor(micro.weights_BT)
        rollout_logprobs_BT = self._tensor(micro.rollout_logprobs_BT)
        logprobs_BT, entropy_BT = self._forward(micro, with_entropy=True)
        old_logprobs_BT = logprobs_BT.detach() if old_logprobs_BT is None else old_logprobs_BT
        loss, metrics = policy_loss(
            logprobs_BT,
            old_logprobs_BT,
            self._tensor(micro.advantages_B)[:, None],
            mask_BT,
            weights_BT,
            algo.clip_low,
            algo.clip_high,
            algo.dual_clip,
            rollout_correction(old_logprobs_BT, rollout_logprobs_BT, mask_BT, algo.max_importance_weight),
        )
        metrics |= mismatch_metrics(
            old_logprobs_BT, rollout_logprobs_BT, mask_BT, weights_BT, algo.max_importance_weight
        )
        entropy = (entropy_BT * weights_BT).sum()
        loss = loss - algo.entropy_coef * entropy
        # DeepSpeed averages gradients over ranks; the weights already sum to one over all of them.
        self.engine.backward(loss * self.world_size)
        for name, value in (metrics | {"loss": loss.detach(), "entropy": entropy.detach()}).items():
            totals[name] = totals.get(name, 0.0) + float(value)

    @torch.no_grad()
    def _old_logprobs(self, micro: MicroBatch) -> Tensor:
        return self._forward(micro, with_entropy=False)[0]

    def _forward(self, micro: MicroBatch, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Logprob and entropy (B, T) of each token given those before it, at the sampling temperature."""
        token_ids_BT = self._tensor(micro.token_ids_BT)
        attention_mask_BT = self._tensor(micro.attention_mask_BT).long()
        logits_BTV = self.engine(input_ids=token_ids_BT, attention_mask=attention_mask_BT, use_cache=False).logits
        return token_logprobs(logits_BTV, token_ids_BT, self.config.rollout.temperature, with_entropy)

    def _reduce(self, totals: dict[str, float], num_updates: int) -> dict[str, float]:
        """Sums over ranks, means over the updates of the step."""
        names = sorted(totals)
        values = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return {name: float(value) / num_updates for name, value in zip(names, values, strict=True)}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.device)  # a copy: arrays from Ray's object store are read-only

    def _total_updates(self) -> int:
        return self.config.train.steps * self.config.train.num_updates

    @torch.no_grad()
    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 (len - 1,): log p(token t | tokens before t), temperature 1; called on every rank (ZeRO-3)."""
        ids = self._tensor(token_ids).long()[None]
        logits = self.engine(input_ids=ids, use_cache=False).logits
        return token_logprobs(logits, ids)[0][0, 1:].float().cpu().numpy()

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

    def send_weights(self, policy_version: int) -> dict[int, str]:
        """Failures by engine index; rank 0's count."""
        self.sender.send(policy_version)
        return self.sender.client.failures

    def save_model(self, folder: str) -> None:
        """A Hugging Face folder with this policy; called on every rank, written by rank 0."""
        weights = {name: tensor.clone().cpu() for name, tensor in self._source()}
        if self.rank == 0:
            model = self.engine.module
            model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
        dist.barrier()

    def _source(self):
        from dpsrl.weight_sync import ModelSource

        bucket_bytes = self.config.weight_sync.bucket_mib << 20
        return ModelSource(self.engine.module, getattr(torch, self.config.model.dtype), bucket_bytes)


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


def _load_model(config: Config) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=getattr(torch, config.model.dtype), attn_implementation="sdpa"
    )
    if config.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.model.dtype == "bfloat16" and config.cluster.device == "gpu":
        _use_float32_head(model)
    return model.train()


def _use_float32_head(model: torch.nn.Module) -> None:
    """Logits in float32, as the engines compute them (`head_dtype`): one side alone drifts further than none."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: F.linear(hidden.float(), head.weight.float())


def _deepspeed_config(config: Config) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # any number of backward calls, then step()
        "gradient_clipping": config.trainer.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": {"stage": config.trainer.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
