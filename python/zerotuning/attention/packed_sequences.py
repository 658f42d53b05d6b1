"""Packed sequences: several in one row of the batch, none of which sees another; each has an initial token of its own.

transformers says so in a mask function, which it would have evaluated for every query and key. Here that function is
recognised from the parts that it is made of, and what it says is written down in O(T) numbers, the code. The attention
function then lays the sequences out as a batch of their own, padded on the right, and hands that to `ops.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils

from zerotuning import ops

#: Numbers of each token in a code: where its sequence begins in the row, whether it is real, the window (0: none).
COLUMNS = 3


# Recognising the mask function. transformers builds it from closures; a closure is known by its code object, which all
# results of one factory share and nothing else has, and what it captured says the rest.


def _made_by(factory_name: str, *arguments: Any) -> CodeType | None:
    """The code object of what a factory of transformers makes; None where this version has no such factory."""
    try:
        return getattr(masking_utils, factory_name)(*arguments).__code__  # type: ignore[no-any-return]
    except (AttributeError, TypeError):
        return None


_ANY = torch.zeros(1, 1, dtype=torch.long)
_INTERSECTION = _made_by("and_masks", masking_utils.causal_mask_function)
_WINDOW = _made_by("sliding_window_overlay", 1)
_SAME_SEQUENCE = _made_by("packed_sequence_mask_function", _ANY)
_AT_POSITIONS = _made_by("remap_positions_for_packed_sequence", masking_utils.causal_mask_function, _ANY)


@dataclass
class _Demands:
    """What a mask function demands of a query and a key that it lets see each other."""

    causal: bool = False
    windows: list[int] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)  # [B, T] numbers of sequences, which must be equal
    positions: list[Tensor] = field(default_factory=list)  # [B, T] in place of columns in causal and window


def _captured(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _add_demands(function: Any, demands: _Demands, at_positions: bool = False) -> bool:
    """Adds what `function` demands; False for a function that is not made of the known parts alone."""
    if function is masking_utils.causal_mask_function:
        demands.causal = True
        return True
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    if code is _INTERSECTION:
        return all(_add_demands(part, demands, at_positions) for part in _captured(function)["mask_functions"])
    if code is _WINDOW:
        demands.windows.append(_captured(function)["sliding_window"])
        return True
    if at_positions:  # the parts below take columns, not positions
        return False
    if code is _SAME_SEQUENCE:
        demands.sequences.append(_captured(function)["packed_sequence_mask"])
        return True
    if code is _AT_POSITIONS:
        captured = _captured(function)
        demands.positions.append(captured["position_ids"])
        return _add_demands(captured["mask_function"], demands, at_positions=True)
    return False


def _demands_of_packing(function: Any) -> _Demands | None:
    """The demands of a mask function that is causal, packed and perhaps windowed; None for every other."""
    demands = _Demands()
    try:
        known = _add_demands(function, demands)
    except KeyError:  # a version of transformers that names what its closures capture otherwise
        return None
    packed = demands.causal and len(demands.sequences) == 1 and len(demands.positions) <= 1
    windowed = all(type(window) is int and window > 0 for window in demands.windows)
    return demands if known and packed and windowed and _parts_mean_what_they_did() else None


@lru_cache(maxsize=1)
def _parts_mean_what_they_did() -> bool:
    """Whether the parts, which another version of transformers may change, still say what is read from them here.

    Tried once in a process, on a row of seven tokens in two sequences with a window of three.
    """
    if None in (_INTERSECTION, _WINDOW, _SAME_SEQUENCE):
        return False
    sequence = torch.tensor([[0, 0, 0, 0, 0, 1, 1]], device="cpu")
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1]], device="cpu")
    within = masking_utils.and_masks(masking_utils.sliding_window_overlay(3), masking_utils.causal_mask_function)
    if _AT_POSITIONS is not None:
        within = masking_utils.remap_positions_for_packed_sequence(within, position)
    function = masking_utils.and_masks(within, masking_utils.packed_sequence_mask_function(sequence))
    row, column = torch.arange(7, device="cpu")[:, None], torch.arange(7, device="cpu")[None]
    want = (column <= row) & (column > row - 3) & (sequence[0, row] == sequence[0, column])
    batch = torch.zeros_like(row)
    return torch.equal(function(batch, batch, row, column), want)


# The code.


def packed_code(
    mask_function: Any, attention_mask: Tensor | None, batch: int, length: int, device: torch.device | str
) -> Tensor | None:
    """What a mask function of packed sequences says, in O(T) numbers; waits once for a GPU.

    Args:
        mask_function: as transformers hands it to the functions of `AttentionMaskInterface`.
        attention_mask: (batch, length), 0 for padding; None: all tokens are real.
        batch, length: the shape of the rows, whose queries are all of their keys.

    Returns:
        int64 (batch, 1, length, COLUMNS) on `device`; None for masks that are not exactly causal, packed and perhaps
        windowed, and while a graph is traced or captured, where the lengths of the sequences cannot be known.
    """
    if torch.compiler.is_compiling() or length == 1:  # one token's code would look like another mask
        return None
    demands = _demands_of_packing(mask_function)
    is_tracing = getattr(masking_utils, "is_tracing", None)
    if demands is None or is_tracing is None or is_tracing(demands.sequences[0]):
        return None
    real = torch.ones(1, length, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
    columns = [*demands.sequences, real, *demands.positions]
    if not all(_is_column(column, batch, length) for column in columns):
        return None
    columns = [column.to(device, torch.long).expand(batch, length) for column in columns]
    sequence, real, *positions = torch.stack(columns).cpu()
    begin = _beginnings(sequence, positions)
    if begin is None:
        return None
    window = torch.full_like(begin, min(demands.windows, default=0))
    on_host = torch.stack((begin, (real != 0).long(), window), dim=-1)[:, None]
    code = _moved(on_host, device)
    _layouts[code] = lay_out(on_host, code.device)
    return code


def _is_column(tensor: Tensor, batch: int, length: int) -> bool:
    return tuple(tensor.shape) in ((1, length), (batch, length)) and not tensor.is_floating_point()


def _beginnings(sequence: Tensor, positions: list[Tensor]) -> Tensor | None:
    """Where each token's sequence begins in its row, from the numbers of the sequences, (B, T).

    None for sequences that are torn and for positions that do not count up in them: they make another mask.
    """
    step = sequence.diff(dim=1)
    if bool((step < 0).any()) or any(bool((p.diff(dim=1)[step == 0] != 1).any()) for p in positions):
        return None
    begins = torch.nn.functional.pad(step != 0, (1, 0), value=True)
    return torch.where(begins, torch.arange(sequence.shape[1], device="cpu"), 0).cummax(dim=1).values


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
