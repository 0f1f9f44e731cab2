"""Both ends of the wire that carries the trainer's weights to the engines, on vLLM's weight-transfer interface.

vLLM brings `nccl` and `ipc` for GPUs; `shared_memory`, for one host without GPUs, is registered here. What the
interface leaves to its caller is done here too, since each omission is silent garbage: every expected tensor
must have arrived, the prefix cache must have been reset, and a packed lm_head on the CPU must be packed anew.
Importing this file imports vLLM: only actors do.

    every trainer rank                               every engine
    WeightSender.send(version)
      client.start_weight_update()            ->     WeightReceiver.start()
      client.update_weights(bucket), ...      ->     WeightReceiver.update(bucket)
      client.finish_weight_update()           ->     WeightReceiver.finish(version), then the canary
"""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from dpsrl.engine_weights import checksums, layer_names, load_layers
from dpsrl.types import WeightMeta

SHARED_MEMORY = "shared_memory"


# --- engine end -------------------------------------------------------------------------------------


class WeightReceiver:
    """Owns an engine's policy version, and the check that an update was whole before it counts."""

    def __init__(self, llm) -> None:
        self.llm = llm
        self.policy_version = 0
        llm.llm_engine.set_weight_version("0")  # which the engine writes beside every token
        self.expected: dict[str, WeightMeta] = {}
        self.received: set[str] = set()

    def init(self, init_info: dict[str, Any], expected: list[WeightMeta]) -> None:
        self.expected = {meta.name: meta for meta in expected}
        model_config = self.llm.llm_engine.model_config
        tied = bool(model_config.hf_config.tie_word_embeddings)
        compare_with_checkpoint(self.expected, checkpoint_shapes(model_config.model), tied)
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start(self) -> None:
        self.received = set()
        self.llm.start_weight_update()

    def update(self, update_info: dict[str, Any]) -> None:
        for name, shape in zip(update_info["names"], update_info["shapes"], strict=True):
            meta = self.expected.get(name)
            if meta is None or tuple(shape) != meta.shape or name in self.received:
                raise RuntimeError(
                    f"weight sync: {name} {tuple(shape)} is not in the model, of another shape there, or sent twice"
                )
        self.llm.update_weights({"update_info": update_info})
        self.received.update(update_info["names"])

    def finish(self, policy_version: int) -> None:
        missing = sorted(self.expected.keys() - self.received)
        if missing:  # vLLM would serve uninitialized memory in their place
            raise RuntimeError(f"weight sync: {len(missing)} tensors did not arrive, the first is {missing[0]}")
        self.llm.finish_weight_update(str(policy_version))
        # Requests under way go on with the new weights: what they had read is read again with them.
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError(
                "weight sync: the engine did not reset its prefix cache, so old weights would still speak"
            )
        self.policy_version = policy_version

    def checksums(self) -> dict[str, str]:
        """Of every tensor that the engine computes with, read back from where it is used."""
        return self.llm.apply_model(checksums)[0]


