"""The mask function of patched models: what a dense mask would say in O(T²) numbers, in O(T)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences
from zerotuning.patching import packed_mask, probe

#: Cached generation steps of up to so many queries take the decode operator.
DECODE_QUERIES = 16
#: int64 numbers in front of the key mask in a geometry tensor: first scaled key, end of the scaled keys; or query_start
#: before both.
SPAN_HEADER, HEADER = 2, 3
#: Bytes of the key mask that one int64 holds.
BYTES = 8


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
    """What the attention function needs to know of padding and caches.

    None: nothing, the queries are the last keys and all keys are real. Else the geometry, int64 [B, 1, 1, words]: the key
    mask, 8 keys a word, a byte each; in front of it, where that does not say all, the scaled keys [first, end), and before
    them query_start where the queries may not be the last keys. Packed sequences: the code of `packed_sequences`, int64
    [B, 1, T, 3]. Masks of another kind (chunks, custom mask functions, packed sequences in a graph that is traced): int8
    [B, 1, Tq, Tk], 0 hidden, 1 visible, 2 visible and scaled.
    """
    chunked = getattr(config, "attention_chunk_size", None) is not None
    probing = probe.running()
    if probing is not None and local_size is not None and not chunked:
        probing.mask_windows.add(local_size)
    sliding = local_size is not None and not chunked and (allow_is_causal_skip or q_length == 1)
    if not (mask_function is causal_mask_function or sliding):
        if q_length == kv_length and kv_offset == 0 and isinstance(q_offset, int) and q_offset == 0:
            code = packed_mask.packed_code(mask_function, attention_mask, batch_size, q_length, device)
            if code is not None:
                return code
        codes = _dense_codes(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            chunked,
            device,
            kwargs,
        )
        return (
            dense_masks.find_packed_sequences(codes)
            if torch.compiler.is_compiling() and q_length == kv_length
            else codes
        )
    ends_at_queries = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    decoding = q_length < kv_length and q_length <= DECODE_QUERIES  # an export's lengths are settled by the first
    if ends_at_queries and (attention_mask is None or _is_all_real(attention_mask, decoding)):
        return None
    traced = torch.compiler.is_compiling()
    if decoding and kv_offset == 0 and isinstance(q_offset, int) and attention_mask is not None and not traced:
        real = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
        return ops.step_geometry(real, kv_length, None if ends_at_queries else q_offset)
    words = _key_mask_words(attention_mask, batch_size, kv_length, kv_offset, device)
    if not (ends_at_queries and not decoding):
        start = _first_real(attention_mask, batch_size, device) - kv_offset
        present = start >= 0  # a sliding cache drops old keys, the initial token among them
        header = [torch.where(present, start, 0), torch.where(present, start + 1, 0)]
        if not ends_at_queries:
            header.insert(0, torch.zeros_like(start) + (q_offset - kv_offset))
        words = torch.cat((torch.stack(header, dim=1), words), dim=1)
    return words[:, None, None]


def _is_all_real(attention_mask: Tensor, decoding: bool) -> bool:
    """Whether there is no padding; False where it cannot be known (tracing, capturing) or is not worth waiting for a GPU."""
    if torch.compiler.is_compiling():
        return False
    if attention_mask.is_cuda and (decoding or torch.cuda.is_current_stream_capturing()):
        return False
    return bool(attention_mask.all())


def _first_real(attention_mask: Tensor | None, batch: int, device: torch.device | str) -> Tensor:
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return attention_mask.int().argmax(dim=-1)


def _words(keys: int) -> int:
    return (keys + BYTES - 1) // BYTES


def _key_mask_words(
    attention_mask: Tensor | None, batch: int, length: int, offset: int, device: torch.device | str
) -> Tensor:
    """Keys [offset, offset + length) of the 2-D mask, a byte each, as int64 [B, words]; keys beyond it are not written yet."""
    if attention_mask is None:
        attention_mask = torch.ones(batch, offset + length, dtype=torch.bool, device=device)
    missing = offset + BYTES * _words(length) - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    # A copy: of one sample, also a part of a row counts as contiguous, and may begin where no int64 does.
    real = attention_mask[:, offset : offset + BYTES * _words(length)].bool()
    return real.clone(memory_format=torch.contiguous_format).view(torch.long)


def _dense_codes(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    chunked: bool,
    device: torch.device | str,
    kwargs: Mapping[str, Any],
) -> Tensor:
    visible = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=kwargs.get("use_vmap", False),
        device=device,
    )
    traced = torch.compiler.is_compiling()
    if chunked or q_length != kv_length or (traced and attention_mask is not None):
        initial = (_first_real(attention_mask, batch_size, device) - kv_offset)[:, None].expand(-1, q_length)
    elif traced:
        initial = packed_sequences.beginnings_in(visible[:, 0])  # each row may hold sequences
    else:
        initial = dense_masks.initial_keys(visible[:, 0])  # packed sequences each have an initial token
    scaled = torch.arange(kv_length, device=device) == initial[:, None, :, None]
    return visible.to(torch.int8) + (visible & scaled).to(torch.int8)
