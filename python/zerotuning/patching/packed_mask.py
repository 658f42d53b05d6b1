"""Reading packed sequences from the mask function that transformers hands over, instead of evaluating it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from zerotuning.attention.packed_sequences import keep_layout

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
    code = on_host.to(device, non_blocking=True)  # read before the call returns: it is not pinned
    keep_layout(code, on_host)
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
