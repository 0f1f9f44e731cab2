"""The trainer's state on disk: float32 weights and AdamW's moments, saved and loaded by any number of ranks.

Owns the folder's format, and where DeepSpeed keeps what a rank holds. A rank writes the parts of parameters that its
optimizer updates and reads those that it needs, straight from and into the optimizer's own tensors: nothing is
gathered, and the ranks and the ZeRO stage that load need not be those that saved.

    state.json                       the count of updates, every parameter's shape and step, the files
    rank_K_of_W-00001.safetensors    "exp_avg/4096/model.norm.weight": elements from 4096 on, of the flattened parameter
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpsrl.types import UserError

FORMAT = 1
FILE_BYTES = 1 << 30  # the most that a rank copies at a time, and the size of a file
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """Elements `start` to `start + size` of a flattened parameter, which lie at `offset` of the optimizer's tensor."""

    name: str
    start: int
    size: int
    master: Tensor  # float32, what the optimizer updates; the key of its state
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The part's view of the master or of a moment of it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)

    def share(self, rank: int, num_ranks: int) -> Part:
        first, last = (self.size * k // num_ranks for k in (rank, rank + 1))
        return Part(self.name, self.start + first, last - first, self.master, self.offset + first)


def parts(engine: Any) -> list[Part]:
    """What this rank holds, without the padding between and after parameters; without ZeRO everything."""
    names = {id(parameter): name for name, parameter in engine.module.model.named_parameters()}
    optimizer, rank = engine.optimizer, dist.get_rank()
    held = []
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3: each parameter is cut into equal parts
        for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, master = rank * size, optimizer.fp32_partitioned_groups_flat[group]
            held.append(Part(names[id(parameter)], start, min(size, parameter.ds_numel - start), master, offset))
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2: all of them in a line are
        for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
            left, right = rank * master.numel(), (rank + 1) * master.numel()
            line = zip(optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group])
            for parameter, place in line:
                first, last = max(left, place), min(right, place + parameter.numel())
                held.append(Part(names[id(parameter)], first - place, last - first, master, first - left))
    else:
        held = [Part(name, 0, p.numel(), p, 0) for name, p in engine.module.model.named_parameters()]
    return [part for part in held if part.size > 0]