def checkpoint_shapes(model_path: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the model's safetensors files, from their headers alone."""
    folder = Path(model_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(model_path, allow_patterns="*.safetensors", local_files_only=True))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def compare_with_checkpoint(
    expected: dict[str, WeightMeta], checkpoint: dict[str, tuple[int, ...]], tied: bool
) -> None:
    """Raises unless the trainer will send just what the engine loaded at its start.

    transformers may rename or fuse tensors as it loads them; vLLM would skip such names without a word.
    """
    left_out = {name for name in checkpoint.keys() - expected.keys() if not name.endswith("inv_freq")}
    if tied:
        left_out.discard("lm_head.weight")
    unknown = sorted(name for name, meta in expected.items() if checkpoint.get(name) != meta.shape)
    if left_out or unknown:
        raise RuntimeError(
            f"weight sync: the trainer's tensors are not the checkpoint's: {len(left_out)} would not be sent "
            f"({sorted(left_out)[:1]}), {len(unknown)} are unknown or of another shape there ({unknown[:1]})"
        )


# --- trainer end ------------------------------------------------------------------------------------


class ModelSource(WeightSource):
    """The trainer's parameters under their Hugging Face names, gathered bucket by bucket under ZeRO-3."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, bucket_bytes: int) -> None:
        self.parameters = dict(model.named_parameters())
        self.dtype = dtype
        self.bucket_bytes = bucket_bytes

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self.dtype, _full_shape(p)) for name, p in self.parameters.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        import deepspeed  # the trainer has it loaded; an engine, which imports this file too, has no use for it

        for bucket in self._buckets():
            with deepspeed.zero.GatheredParameters([self.parameters[name] for name in bucket]):
                tensors = [self.parameters[name].detach().to(self.dtype) for name in bucket]
                if any(hasattr(self.parameters[name], "ds_id") for name in bucket):
                    tensors = [tensor.clone() for tensor in tensors]  # the gathered storage is freed on exit
            yield from zip(bucket, tensors, strict=True)

    def _buckets(self) -> Iterator[list[str]]:
        bucket, size = [], 0
        for meta in self.metadata():
            size += int(np.prod(meta.shape)) * self.dtype.itemsize
            bucket.append(meta.name)
            if size >= self.bucket_bytes:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def _full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The unpartitioned shape; ZeRO-3 keeps it beside the empty local tensor."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


class WeightSender:
    """Owns the trainer's side of the transfer. Built and called on every rank; rank 0 speaks to the engines."""

    def __init__(self, source: ModelSource, client, backend: str, rank: int, num_engine_gpus: int) -> None:
        self.client = client
        init_info = _trainer_init_info(backend, rank, source.bucket_bytes, num_engine_gpus)
        self.engine = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)

    def send(self, policy_version: int, canary: np.ndarray | None) -> None:
        """Sends without waiting for the engines to have loaded everything."""
        # vLLM's trainer engines finish without naming a version
        self.client.policy_version, self.client.canary = policy_version, canary
        self.engine.send_weights()

    def wait(self) -> tuple[dict[int, str], dict[int, tuple[int, np.ndarray]]]:
        """(failures, answers) by engine, as in `Sent`."""
        self.client.wait()
        return self.client.failures, self.client.answers

    def close(self) -> None:
        self.engine.shutdown()


def weight_metas(source: ModelSource) -> list[WeightMeta]:
    return [WeightMeta(meta.name, str(meta.dtype).removeprefix("torch."), meta.shape) for meta in source.metadata()]


def _trainer_init_info(backend: str, rank: int, bucket_bytes: int, num_engine_gpus: int) -> TrainerInitInfo:
    if backend == SHARED_MEMORY:
        return SharedMemoryTrainerInitInfo(rank=rank, bucket_bytes=bucket_bytes)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return NCCLTrainerInitInfo(
        rank=rank,
        master_address=socket.gethostbyname(socket.gethostname()),
        master_port=port,
        world_size=1 + num_engine_gpus,
        packed_buffer_size_bytes=bucket_bytes,
    )


