"""Packed sequences: several in one row of the batch, none of which sees another; each has an initial token of its own.

transformers says so in a mask function, which it would have evaluated for every query and key. Here that function is
recognised from the parts that it is made of, and what it says is written down in O(T) numbers, the code. The attention
function then lays the sequences out as a batch of their own, padded on the right, and hands that to `ops.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zerotuning import ops

#: Numbers of each token in a code: where its sequence begins in the row, whether it is real, the window (0: none).
COLUMNS = 3


def beginnings_in(visible: Tensor) -> Tensor:
    """Where each token's sequence begins, (B, T), from which keys a query sees, bool (B, T, T): one that does not see the
    key before it begins a sequence."""
    begins = torch.nn.functional.pad(~visible.diagonal(offset=-1, dim1=-2, dim2=-1), (1, 0), value=True)
    return torch.where(begins, torch.arange(visible.shape[-1], device=visible.device), 0).cummax(dim=-1).values


def is_packed_code(mask: Tensor, query: Tensor) -> bool:
    """Whether the mask that reached a layer is a code of `packed_code` for its queries (B, H, T, D)."""
    return mask.dtype == torch.long and mask.shape[1:] == (1, query.shape[2], COLUMNS) and query.shape[2] > 1


def dense_codes(code: Tensor) -> Tensor:
    """What a code says, one number a query and key: int8 (B, 1, T, T), 0 hidden, 1 visible, 2 visible and scaled.

    For layers that are compiled alone: the shapes in a graph must not depend on the lengths of the sequences.
    """
    begin, real, window = code[:, 0].unbind(-1)
    column = torch.arange(code.shape[2], device=code.device)
    row = column[:, None]
    visible = (begin[:, :, None] == begin[:, None]) & (column <= row) & (real[:, None] != 0)
    visible = visible & ((column > row - window[:, :, None]) | (window[:, :, None] == 0))
    seen = real.cumsum(dim=1)  # real tokens of the row up to and with each
    before = (seen - real).gather(1, begin)
    initial = (real != 0) & (seen - before == 1)
    return (visible.to(torch.int8) + (visible & initial[:, None]).to(torch.int8))[:, None]


# The layout: which token of the rows lies where in the batch of sequences. The same for all layers of a forward pass.


@dataclass
class Group:
    """Sequences of about one length, which one call of the operator attends to."""

    longest: int
    window: int  # keys that a query sees, its own included; 0: all
    row: Tensor  # [sequences] the row of the batch that each came from
    begin: Tensor  # [sequences] where it begins there
    key_mask: Tensor | None  # [sequences, longest] bool; None: all tokens are real

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row), self.longest

    def geometry(self, span: Tensor | None) -> dict[str, Any]:
        """Arguments of `ops.attention`; span: in the rows, (B, 2)."""
        if span is not None:  # the part of its row's span that lies in each sequence, counted from its beginning
            span = (span.index_select(0, self.row) - self.begin[:, None]).clamp(0, self.longest)
        return {"key_mask": self.key_mask, "span": span, "window": self.window}

    def log_scale(self, of_rows: Tensor) -> Tensor:
        """From [H] or [B, H], for the sequences: all of a row share its scales."""
        return of_rows if of_rows.dim() == 1 else of_rows.index_select(0, self.row)


@dataclass
class Layout:
    """Groups that hold all sequences of the rows. Their slots laid end to end are the tokens of the rows, some repeated."""

    groups: list[Group]
    source: Tensor  # [slots] the token of the rows laid end to end that each slot gets
    slot: Tensor  # [B * T] the slot of each token
    whole: bool  # each row is one sequence, and they are the one group

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Group, list[Tensor]]]:
        """Tensors (B, H, T, D) as each group's (sequences, H, longest, D)."""
        if self.whole:
            yield self.groups[0], list(tensors)
        else:
            yield from self._cut([_tokens(tensor).index_select(0, self.source) for tensor in tensors])

    def parts_of_gradient(self, gradient: Tensor) -> Iterator[Tensor]:
        """The same of an output's gradient, of which repeated tokens get none."""
        if self.whole:
            yield gradient
            return
        tokens = _tokens(gradient)
        slots = tokens.new_zeros(len(self.source), *tokens.shape[1:]).index_copy(0, self.slot, tokens)
        yield from (part for _, (part,) in self._cut([slots]))

    def _cut(self, slots: list[Tensor]) -> Iterator[tuple[Group, list[Tensor]]]:
        sizes = [sequences * longest for sequences, longest in (group.shape for group in self.groups)]
        for group, *parts in zip(self.groups, *(tensor.split(sizes) for tensor in slots), strict=True):
            yield group, [part.unflatten(0, group.shape).transpose(1, 2) for part in parts]

    def rows(self, parts: list[Tensor], batch: int) -> Tensor:
        """The way back, to (B, H, T, D)."""
        if self.whole:
            return parts[0]
        slots = [_tokens(part) for part in parts]
        together = slots[0] if len(slots) == 1 else torch.cat(slots)
        return together.index_select(0, self.slot).unflatten(0, (batch, -1)).transpose(1, 2)


