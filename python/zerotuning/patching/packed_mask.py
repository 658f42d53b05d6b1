"""Reading a PackedMask out of transformers' mask function, in place of evaluating the function for every query and key.

transformers composes mask functions from closures. All closures of one factory share a code object that no other
function has. This code object identifies the factory of a closure. The closure's captured variables are the factory's
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from zerotuning.attention.mask_encoding import PackedMask
from zerotuning.attention.packed_sequences import store_layout


def _code_of_closures(factory_name: str, *arguments: Any) -> CodeType | None:
    """Return the code object of a factory's closures; None if this version of transformers has no such factory."""
    try:
        return getattr(masking_utils, factory_name)(*arguments).__code__  # type: ignore[no-any-return]
    except (AttributeError, TypeError):
        return None


_ANY_NUMBERS = torch.zeros(1, 1, dtype=torch.long)
_INTERSECTION = _code_of_closures("and_masks", masking_utils.causal_mask_function)
_SLIDING_WINDOW = _code_of_closures("sliding_window_overlay", 1)
_SAME_SEQUENCE = _code_of_closures("packed_sequence_mask_function", _ANY_NUMBERS)
_AT_POSITIONS = _code_of_closures(
    "remap_positions_for_packed_sequence", masking_utils.causal_mask_function, _ANY_NUMBERS
)


@dataclass
class _Conditions:
    """The conditions that a mask function sets for a query to see a key."""

    causal: bool = False
    windows: list[int] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)  # (B, T) sequence numbers, which must be equal
    positions: list[Tensor] = field(default_factory=list)  # (B, T), compared in place of columns by causal and window


def _captured_variables(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _add_conditions(function: Any, conditions: _Conditions, at_positions: bool = False) -> bool:
    """Add the conditions of a mask function; False for a function that has parts of other factories."""
    if function is masking_utils.causal_mask_function:
        conditions.causal = True
        return True
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    if code is _INTERSECTION:
        parts = _captured_variables(function)["mask_functions"]
        return all(_add_conditions(part, conditions, at_positions) for part in parts)
    if code is _SLIDING_WINDOW:
        conditions.windows.append(_captured_variables(function)["sliding_window"])
        return True
    if at_positions:  # the parts below compare columns, not positions
        return False
    if code is _SAME_SEQUENCE:
        conditions.sequences.append(_captured_variables(function)["packed_sequence_mask"])
        return True
    if code is _AT_POSITIONS:
        captured = _captured_variables(function)
        conditions.positions.append(captured["position_ids"])
        return _add_conditions(captured["mask_function"], conditions, at_positions=True)
    return False


def _packing_conditions(function: Any) -> _Conditions | None:
    """The conditions of a mask function that is causal, packed and perhaps windowed; None for every other function."""
    conditions = _Conditions()
    try:
        is_read = _add_conditions(function, conditions)
    except KeyError:  # this version of transformers names the captured variables differently
        return None
    is_packed = conditions.causal and len(conditions.sequences) == 1 and len(conditions.positions) <= 1
    has_plain_windows = all(type(window) is int and window > 0 for window in conditions.windows)
    return conditions if is_read and is_packed and has_plain_windows and _factories_are_as_expected() else None


@lru_cache(maxsize=1)
def _factories_are_as_expected() -> bool:
    """Whether transformers' factories, which another version may change, make the masks that this module reads.

    The check runs once in a process, on a row of seven tokens in two sequences with a window of three.
    """
    if None in (_INTERSECTION, _SLIDING_WINDOW, _SAME_SEQUENCE):
        return False
    sequence = torch.tensor([[0, 0, 0, 0, 0, 1, 1]], device="cpu")
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1]], device="cpu")
    within = masking_utils.and_masks(masking_utils.sliding_window_overlay(3), masking_utils.causal_mask_function)
    if _AT_POSITIONS is not None:
        within = masking_utils.remap_positions_for_packed_sequence(within, position)
    function = masking_utils.and_masks(within, masking_utils.packed_sequence_mask_function(sequence))
    row, column = torch.arange(7, device="cpu")[:, None], torch.arange(7, device="cpu")[None]
    expected = (column <= row) & (column > row - 3) & (sequence[0, row] == sequence[0, column])
    batch = torch.zeros_like(row)
    return torch.equal(function(batch, batch, row, column), expected)


def read_packed_mask(
    mask_function: Any, attention_mask: Tensor | None, batch: int, length: int, device: torch.device | str
) -> Tensor | None:
    """Read and encode the mask of packed sequences, and store its layout for the layers; waits once for a GPU.

    Args:
        mask_function: as transformers hands it to the functions of `AttentionMaskInterface`.
        attention_mask: (batch, length), 0 for padding; None: all tokens are real.
        batch: number of rows.
        length: number of tokens in a row; its queries are all of its keys.
        device: of the result.

    Returns:
        The encoded PackedMask. None for masks that are not exactly causal, packed and perhaps windowed, and while a
        graph is traced or captured, since the lengths of the sequences are unknown then.
    """
    if torch.compiler.is_compiling():
        return None
    conditions = _packing_conditions(mask_function)
    is_tracing = getattr(masking_utils, "is_tracing", None)
    if conditions is None or is_tracing is None or is_tracing(conditions.sequences[0]):
        return None
    real = torch.ones(1, length, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
    of_tokens = [*conditions.sequences, real, *conditions.positions]
    if not all(_has_row_shape(tensor, batch, length) for tensor in of_tokens):
        return None
    of_tokens = [tensor.to(device, torch.long).expand(batch, length) for tensor in of_tokens]
    sequence, real, *positions = torch.stack(of_tokens).cpu()
    begin = _sequence_starts(sequence, positions)
    if begin is None:
        return None
    window = torch.full_like(begin, min(conditions.windows, default=0))
    mask = PackedMask(torch.stack((begin, (real != 0).long(), window), dim=-1))
    # The copy does not wait for the GPU. CUDA has read memory that is not pinned when the call returns.
    encoded = mask.encode().to(device, non_blocking=True)
    store_layout(encoded, mask)
    return encoded


def _has_row_shape(tensor: Tensor, batch: int, length: int) -> bool:
    return tuple(tensor.shape) in ((1, length), (batch, length)) and not tensor.is_floating_point()


def _sequence_starts(sequence: Tensor, positions: list[Tensor]) -> Tensor | None:
    """Where each token's sequence begins in its row, (B, T), from the sequence numbers (B, T).

    None if a sequence's tokens are not adjacent, or if its positions do not count up by one: such a mask is not that of
    packed sequences.
    """
    step = sequence.diff(dim=1)
    if bool((step < 0).any()) or any(bool((p.diff(dim=1)[step == 0] != 1).any()) for p in positions):
        return None
    begins = torch.nn.functional.pad(step != 0, (1, 0), value=True)
    return torch.where(begins, torch.arange(sequence.shape[1], device="cpu"), 0).cummax(dim=1).values
