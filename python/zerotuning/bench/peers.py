"""The ways to compute attention that the benchmarks compare.

Shapes: query (B, H, T, D), key and value (B, Hkv, T, D), log_scale (H) -> output (B, H, T, D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zerotuning import ops

#: (query, key, value, log_scale) -> output.
Peer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def untuned_sdpa(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """torch's attention, untuned: every γ is 1."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def ours(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """zerotuning::attention."""
    return ops.attention(query, key, value, log_scale)[0]


def paper_eager(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """The paper's published code: repeated keys, a dense softmax in float32, a scaled column, renormalized rows."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    scaled = torch.cat((weights[..., :1] * log_scale.exp()[:, None, None], weights[..., 1:]), dim=-1)
    return (scaled / scaled.sum(dim=-1, keepdim=True)).to(query.dtype) @ value


def additive_mask(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """torch's attention with the bias and the causal mask written out as [1, H, T, T]."""
    length = query.shape[2]
    mask = torch.full((length, length), -torch.inf, device=query.device).triu(1).repeat(query.shape[1], 1, 1)
    mask[:, :, 0] += log_scale[:, None].detach()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype)[None], enable_gqa=True)


def flex_attention_peer() -> Peer:
    """FlexAttention, compiled, with the bias as its score_mod (forward only on the CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    masks: dict[int, Any] = {}

    def flex(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
        def biased(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return torch.where(column == 0, score + log_scale[head], score)

        length = query.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(causal, None, None, length, length, device=query.device)
        return compiled(query, key, value, score_mod=biased, block_mask=masks[length], enable_gqa=True)  # type: ignore[no-any-return]

    return flex


def attention_inputs(
    heads: tuple[int, int, int], length: int, dtype: torch.dtype, batch: int = 1, device: str = "cpu"
) -> list[Tensor]:
    """Random inputs of attention, in a model's memory layout (the heads of a token are adjacent).

    Args:
        heads: Query heads, key heads, head size.
        length: Tokens of query, key and value.
        dtype: Of query, key and value; log_scale is float32.
        batch: Samples.
        device: Of all inputs.

    Returns:
        [query, key, value, log_scale].
    """
    shapes = [(batch, length, count, heads[2]) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes]
    return [*tensors, torch.randn(heads[0], device=device)]


def untuned_by(backend: SDPBackend) -> Peer:
    """torch's attention, untuned, restricted to one of its kernels."""

    def attend(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            causal = query.shape[2] > 1
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    return attend


def flash_attention_4() -> dict[str, Peer]:
    """FlashAttention-4, untuned, by its name in rows; nothing where it is not installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return {}

    def attend(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
        rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        output = flash_attn_func(*rows, causal=True)
        output = output[0] if isinstance(output, tuple) else output  # some releases also return the log-sum-exp
        return output.transpose(1, 2)

    return {"untuned FlashAttention-4": attend}


def repeated_keys(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """transformers' way of decoding, untuned: keys and values are repeated for every query head."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value)


def forward_calls(peers: Mapping[str, Peer], inputs: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """The peers' forward passes on these inputs, without autograd."""

    def call(peer: Peer) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            return peer(*inputs)

        return run

    return {name: call(peer) for name, peer in peers.items()}
