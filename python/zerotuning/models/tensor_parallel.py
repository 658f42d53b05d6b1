"""Tensor parallelism: transformers shards every layer, so that each rank holds some of its heads.

Every rank keeps the scales of all heads, (layers, heads). A layer uses the scales of the heads on its rank; the
gradient is gathered over all heads. All ranks compute the same logits and must run the same forward passes in the same
order.
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
    """Return whether the model was loaded with a tensor-parallel plan for more than one rank."""
    return int(getattr(model, "tp_size", None) or 1) > 1


# Loading.


def join_processes() -> int:
    """Return the number of ranks that share the model; initialise the process group if there is none.

    Raises:
        ZeroTuningError: The process was not started by torchrun.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if not process_group.is_distributed():
            raise ZeroTuningError(
                "tensor_parallel shards a model over several processes, but this process is alone: "
                "start it with torchrun --nproc-per-node N"
            )
        process_group.join_process_group(None, tensor_parallel=True)
    return dist.get_world_size()


def check_plan(name: str, config: Any, count: int) -> None:
    """Check that transformers can shard a model evenly over `count` ranks.

    Raises:
        ZeroTuningError: transformers has no plan for the model, or `count` does not divide its numbers of heads.
    """
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise ZeroTuningError(
            f"tensor_parallel: transformers has no tensor-parallel plan for model {name} ({text.model_type})"
        )
    if not any("att" in module and style == "colwise" for module, style in plan.items()):
        return  # the plan replicates attention: every rank computes all heads
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % count or key_heads % count:
        raise ZeroTuningError(
            f"tensor_parallel: the number of processes must divide the {heads} heads and {key_heads} key/value heads "
            f"of model {name}, got {count}"
        )


def load_arguments(count: int) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` loads this rank's shard of `count`."""
    from transformers.distributed import DistributedConfig

    if "tp_plan" in DistributedConfig.__dataclass_fields__:
        return {"distributed_config": DistributedConfig(tp_size=count, tp_plan="auto")}
    return {"tp_plan": "auto"}  # transformers before 5.14


# Heads.


class _SelectLocalHeads(torch.autograd.Function):
    """Select this rank's heads, (…, heads) -> (…, heads / ranks). The backward pass gathers all heads' gradients."""

    @staticmethod
    def forward(context: Any, log_scale: Tensor, first: int, count: int) -> Tensor:
        context.first, context.shape = first, log_scale.shape
        return log_scale[..., first : first + count].contiguous()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gathered = gradient.new_zeros(context.shape)
        gathered[..., context.first : context.first + gradient.shape[-1]] = gradient
        dist.all_reduce(gathered)
        return gathered, None, None


@dataclass(frozen=True)
class HeadShard:
    """The heads of one layer on this rank: heads [first, first + count) of `total`."""

    first: int
    count: int
    total: int

    def select(self, log_scale: Tensor) -> Tensor:
        """Select log γ of this rank's heads, (…, total) -> (…, count). Differentiable."""
        if torch.is_grad_enabled() and log_scale.requires_grad:
            return _SelectLocalHeads.apply(log_scale, self.first, self.count)  # type: ignore[no-any-return]
        return log_scale[..., self.first : self.first + self.count].contiguous()


def head_shard(model: Any, layer_name: str, heads: int) -> HeadShard | None:
    """Return the heads of a layer on this rank, or None if this rank computes all heads of the layer.

    Args:
        model: A model that `load_model` loaded.
        layer_name: Name of the layer, for the error.
        heads: Number of heads that the layer computed on this rank.

    Raises:
        ZeroTuningError: The heads are not divided evenly among all ranks.
    """
    if not is_tensor_parallel(model):
        return None
    total, count = model.config.get_text_config(decoder=True).num_attention_heads, dist.get_world_size()
    if heads == total:  # gathered before attention, for example where queries are normalised over all heads
        return None
    if model.tp_size != count or heads * count != total:
        raise ZeroTuningError(
            f"{layer_name} must have its {total} heads divided evenly among all {count} processes, "
            f"got {heads} here and tp_size {model.tp_size}"
        )
    return HeadShard(dist.get_rank() * heads, heads, total)


# The output layer.


def gather_rows(weight: Tensor, rows: Tensor, total: int) -> Tensor:
    """Return the given rows of a weight (total, …) on every rank.

    Differentiable with respect to the weight unless the weight is sharded.
    """
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if local.shape[0] == total:
        return local[rows]
    local = local.detach()
    rows_per_rank = -(-total // dist.get_world_size())  # torch shards by the rounded-up quotient
    local_rows = rows - dist.get_rank() * rows_per_rank
    is_local = (local_rows >= 0) & (local_rows < local.shape[0])
    gathered = local[local_rows.clamp(0, local.shape[0] - 1)]
    gathered[~is_local] = 0
    dist.all_reduce(gathered)
    return gathered
