"""The masks of attention and their encoding as the one tensor that transformers hands to every layer.

transformers calls the mask function of an attention implementation once a forward pass, and passes the returned
tensor to the attention function of each layer. Between the two the tensor may be copied to another device or be traced
into a graph, so that its kind must follow from dtype and shape alone. An encoded mask has the shape (B, 1, N, 1), and a
dtype for each kind:

=============  =========  =====================  ==================================================================
kind           dtype      N                      content
=============  =========  =====================  ==================================================================
KeyMask        uint8      Tk                     1 for a real key, 0 for padding
KeyMask with   int64      HEADER + words(Tk)     query_start, first scaled key, end of the scaled keys; then the real
positions                                        keys, one byte each, 8 in a word
PackedMask     int32      3 * T                  of each token: where its sequence begins, whether the token is
                                                 real, the sliding window
DenseMask      int8       Tq * Tk                of each query and key: 0 hidden, 1 visible, 2 visible and scaled
=============  =========  =====================  ==================================================================

A CallerMask is not encoded. Its tensor is the model caller's bool or floating-point mask (B, 1 or H, Tq, Tk).
Integer masks of the caller's own are refused, since their last dimension is Tk and not 1. With a single key (Tk = 1) a
caller's int8 or uint8 mask is read as an encoded mask, which has the same meaning: 0 hides the key.

csrc/attention/key_mask_layout.h defines the header and the words for `ops.encode_key_mask`, which encodes a KeyMask
with positions in one kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zerotuning.errors import ZeroTuningError

#: int64 numbers in front of the real keys: query_start, first scaled key, end of the scaled keys.
HEADER = 3
#: Keys in one int64 word, a byte each.
KEYS_PER_WORD = 8
#: Numbers of each token in a packed mask.
PACKED_COLUMNS = 3


class KeyMask(NamedTuple):
    """Causal attention to the real keys of each sample.

    Without positions the queries are the last keys, and the first real key is the initial token. `span` and
    `query_start` are given together.

    Attributes:
        key_mask: (B, Tk) bool or uint8, 1 for a real key.
        span: (B, 2) int64, the scaled keys [first, end).
        query_start: (B) int64, the position of the first query among the keys.
    """

    key_mask: Tensor
    span: Tensor | None = None
    query_start: Tensor | None = None

    def encode(self) -> Tensor:
        """Return the uint8 encoding without positions, the int64 encoding with positions."""
        if self.span is None or self.query_start is None:
            return self.key_mask.to(torch.uint8)[:, None, :, None]
        missing = KEYS_PER_WORD * words(self.key_mask.shape[1]) - self.key_mask.shape[1]
        real = torch.nn.functional.pad(self.key_mask.bool(), (0, missing))
        # Viewing bytes as int64 needs rows that begin at a multiple of 8 bytes, which only a copy guarantees.
        key_words = real.clone(memory_format=torch.contiguous_format).view(torch.long)
        return torch.cat((self.query_start[:, None], self.span, key_words), dim=1)[:, None, :, None]


class PackedMask(NamedTuple):
    """Causal attention within each of the sequences that are packed in a row, perhaps in a sliding window.

    Attributes:
        columns: (B, T, 3) integers: where each token's sequence begins in the row, whether the token is real, and the
            number of keys that a query sees (0: all), the same for all tokens.
    """

    columns: Tensor

    def encode(self) -> Tensor:
        """Return the int32 encoding."""
        return self.columns.to(torch.int32).flatten(1)[:, None, :, None]

    def unbind(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return begin, real and window, int64 (B, T) each."""
        begin, real, window = self.columns.long().unbind(-1)
        return begin, real, window

    def to_dense(self) -> DenseMask:
        """Return the same mask as a DenseMask."""
        begin, real, window = self.unbind()
        column = torch.arange(begin.shape[1], device=begin.device)
        row = column[:, None]
        visible = (begin[:, :, None] == begin[:, None]) & (column <= row) & (real[:, None] != 0)
        visible = visible & ((column > row - window[:, :, None]) | (window[:, :, None] == 0))
        real_until = real.cumsum(dim=1)  # real tokens of the row up to and with each token
        real_before_sequence = (real_until - real).gather(1, begin)
        initial = (real != 0) & (real_until - real_before_sequence == 1)
        return DenseMask(visible[:, None], (visible & initial[:, None])[:, None])