def adam_state(engine: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor; as AdamW itself makes it at the tensor's first step, if that is still to come."""
    state = engine.basic_optimizer.state[master]
    if not state:
        state.update({"step": torch.tensor(0.0)} | {name: torch.zeros_like(master) for name in MOMENTS})
    return state


def num_broken(engine: Any) -> int:
    """Parts of parameters, over all ranks, with a weight that is not finite."""
    largest = torch.stack(torch._foreach_norm([part.of(part.master) for part in parts(engine)], ord=math.inf))
    broken = (~largest.isfinite()).sum().to(engine.device)
    dist.all_reduce(broken)
    return int(broken)


# --- save -------------------------------------------------------------------------------------------


def save_state(engine: Any, folder: Path, num_updates_done: int) -> None:
    """Called on every rank. `state.json` comes last."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shapes, steps = _shapes(engine), _steps(engine)
    num_files = torch.zeros(num_ranks, dtype=torch.int64, device=engine.device)

    def write_part() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        num_files[rank] = _write(folder, rank, num_ranks, _pieces(engine))

    def write_index() -> None:
        if rank == 0:
            state = {
                "format": FORMAT,
                "num_updates_done": num_updates_done,
                "files": [
                    _file(k, num_ranks, n) for k, last in enumerate(num_files.tolist()) for n in range(1, last + 1)
                ],
                "parameters": {name: {"shape": shapes[name], "step": steps[name]} for name in shapes},
            }
            (folder / "state.json").write_text(json.dumps(state, indent=1))

    if done_by_all(write_part, engine.device):
        dist.all_reduce(num_files)
        done_by_all(write_index, engine.device)


def done_by_all(write: Callable[[], None], device: torch.device) -> bool:
    """Calls `write` on every rank and waits for all; raises where it failed, and is False on the others.

    Without that, those that were done would wait for ever for one that a full disk has ended.
    """
    error = None
    try:
        write()
    except Exception as raised:
        error = raised
    failed = torch.tensor(int(error is not None), device=device)
    dist.all_reduce(failed)
    if error is not None:
        raise error
    return not failed


def _pieces(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(key, values) of all that this rank writes, none larger than a file."""
    held, largest = parts(engine), FILE_BYTES // 4
    if engine.zero_optimization_stage() == 0:  # every rank holds the same
        held = [part.share(dist.get_rank(), dist.get_world_size()) for part in held]
    for part in held:
        for kind, tensor in _tensors(engine, part).items():
            for first in range(0, part.size, largest):
                piece = part.of(tensor)[first : first + largest]
                yield f"{kind}/{part.start + first}/{part.name}", piece


def _tensors(engine: Any, part: Part) -> dict[str, Tensor]:
    state = adam_state(engine, part.master)
    return {"weight": part.master} | {name: state[name] for name in MOMENTS}


def _write(folder: Path, rank: int, num_ranks: int, pieces: Iterator[tuple[str, Tensor]]) -> int:
    """How many files it took."""
    num_files, num_bytes = 0, 0
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        nonlocal num_files, waiting, num_bytes
        num_files += 1
        save_file(waiting, folder / _file(rank, num_ranks, num_files))
        waiting, num_bytes = {}, 0

    for key, piece in pieces:
        if waiting and num_bytes + piece.nbytes > FILE_BYTES:
            write()
        waiting[key] = piece.to("cpu", copy=True)
        num_bytes += piece.nbytes
    if waiting:
        write()
    return num_files


def _file(rank: int, num_ranks: int, number: int) -> str:
    return f"rank_{rank}_of_{num_ranks}-{number:05}.safetensors"


def _shapes(engine: Any) -> dict[str, list[int]]:
    """Of the whole parameters; ZeRO-3 keeps them beside the empty local tensors."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.model.named_parameters()}


def _steps(engine: Any) -> dict[str, int]:
    """How often each parameter was stepped; collective, since a rank does not hold a part of every one."""
    names = list(_shapes(engine))
    steps = dict.fromkeys(names, 0) | {
        part.name: int(adam_state(engine, part.master)["step"]) for part in parts(engine)
    }
    steps_P = torch.tensor([steps[name] for name in names], device=engine.device)
    dist.all_reduce(steps_P, op=dist.ReduceOp.MAX)
    return dict(zip(names, steps_P.tolist(), strict=True))


# --- load -------------------------------------------------------------------------------------------


def load_state(engine: Any, folder: Path) -> int:
    """The count of updates that was saved, after all else is as it was; called on every rank, before any update.

    UserError where the folder is not whole or belongs to another model; nothing has changed then.
    """
    state = _read_json(folder)
    _check_model(folder, {name: saved["shape"] for name, saved in state["parameters"].items()}, _shapes(engine))
    index = _index(folder, state)
    held = parts(engine)
    for part in held:
        adam_state(engine, part.master)["step"].zero_()
    for part in held:
        adam_state(engine, part.master)["step"].clamp_(min=state["parameters"][part.name]["step"])
        for kind, tensor in _tensors(engine, part).items():
            _read(part.of(tensor), part.start, index[kind, part.name])
    _publish(engine)
    dist.barrier()
    return state["num_updates_done"]


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: this is no trainer's state, or half of one; resume from another checkpoint"
        )
    state = json.loads(path.read_text())
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has format {state['format']} where {FORMAT} is read: resume with the dpsrl that saved it"
        )
    if missing := [name for name in state["files"] if not (folder / name).is_file()]:
        raise UserError(
            f"{folder / missing[0]} is missing, and {len(missing)} of the state's {len(state['files'])} files in all: "
            "copy the whole folder, or resume from another checkpoint"
        )
    return state


def _check_model(folder: Path, saved: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    if other := sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)):
        raise UserError(
            f"{folder} was saved from another model, which differs in {len(other)} tensors; the first is {other[0]}, "
            f"{saved.get(other[0], 'absent')} there and {own.get(other[0], 'absent')} in model.path: "
            "resume with the model of the saved run"
        )


Index = dict[tuple[str, str], list[tuple[int, int, Path, str]]]  # (kind, name) -> pieces (start, stop, file, key)


def _index(folder: Path, state: dict[str, Any]) -> Index:
    """Where every element lies, from the files' headers. UserError unless they are all there, once."""
    index: Index = {}
    for name in state["files"]:
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    kind, start, parameter = key.split("/", 2)
                    (size,) = file.get_slice(key).get_shape()
                    piece = (int(start), int(start) + size, folder / name, key)
                    index.setdefault((kind, parameter), []).append(piece)
        except SafetensorError as error:
            raise UserError(f"{folder / name} is damaged ({error}): resume from another checkpoint") from error
    for name, saved in state["parameters"].items():
        for kind in ("weight", *MOMENTS):
            place = 0
            for start, stop, *_ in sorted(index.get((kind, name), [])):
                place = stop if start == place else -1
            if place != math.prod(saved["shape"]):
                raise UserError(f"{folder} does not hold all of {kind} of {name}: resume from another checkpoint")
    return index


def _read(target: Tensor, start: int, pieces: list[tuple[int, int, Path, str]]) -> None:
    """Fills `target`, elements from `start` on, with what the pieces have of it."""
    for first, last, path, key in pieces:
        left, right = max(first, start), min(last, start + target.numel())
        if left < right:
            with safe_open(path, "pt") as file:
                target[left - start : right - start].copy_(file.get_slice(key)[left - first : right - first])


@torch.no_grad()
def _publish(engine: Any) -> None:
    """Gives the model that computes the float32 weights; what ZeRO does after each step."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
