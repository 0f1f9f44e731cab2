"""What an engine of one GPU or CPU computes with, read and written tensor by tensor under Hugging Face names.

vLLM fuses layers (q, k and v into one), and on the CPU keeps nothing but a packed copy of some weights. Knows vLLM's
modules from their attributes; imports none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def checksums(model: nn.Module) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in held_weights(model)}


def checksum(tensor: torch.Tensor) -> str:
    """16 hex digits of the tensor's bytes; 0 and -0 are one, since reading back by a product loses the sign."""
    whole = (tensor + 0).contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(whole.data, digest_size=8).hexdigest()


def layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, list[str]]]:
    """(module, kind, parameter, names of the tensors it is made of, in order)."""
    fused = FUSED | getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        names = [f"{parent}.{name}" for name in fused[leaf]] if leaf in fused else [path]
        for kind, parameter in module.named_parameters(recurse=False):
            yield module, kind, parameter, [f"{name}.{kind}" for name in names]


def layer_names(model: nn.Module) -> set[str]:
    return {name for *_, names in layers(model) for name in names}


def held_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor, read back from where it is used: a packed layer by running it on the identity, which is exact."""
    for module, kind, parameter, names in layers(model):
        whole = parameter.detach()
        if kind == "weight" and hasattr(module, "quant_method"):
            whole = _linear_weight(module, whole)
        yield from zip(names, whole.split(_part_sizes(module, len(names), whole.shape[0])), strict=True)


def load_layers(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Writes every layer whose tensors are all there, and takes these out of `tensors`."""
    for module, kind, parameter, names in layers(model):
        if all(name in tensors for name in names):
            _load_layer(module, kind, parameter, [tensors.pop(name) for name in names])


@torch.no_grad()
def _load_layer(module: nn.Module, kind: str, parameter: nn.Parameter, parts: list[torch.Tensor]) -> None:
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if parameter.numel():  # an embedding is padded beyond the vocabulary
        parameter[: whole.shape[0]].copy_(whole)
    else:  # given away when it was packed
        module.register_parameter(kind, nn.Parameter(whole.clone(), requires_grad=False))
    if kind == "weight" and getattr(module, "cpu_linear", None) is not None:
        module.quant_method.process_weights_after_loading(module)


def _linear_weight(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    vocab = getattr(module, "org_vocab_size", None)
    if getattr(module, "cpu_linear", None) is not None:
        eye = torch.eye(getattr(module, "input_size", 0) or module.embedding_dim, dtype=module.params_dtype)
        weight = module.quant_method.apply(module, eye).T.contiguous()
    return weight[:vocab] if vocab else weight


def _part_sizes(module: nn.Module, num_parts: int, total: int) -> list[int]:
    if num_parts == 1:
        return [total]
    return list(getattr(module, "output_partition_sizes", None) or module.output_sizes)
