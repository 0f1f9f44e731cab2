"""RolloutWorker: one vLLM engine. It knows tokens and policy versions, not rewards and not prompts' meaning.

The engine runs inside this process, and only while `poll` is called: the caller's polls are its heartbeat, so
there is no thread to hang and no queue to lose. A poll returns as soon as a request is finished.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from dpsrl.config import Config
from dpsrl.types import Rollout, RolloutRequest, WeightMeta

CANARY = "canary"  # a request id; the others are numbers


class RolloutWorker:
    """Owns the engine, the requests it is working on, and the version of the weights it holds."""

    def __init__(self, config: Config, weight_backend: str) -> None:
        from vllm import LLM  # seconds and gigabytes: only where an engine lives
        from vllm.config import WeightTransferConfig

        from dpsrl.weight_sync import WeightReceiver, register_backends

        register_backends()
        self.max_response_tokens = config.model.max_response_tokens
        max_model_len = config.model.max_prompt_tokens + config.model.max_response_tokens
        self.llm = LLM(
            config.model.path,
            dtype=config.model.dtype,
            max_model_len=max_model_len,
            max_num_seqs=config.rollout.max_num_seqs,
            max_num_batched_tokens=max(8192, max_model_len),
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
            disable_log_stats=True,
            seed=config.seed,
            weight_transfer_config=WeightTransferConfig(backend=weight_backend),
            **_device_options(config),
        )
        self.engine = self.llm.llm_engine
        self.receiver = WeightReceiver(self.llm)
        self.on_gpu = config.cluster.device == "gpu"
        self._finished: list[Any] = []  # outputs not yet handed out
        self._awake = {"weights", "kv_cache"}
        # The first use compiles, seconds on an idle machine: it belongs to the start and its deadline, run.start_s.
        self.logprobs(np.ones(2, dtype=np.int32))

    def policy_version(self) -> int:
        return self.receiver.policy_version

    # --- generation ---------------------------------------------------------------------------------

    def submit(self, requests: list[RolloutRequest]) -> None:
        for request in requests:
            self.engine.add_request(
                str(request.request_id),
                {"prompt_token_ids": request.prompt_token_ids.tolist()},
                self._sampling(request),
            )

    def poll(self, budget_s: float) -> list[tuple[int, list[Rollout]]]:
        """Finished requests as (request_id, rollouts); empty after `budget_s` without one."""
        deadline = time.monotonic() + budget_s
        while self.engine.has_unfinished_requests() and not self._finished and time.monotonic() < deadline:
            self._step()
        finished, self._finished = self._finished, []
        return [(int(output.request_id), [_rollout(sample) for sample in output.outputs]) for output in finished]

    def _step(self) -> None:
        assert len(self._awake) == 2, f"the engine is asleep but for {self._awake}"
        self._finished += [output for output in self.engine.step() if output.finished]

    def _sampling(self, request: RolloutRequest):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # The whole distribution is sampled (top_p 1, top_k off): anything less would bias the importance ratio.
        return SamplingParams(
            n=request.num_rollouts,
            temperature=request.temperature,
            top_p=1.0,
            top_k=-1,
            min_p=0.0,
            seed=request.seed,
            max_tokens=self.max_response_tokens,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    # --- the canary ---------------------------------------------------------------------------------

    def logprobs(self, token_ids: np.ndarray) -> tuple[int, np.ndarray]:
        """(policy version, float32 (len - 1,): log p(token t | tokens before t) at temperature 1)."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self.engine.add_request(CANARY, {"prompt_token_ids": token_ids.tolist()}, params)
        while not (mine := [output for output in self._finished if output.request_id == CANARY]):
            self._step()  # requests that wait for the next step's polls move on a little, too
        self._finished.remove(mine[0])
        rows = mine[0].prompt_logprobs[1:]
        logprobs = [row[int(token)].logprob for row, token in zip(rows, token_ids[1:], strict=True)]
        return self.receiver.policy_version, np.array(logprobs, dtype=np.float32)

    def checksums(self) -> dict[str, str]:
        return self.receiver.checksums()

    # --- sharing a GPU --------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Level 1: weights wait in the host's memory. A CPU has nothing to free."""
        assert not self.engine.has_unfinished_requests(), "an engine sleeps only between generations"
        self._awake = set()
        if self.on_gpu:
            self.llm.sleep(level=1)

    def wake(self, part: str) -> None:
        self._awake.add(part)
        if self.on_gpu:
            self.llm.wake_up(tags=[part])

    # --- weight updates: the four calls of vLLM's weight-transfer client ------------------------------

    def init_weight_transfer(self, init_info: dict, expected: list[WeightMeta]) -> None:
        self.receiver.init(init_info, expected)

    def start_weight_update(self) -> None:
        assert "weights" in self._awake, "the engine's weights are asleep"
        self._share_cores(True)
        self.receiver.start()

    def update_weights(self, update_info: dict) -> None:
        self.receiver.update(update_info)

    def finish_weight_update(self, policy_version: int, canary: np.ndarray | None) -> tuple[int, np.ndarray] | None:
        """`logprobs` of the canary under the new weights, where one is given."""
        self.receiver.finish(policy_version)
        answer = None if canary is None else self.logprobs(canary)
        self._share_cores(False)
        return answer

    def _share_cores(self, sharing: bool) -> None:
        from dpsrl.weight_sync import share_cores

        if not self.on_gpu:
            share_cores(sharing, int(os.environ["OMP_NUM_THREADS"]))


def _rollout(sample) -> Rollout:
    """One vLLM completion as token ids and the logprobs of just these tokens."""
    token_ids = np.asarray(sample.token_ids, dtype=np.int32)
    logprobs = np.fromiter(
        (row[token].logprob for row, token in zip(sample.logprobs, sample.token_ids, strict=True)),
        dtype=np.float32,
        count=len(token_ids),
    )
    assert sample.finish_reason in ("stop", "length"), f"unexpected finish_reason {sample.finish_reason!r}"
    versions = [(int(span.version), span.end - span.start) for span in sample.weight_versions]
    return Rollout(token_ids, logprobs, sample.finish_reason, versions)


def _device_options(config: Config) -> dict:
    """LLM arguments that differ between a CPU and a GPU engine."""
    if config.cluster.device == "cpu":
        return {
            "enforce_eager": True,
            "kv_cache_memory_bytes": config.rollout.kv_cache_gib << 30,
            # vLLM takes back what a chunked prompt drew from a request's generator; a CPU generator cannot.
            "enable_chunked_prefill": False,
        }
    options: dict[str, Any] = {
        "enforce_eager": config.rollout.enforce_eager,
        "enable_sleep_mode": config.cluster.placement == "colocate",
        "gpu_memory_utilization": config.rollout.gpu_memory_share,
        "tensor_parallel_size": config.rollout.tensor_parallel,
        "distributed_executor_backend": "uni" if config.rollout.tensor_parallel == 1 else "mp",
    }
    if config.model.dtype == "bfloat16":
        options["hf_overrides"] = {"head_dtype": "float32"}  # as the trainer: one-sided fp32 logits drift
    return options