# --- the shared-memory backend: a bucket is a file in memory, named in the update call ------------------


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """What will be sent; no rendezvous is needed, since each update names its file."""

    names: list[str]


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: tensors of one dtype, end to end in the file at `path`."""

    path: str
    dtype_name: str
    names: list[str]
    shapes: list[list[int]]


@dataclass
class SharedMemoryTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = SHARED_MEMORY
    bucket_bytes: int


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Receives buckets from files in memory, and loads each layer once all its tensors are there.

    Layers of kinds that `engine_weights` knows are written where they are computed with; models with others are loaded
    as a checkpoint by vLLM's layerwise reload, which takes several times as long for a small model.
    """

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self.tied = bool(self.model_config.hf_config.tie_word_embeddings)
        held = layer_names(self.model) - ({"lm_head.weight"} if self.tied else set())
        self.in_place = held == set(init_info.names) - ({"lm_head.weight"} if self.tied else set())

    def start_weight_update(self) -> None:
        self.waiting: dict[str, torch.Tensor] = {}
        if not self.in_place:
            _reload().initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        dtype = getattr(torch, update_info.dtype_name)
        # Read into memory of our own: tensors are kept until their layer is complete, the file goes before.
        flat = torch.frombuffer(bytearray(Path(update_info.path).read_bytes()), dtype=dtype)
        sizes = [int(np.prod(shape)) for shape in update_info.shapes]
        tensors = [part.view(shape) for part, shape in zip(flat.split(sizes), update_info.shapes, strict=True)]
        if self.in_place:
            self.waiting |= dict(zip(update_info.names, tensors, strict=True))
            load_layers(self.model, self.waiting)
        else:
            self.model.load_weights(list(zip(update_info.names, tensors, strict=True)))

    def finish_weight_update(self) -> None:
        if not self.in_place:
            _reload().finalize_layerwise_reload(self.model, self.model_config)
        if self.tied:
            _repack_tied_head(self.model)

    def shutdown(self) -> None:
        pass


def _reload() -> Any:
    """vLLM's module for it, which takes all models along: engines have them loaded, the trainer has no use for them."""
    from vllm.model_executor.model_loader import reload

    return reload


def _repack_tied_head(model: torch.nn.Module) -> None:
    """Packs lm_head anew from the embedding it is tied to.

    vLLM's CPU kernels keep a packed copy of lm_head, and a reload renews it only if lm_head itself is sent.
    """
    model.lm_head.tie_weights(model.model.embed_tokens)
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class SharedMemoryTrainerEngine(TrainerWeightTransferEngine[SharedMemoryTrainerInitInfo]):
    """Writes one bucket at a time into a file in memory and has the engines load it."""

    init_info_cls = SharedMemoryTrainerInitInfo

    @classmethod
    def trainer_init(
        cls,
        init_info: SharedMemoryTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: Any = None,  # a WeightSource; ends that only receive need none
    ) -> Self:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.bucket_bytes = init_info.bucket_bytes
        if engine.is_sender:
            client.init_weight_transfer_engine({"names": [meta.name for meta in source.metadata()]})
        return engine

    def send_weights(self) -> None:
        if self.is_sender:
            self.client.start_weight_update()
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in self.source:  # collective under ZeRO-3: every rank iterates
            if not self.is_sender:
                continue
            bucket.append((name, tensor))
            size += tensor.nbytes
            if size >= self.bucket_bytes:
                self._send_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            self._send_bucket(bucket)
        if self.is_sender:
            self.client.finish_weight_update()

    def _send_bucket(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        file = _memory_file()
        for _, tensor in bucket:
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        info = SharedMemoryUpdateInfo(
            path=_path_for_others(file),
            dtype_name=str(bucket[0][1].dtype).removeprefix("torch."),
            names=[name for name, _ in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
        )
        self.client.update_from(file, asdict(info))


def _memory_file() -> Any:
    """A file in memory that is gone with the process that made it, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dpsrl-weights"), "wb")
    return tempfile.NamedTemporaryFile()


def _path_for_others(file: BinaryIO) -> str:
    return f"/proc/{os.getpid()}/fd/{file.fileno()}" if hasattr(os, "memfd_create") else file.name


def share_cores(sharing: bool, num_threads: int) -> None:
    """Threads of this process while weights travel, when both ends of a machine compute at once, and otherwise."""
    torch.set_num_threads(max(1, num_threads // 2) if sharing else num_threads)


@functools.cache
def register_backends() -> None:
    """Makes `shared_memory` known to vLLM in this process."""
    WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryEngine)
    WeightTransferTrainerFactory.register_engine(SHARED_MEMORY, SharedMemoryTrainerEngine)
