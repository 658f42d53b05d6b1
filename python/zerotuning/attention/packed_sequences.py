"""Packed sequences: several sequences in one row of the batch, each with attention and an initial token of its own.

A `PackedMask` describes the sequences in O(T) numbers. A `SequenceLayout` gathers the sequences from their rows into
batches that are padded on the right, for which `ops.attention` computes the attention, and puts the results back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zerotuning import ops
from zerotuning.attention.mask_encoding import PACKED_COLUMNS, PackedMask


def sequence_starts(visible: Tensor) -> Tensor:
    """Find where each token's sequence begins: a token that does not see the previous token begins a sequence.

    Args:
        visible: (B, T, T) bool, the keys that each query sees.

    Returns:
        (B, T) int64.
    """
    begins = torch.nn.functional.pad(~visible.diagonal(offset=-1, dim1=-2, dim2=-1), (1, 0), value=True)
    return torch.where(begins, torch.arange(visible.shape[-1], device=visible.device), 0).cummax(dim=-1).values


@dataclass
class SequenceGroup:
    """Sequences of similar length, which one call of the operator computes.

    Attributes:
        longest: number of tokens to which the sequences are padded.
        window: number of keys that a query sees, its own included; 0: all.
        row: (sequences) int64, the row of the batch that each sequence came from.
        begin: (sequences) int64, where the sequence begins in that row.
        key_mask: (sequences, longest) bool; None: all tokens are real.
    """

    longest: int
    window: int
    row: Tensor
    begin: Tensor
    key_mask: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, longest)."""
        return len(self.row), self.longest

    def geometry(self, span: Tensor | None) -> dict[str, Any]:
        """Return the keyword arguments of `ops.attention` for this group.

        Args:
            span: (B, 2) int64, scaled keys as positions in the rows.
        """
        if span is not None:  # the part of its row's span that lies in each sequence, counted from its beginning
            span = (span.index_select(0, self.row) - self.begin[:, None]).clamp(0, self.longest)
        return {"key_mask": self.key_mask, "span": span, "window": self.window}

    def log_scale(self, of_rows: Tensor) -> Tensor:
        """Return the sequences' scales from (H) or (B, H): all sequences of a row share its scales."""
        return of_rows if of_rows.dim() == 1 else of_rows.index_select(0, self.row)


@dataclass
class SequenceLayout:
    """Which token of the rows lies where in the groups of sequences; the same for all layers of a forward pass.

    The slots of all groups, laid end to end, are the tokens of the rows; padding repeats some tokens.

    Attributes:
        groups: all sequences of the rows, by length.
        source: (slots) int64, the token of each slot, counted through all rows.
        slot: (B * T) int64, the slot of each token.
        is_identity: each row is one sequence; the unchanged rows are then the only group.
    """

    groups: list[SequenceGroup]
    source: Tensor
    slot: Tensor
    is_identity: bool

    def split(self, *tensors: Tensor) -> Iterator[tuple[SequenceGroup, list[Tensor]]]:
        """Yield each group with its part of tensors (B, H, T, D), as (sequences, H, longest, D)."""
        if self.is_identity:
            yield self.groups[0], list(tensors)
        else:
            yield from self._split_slots([_tokens(tensor).index_select(0, self.source) for tensor in tensors])

    def split_gradient(self, gradient: Tensor) -> Iterator[Tensor]:
        """Yield each group's part of an output's gradient; repeated tokens get zeros."""
        if self.is_identity:
            yield gradient
            return
        tokens = _tokens(gradient)
        slots = tokens.new_zeros(len(self.source), *tokens.shape[1:]).index_copy(0, self.slot, tokens)
        yield from (part for _, (part,) in self._split_slots([slots]))

    def _split_slots(self, slots: list[Tensor]) -> Iterator[tuple[SequenceGroup, list[Tensor]]]:
        sizes = [sequences * longest for sequences, longest in (group.shape for group in self.groups)]
        for group, *parts in zip(self.groups, *(tensor.split(sizes) for tensor in slots), strict=True):
            yield group, [part.unflatten(0, group.shape).transpose(1, 2) for part in parts]

    def join(self, parts: list[Tensor], batch: int) -> Tensor:
        """Put the groups' parts, (sequences, H, longest, D) each, back into rows (B, H, T, D)."""
        if self.is_identity:
            return parts[0]
        slots = [_tokens(part) for part in parts]
        together = slots[0] if len(slots) == 1 else torch.cat(slots)
        return together.index_select(0, self.slot).unflatten(0, (batch, -1)).transpose(1, 2)