class DenseMask(NamedTuple):
    """A mask that is written out for every query and key.

    Attributes:
        visible: (B, 1, Tq, Tk) bool.
        scaled: (B, 1, Tq, Tk) bool, visible keys whose weight γ multiplies.
    """

    visible: Tensor
    scaled: Tensor

    def encode(self) -> Tensor:
        """Return the int8 encoding."""
        codes = self.visible.to(torch.int8) + self.scaled.to(torch.int8)
        return codes.flatten(1)[:, None, :, None]


class CallerMask(NamedTuple):
    """A mask that the model's caller passed.

    Attributes:
        mask: (B, 1 or H, Tq, Tk), bool (True: visible) or floating point, added to the logits.
    """

    mask: Tensor


Mask = KeyMask | PackedMask | DenseMask | CallerMask

#: The encoded key mask decoded last, the number of keys and the result. All layers of a forward pass get the same
#: tensor, and in a generation step the views take longer to make than to use.
_latest: tuple[Tensor, int, KeyMask] | None = None


def words(keys: int) -> int:
    """Return the number of int64 words that hold the key mask of `keys` keys."""
    return (keys + KEYS_PER_WORD - 1) // KEYS_PER_WORD


def decode(mask: Tensor, queries: int, keys: int) -> Mask:
    """Decode the tensor that a layer received into views, which show values that are written into the tensor later.

    Decoding depends on dtype and shape only: it waits for no GPU and can be traced.

    Args:
        mask: an encoded mask, or the caller's own.
        queries: number of queries of the layer, Tq.
        keys: number of keys of the layer, Tk.

    Raises:
        ZeroTuningError: a mask of another shape or dtype.
    """
    global _latest
    is_compiling = torch.compiler.is_compiling()
    latest = _latest  # another thread may replace _latest meanwhile
    if not is_compiling and latest is not None and latest[0] is mask and latest[1] == keys:
        return latest[2]
    if mask.dtype == torch.bool or mask.is_floating_point():
        if mask.dim() != 4 or mask.shape[3] != keys:
            raise ZeroTuningError(f"attention_mask must be [B, 1, Tq, Tk] with Tk = {keys}, got {list(mask.shape)}")
        return CallerMask(mask)
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != 1:
        raise ZeroTuningError(f"attention_mask must be bool or floating point in four dimensions, got {mask.dtype}")
    column = mask.flatten(1)
    if mask.dtype == torch.int8:
        _check_size(mask, queries * keys, "dense mask", queries, keys)
        codes = column.view(mask.shape[0], 1, queries, keys)
        return DenseMask(codes > 0, codes == 2)
    if mask.dtype == torch.int32:
        _check_size(mask, PACKED_COLUMNS * queries, "mask of packed sequences", queries, keys)
        return PackedMask(column.view(mask.shape[0], queries, PACKED_COLUMNS))
    if mask.dtype == torch.uint8:
        _check_size(mask, keys, "key mask", queries, keys)
        key_mask = KeyMask(column)
    elif mask.dtype == torch.int64:
        _check_size(mask, HEADER + words(keys), "key mask with positions", queries, keys)
        key_bytes = column.narrow(1, HEADER, words(keys)).view(torch.uint8)  # narrow takes half the time of a slice
        key_mask = KeyMask(key_bytes.narrow(1, 0, keys), column.narrow(1, 1, HEADER - 1), column.select(1, 0))
    else:
        raise ZeroTuningError(f"attention_mask must be bool or floating point in four dimensions, got {mask.dtype}")
    if not is_compiling:
        _latest = (mask, keys, key_mask)
    return key_mask


def _check_size(mask: Tensor, expected: int, kind: str, queries: int, keys: int) -> None:
    if mask.shape[2] != expected:
        raise ZeroTuningError(
            f"attention_mask must be the {kind} of {queries} queries and {keys} keys, {expected} numbers a sample, got "
            f"{list(mask.shape)} {mask.dtype}"
        )
