"""A model cut among processes by transformers' own tensor parallelism: each holds some heads of every layer.

Scales stay whole in every process, [layers, heads]; a layer takes those of its own heads, and a gradient comes back of all
heads. Whatever is computed from logits is the same in all processes, which must all do the same passes in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zerotuning.errors import ZeroTuningError
from zerotuning.models import process_group


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether the model was loaded with a tensor-parallel plan, for more than one process."""
    return int(getattr(model, "tp_size", None) or 1) > 1


# Loading.


def join_processes() -> int:
    """How many processes share the model; joins them if nobody did yet. Errors: ZeroTuningError outside torchrun."""
    if not (dist.is_available() and dist.is_initialized()):
        if not process_group.is_one_of_several():
            raise ZeroTuningError(
                "tensor_parallel cuts a model among several processes, this is one alone: "
                "start it with torchrun --nproc-per-node N"
            )
        process_group.join(None, tensor_parallel=True)
    return dist.get_world_size()


def check_plan(name: str, config: Any, count: int) -> None:
    """Errors: ZeroTuningError for a model without a plan, or whose heads `count` processes cannot share evenly."""
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise ZeroTuningError(
            f"tensor_parallel: transformers has no tensor-parallel plan for model {name} ({text.model_type})"
        )
    if not any("att" in module and style == "colwise" for module, style in plan.items()):
        return  # every process computes all heads
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % count or key_heads % count:
        raise ZeroTuningError(
            f"tensor_parallel: the number of processes must divide the {heads} heads and {key_heads} key/value heads of "
            f"model {name}, got {count}"
        )


def load_arguments(count: int) -> dict[str, Any]:
    """What makes transformers' from_pretrained give each of `count` processes its part."""
    from transformers.distributed import DistributedConfig

    if "tp_plan" in DistributedConfig.__dataclass_fields__:
        return {"distributed_config": DistributedConfig(tp_size=count, tp_plan="auto")}
    return {"tp_plan": "auto"}  # transformers before 5.14 or so


# Heads.


class _OwnHeads(torch.autograd.Function):
    """[…, heads] -> those of this process; the gradient is that of all processes' heads, in every process."""

    @staticmethod
    def forward(context: Any, log_scale: Tensor, first: int, count: int) -> Tensor:
        context.first, context.shape = first, log_scale.shape
        return log_scale[..., first : first + count].contiguous()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        whole = gradient.new_zeros(context.shape)
        whole[..., context.first : context.first + gradient.shape[-1]] = gradient
        dist.all_reduce(whole)
        return whole, None, None


@dataclass(frozen=True)
class HeadShare:
    """Which heads of a layer this process has: `count` of them, from `first` on, of `total`."""

    first: int
    count: int
    total: int

    def of(self, log_scale: Tensor) -> Tensor:
        """log γ of all heads, […, total] -> of this process's, […, count]."""
        if torch.is_grad_enabled() and log_scale.requires_grad:
            return _OwnHeads.apply(log_scale, self.first, self.count)  # type: ignore[no-any-return]
        return log_scale[..., self.first : self.first + self.count].contiguous()


def head_share(model: Any, layer_name: str, heads: int) -> HeadShare | None:
    """The share of a layer in which `heads` heads were seen; None where that is all of them.

    Errors: ZeroTuningError for a model that is cut otherwise than evenly among all processes.
    """
    if not is_tensor_parallel(model):
        return None
    total, count = model.config.get_text_config(decoder=True).num_attention_heads, dist.get_world_size()
    if heads == total:  # gathered before attention, as where queries are normalised over all heads
        return None
    if model.tp_size != count or heads * count != total:
        raise ZeroTuningError(
            f"{layer_name} must have its {total} heads shared evenly among all {count} processes, "
            f"got {heads} here and tp_size {model.tp_size}"
        )
    return HeadShare(dist.get_rank() * heads, heads, total)


# The output layer.


def whole_rows(weight: Tensor, rows: Tensor, total: int) -> Tensor:
    """The given rows of a weight [total, …], in every process; differentiable where it is not cut."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if local.shape[0] == total:
        return local[rows]
    local = local.detach()
    places = rows - dist.get_rank() * -(-total // dist.get_world_size())
    here = (places >= 0) & (places < local.shape[0])
    found = local[places.clamp(0, local.shape[0] - 1)]
    found[~here] = 0
    dist.all_reduce(found)
    return found