#: The layout of each code that is in use: making one waits for a GPU, which the layers must not do.
_layouts: Any = WeakTensorKeyDictionary()


def known_layout(code: Tensor) -> Layout | None:
    """The layout that was made with a code; None for a copy of it."""
    return _layouts.get(code)  # type: ignore[no-any-return]


def keep_layout(code: Tensor, on_host: Tensor) -> None:
    """Make the layout of a code from its copy on the CPU, and keep it as long as the code."""
    _layouts[code] = lay_out(on_host, code.device)


def _layout_of(code: Tensor) -> Layout:
    layout = known_layout(code)
    if layout is None:  # a copy of the code: the layer is on another device than the mask was made on
        layout = _layouts[code] = lay_out(code.cpu(), code.device)
    return layout


def lay_out(code: Tensor, device: torch.device) -> Layout:
    """The layout of a code on the CPU, for layers on `device`."""
    begin, real, window = code[:, 0].unbind(-1)
    rows, columns = (begin == torch.arange(begin.shape[1], device="cpu")).nonzero(as_tuple=True)
    first = rows * begin.shape[1] + columns  # tokens are counted through all rows
    lengths = torch.cat((first, first.new_tensor([begin.numel()]))).diff()
    groups, sources = [], []
    slot, slots = torch.empty_like(begin).flatten(), 0
    for chosen in _of_similar_length(lengths):
        place = torch.arange(int(lengths[chosen].max()), device="cpu")
        last = lengths[chosen, None] - 1
        # Slots beyond the end repeat the last token. No real query sees them, since they come later; what they give is
        # dropped, so that they get no gradient and give none.
        source = first[chosen, None] + torch.minimum(place, last)
        filled = place <= last
        slot[source[filled]] = slots + filled.flatten().nonzero().squeeze(1)
        slots += source.numel()
        sources.append(source.flatten())
        is_real = real.flatten()[source] != 0
        key_mask = None if bool(is_real.all()) else _moved(is_real, device)
        keys = int(window[0, 0]) if int(window[0, 0]) < len(place) else 0
        groups.append(Group(len(place), keys, _moved(rows[chosen], device), _moved(columns[chosen], device), key_mask))
    whole = len(groups) == 1 and groups[0].shape == begin.shape
    return Layout(groups, _moved(torch.cat(sources), device), _moved(slot, device), whole)


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device, made without waiting for it (memory that is not pinned has been read when this returns)."""
    return tensor.to(device, non_blocking=True)


def _of_similar_length(lengths: Tensor) -> Iterator[Tensor]:
    """Indices of the sequences whose lengths lie between the same powers of two, so that less than half is padding."""
    exponent = torch.frexp((lengths - 1).double()).exponent
    for value in exponent.unique():
        yield (exponent == value).nonzero().squeeze(1)


# Attention.


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    code: Tensor,
    span: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`ops.attention` within each of the packed sequences; differentiable, memory O(T).

    Args:
        query (B, H, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), log_scale, scale: as in `ops.attention`; all
            sequences of a row share its scales.
        code: of `packed_code`.
        span: (B, 2) int64, places in the rows: the keys [first, end) are scaled, for the queries that see them, in place
            of the sequences' initial tokens.

    Returns:
        output (B, H, T, Dv).
    """
    layout = _layout_of(code)
    outputs = []
    for group, (q, k, v) in layout.parts(query, key, value):
        outputs.append(ops.attention(q, k, v, group.log_scale(log_scale), **group.geometry(span), scale=scale)[0])
    return layout.rows(outputs, query.shape[0])


def _tokens(tensor: Tensor) -> Tensor:
    """(B, H, T, D) -> (B * T, H, D)."""
    return tensor.transpose(1, 2).flatten(0, 1)