#: The layout of each encoded packed mask that is in use. Making a layout waits for a GPU, which layers must not do.
_layouts: Any = WeakTensorKeyDictionary()


def store_layout(encoded: Tensor, mask: PackedMask) -> None:
    """Make the layout of an encoded packed mask, and store the layout as long as the tensor exists.

    Args:
        encoded: the encoding, on the layers' device.
        mask: the same mask on the CPU.
    """
    _layouts[encoded] = make_layout(mask, encoded.device)


def stored_layout(encoded: Tensor) -> SequenceLayout | None:
    """Return the layout that `store_layout` made for this tensor; None for a copy of the tensor."""
    return _layouts.get(encoded)  # type: ignore[no-any-return]


def layout_of(encoded: Tensor) -> SequenceLayout:
    """Return the layout of an encoded packed mask, stored or new; a copy of a tensor has a layout of its own."""
    layout = stored_layout(encoded)
    if layout is None:
        columns = encoded.cpu().view(encoded.shape[0], -1, PACKED_COLUMNS)
        layout = _layouts[encoded] = make_layout(PackedMask(columns), encoded.device)
    return layout


def make_layout(mask: PackedMask, device: torch.device) -> SequenceLayout:
    """Make the layout of a packed mask on the CPU, for layers on `device`."""
    begin, real, window = mask.unbind()
    rows, columns = (begin == torch.arange(begin.shape[1], device="cpu")).nonzero(as_tuple=True)
    first = rows * begin.shape[1] + columns  # tokens are counted through all rows
    lengths = torch.cat((first, first.new_tensor([begin.numel()]))).diff()
    groups, sources = [], []
    slot, slots = torch.empty_like(begin).flatten(), 0
    for chosen in _of_similar_length(lengths):
        place = torch.arange(int(lengths[chosen].max()), device="cpu")
        last = lengths[chosen, None] - 1
        # Slots beyond a sequence's end repeat its last token. No real query sees these later slots.
        # Their outputs are dropped, so that these slots get no gradient and add nothing to other gradients.
        source = first[chosen, None] + torch.minimum(place, last)
        filled = place <= last
        slot[source[filled]] = slots + filled.flatten().nonzero().squeeze(1)
        slots += source.numel()
        sources.append(source.flatten())
        is_real = real.flatten()[source] != 0
        key_mask = None if bool(is_real.all()) else _to_device(is_real, device)
        keys = int(window[0, 0]) if int(window[0, 0]) < len(place) else 0
        row, begins = _to_device(rows[chosen], device), _to_device(columns[chosen], device)
        groups.append(SequenceGroup(len(place), keys, row, begins, key_mask))
    is_identity = len(groups) == 1 and groups[0].shape == begin.shape
    return SequenceLayout(groups, _to_device(torch.cat(sources), device), _to_device(slot, device), is_identity)


def _to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy to the device without waiting; CUDA has read memory that is not pinned when the call returns."""
    return tensor.to(device, non_blocking=True)


def _of_similar_length(lengths: Tensor) -> Iterator[Tensor]:
    """Yield the indices of sequences whose lengths lie between the same powers of two: less than half is padding."""
    exponent = torch.frexp((lengths - 1).double()).exponent
    for value in exponent.unique():
        yield (exponent == value).nonzero().squeeze(1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    layout: SequenceLayout,
    span: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `ops.attention` within each of the packed sequences; differentiable, memory O(T).

    Args:
        query: (B, H, T, D).
        key: (B, Hkv, T, D).
        value: (B, Hkv, T, Dv).
        log_scale: (H) or (B, H), as in `ops.attention`; all sequences of a row share its scales.
        layout: of the rows.
        span: (B, 2) int64, positions in the rows: the keys [first, end) are scaled, for queries that see them, in
            place of the sequences' initial tokens.
        scale: factor of the logits, default D ** -0.5.

    Returns:
        output (B, H, T, Dv).
    """
    outputs = []
    for group, (q, k, v) in layout.split(query, key, value):
        outputs.append(ops.attention(q, k, v, group.log_scale(log_scale), **group.geometry(span), scale=scale)[0])
    return layout.join(outputs, query.shape[0])


def _tokens(tensor: Tensor) -> Tensor:
    """(B, H, T, D) -> (B * T, H, D)."""
    return tensor.transpose(1, 2).flatten(0, 1)
