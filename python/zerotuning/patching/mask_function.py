"""The mask function of patched models: padding, caches and packed sequences in O(T) numbers in place of O(T²)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences, traced_masks
from zerotuning.attention.mask_encoding import DenseMask, KeyMask
from zerotuning.patching import packed_mask, probe

#: The decode operator computes cached generation steps of up to this many queries.
DECODE_QUERIES = 16


def zerotuning_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of a forward pass, which transformers hands to every layer.

    Args:
        batch_size: number of samples.
        q_length: number of queries, Tq.
        kv_length: number of keys in the cache or the batch, Tk.
        q_offset: position of the first query in the text; a tensor with a static cache.
        kv_offset: position of the first key in the text, above 0 in a sliding-window cache that dropped keys.
        mask_function: whether a query sees a key, from transformers' factories.
        attention_mask: (B, positions), 0 for padding; None: all tokens are real.
        local_size: sliding window or chunk size.
        allow_is_causal_skip: False where the caller combined the mask function with another.
        config: the model's configuration.
        device: of the mask.
        kwargs: passed by transformers for other implementations.

    Returns:
        None if the queries are the last keys and all keys are real; else the encoding (`attention.mask_encoding`) of a
        KeyMask for causal masks, of a PackedMask for packed sequences, and of a DenseMask for the rest: chunks, custom
        mask functions, and packed sequences in a graph that is traced.
    """
    is_chunked = getattr(config, "attention_chunk_size", None) is not None
    probing = probe.running()
    if probing is not None and local_size is not None and not is_chunked:
        probing.mask_windows.add(local_size)
    is_sliding = local_size is not None and not is_chunked and (allow_is_causal_skip or q_length == 1)
    if mask_function is causal_mask_function or is_sliding:
        return _key_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        "use_vmap": kwargs.get("use_vmap", False),
    }
    packed = _packed_mask(**arguments)
    return _dense_mask(is_chunked, **arguments) if packed is None else packed


def _key_mask(
    batch: int,
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """The encoded KeyMask of a causal mask; None if the queries are the last keys and all keys are real."""
    queries_are_last_keys = isinstance(q_offset, int) and kv_offset == 0 and q_offset + queries == keys
    is_decode_step = queries < keys and queries <= DECODE_QUERIES  # torch.export fixes the lengths at this comparison
    if queries_are_last_keys and (attention_mask is None or _is_all_real(attention_mask, is_decode_step)):
        return None
    if queries_are_last_keys and not is_decode_step:
        return KeyMask(_real_keys(attention_mask, batch, keys, kv_offset, device)).encode()
    is_traced = torch.compiler.is_compiling()
    if is_decode_step and kv_offset == 0 and isinstance(q_offset, int) and attention_mask is not None and not is_traced:
        real = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
        return ops.encode_key_mask(real, keys, q_offset)
    first = _first_real(attention_mask, batch, device) - kv_offset
    is_present = first >= 0  # a sliding-window cache drops old keys, the initial token among them
    span = torch.stack((torch.where(is_present, first, 0), torch.where(is_present, first + 1, 0)), dim=1)
    query_start = torch.zeros_like(first) + (q_offset - kv_offset)
    return KeyMask(_real_keys(attention_mask, batch, keys, kv_offset, device), span, query_start).encode()


def _is_all_real(attention_mask: Tensor, is_decode_step: bool) -> bool:
    """Whether no key is padding; False in traced and captured graphs and in GPU decode steps, which must not wait."""
    if torch.compiler.is_compiling():
        return False
    if attention_mask.is_cuda and (is_decode_step or torch.cuda.is_current_stream_capturing()):
        return False
    return bool(attention_mask.all())


def _first_real(attention_mask: Tensor | None, batch: int, device: torch.device | str) -> Tensor:
    """Position of each sample's initial token, (B) int64."""
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return attention_mask.int().argmax(dim=-1)


def _real_keys(
    attention_mask: Tensor | None, batch: int, length: int, offset: int, device: torch.device | str
) -> Tensor:
    """Keys [offset, offset + length) of the mask, bool (B, length); False beyond the mask's end."""
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    missing = offset + length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, offset : offset + length].bool()


def _packed_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    device: torch.device | str,
    **_: Any,
) -> Tensor | None:
    """The encoded PackedMask of rows whose queries are all of their keys; None for other masks."""
    is_square = q_length == kv_length and kv_offset == 0 and isinstance(q_offset, int) and q_offset == 0
    if not is_square:
        return None
    return packed_mask.read_packed_mask(mask_function, attention_mask, batch_size, q_length, device)


def _dense_mask(
    is_chunked: bool,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
    **arguments: Any,
) -> Tensor:
    """The encoded DenseMask of any mask function."""
    visible = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        device=device,
        **arguments,
    )
    is_traced = torch.compiler.is_compiling()
    if is_chunked or q_length != kv_length or (is_traced and attention_mask is not None):
        initial = (_first_real(attention_mask, batch_size, device) - kv_offset)[:, None].expand(-1, q_length)
    elif is_traced:
        initial = packed_sequences.sequence_starts(visible[:, 0])  # each row may hold packed sequences
    else:
        initial = dense_masks.initial_keys(visible[:, 0])  # packed sequences have an initial token each
    scaled = visible & (torch.arange(kv_length, device=device) == initial[:, None, :, None])
    encoded = DenseMask(visible, scaled).encode()
    if is_traced and q_length == kv_length:
        return traced_masks.find_packed_sequences(encoded, q_length)
    return encoded
