"""Encoding and decoding masks: each kind comes back as it was, and tensors of other kinds are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packings import PACKINGS, packed_mask
from torch import Tensor
from zerotuning import ops
from zerotuning.attention.mask_encoding import CallerMask, DenseMask, KeyMask, decode
from zerotuning.errors import ZeroTuningError

LENGTHS = [1, 2, 3, 7, 8, 9, 16, 40, 1000]


def real_keys(keys: int) -> Tensor:
    """Return a (4, keys) mask: no padding, left padding, a hole, padding alone."""
    real = torch.arange(keys) >= torch.tensor([0, keys // 2, 0, keys])[:, None]
    real[2, keys // 3 :: 5] = False
    return real


def with_positions(real: Tensor, query_start: int) -> KeyMask:
    first = real.int().argmax(dim=1)
    return KeyMask(real, torch.stack((first, first + 1), dim=1), torch.full((len(real),), query_start))


@pytest.mark.parametrize("keys", LENGTHS)
def test_a_key_mask_comes_back_as_it_was(keys) -> None:
    mask = KeyMask(real_keys(keys))
    decoded = decode(mask.encode(), min(keys, 5), keys)
    assert isinstance(decoded, KeyMask)
    assert torch.equal(decoded.key_mask, mask.key_mask.byte())
    assert decoded.span is None
    assert decoded.query_start is None


@pytest.mark.parametrize("keys", LENGTHS)
def test_a_key_mask_with_positions_comes_back_as_it_was(keys) -> None:
    mask = with_positions(real_keys(keys), keys - 1)
    decoded = decode(mask.encode(), 1, keys)
    assert isinstance(decoded, KeyMask)
    assert torch.equal(decoded.key_mask, mask.key_mask.byte())
    assert torch.equal(decoded.span, mask.span)
    assert torch.equal(decoded.query_start, mask.query_start)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("keys", LENGTHS)
def test_the_operator_writes_the_same_encoding_as_python(keys, device) -> None:
    real = real_keys(keys)
    longer = torch.nn.functional.pad(real, (0, 3), value=True)
    for attention_mask in (real, longer, real.T.contiguous().T, real[1:2]):
        want = with_positions(attention_mask[:, :keys], keys - 1).encode()
        assert torch.equal(ops.encode_key_mask(attention_mask.to(device), keys, keys - 1).cpu(), want)
        # Keys without a column are not written yet.
        padded = torch.nn.functional.pad(attention_mask, (0, 9))
        encoded = ops.encode_key_mask(attention_mask.to(device), padded.shape[1], 2)
        assert torch.equal(encoded.cpu(), with_positions(padded, 2).encode())


@pytest.mark.parametrize("packing", [*PACKINGS.values(), [[1], [1]]])
def test_a_packed_mask_comes_back_as_it_was(packing) -> None:
    begin, real, window = packed_mask(packing, window=3).unbind()
    for row, lengths in enumerate(packing):
        starts = [sum(lengths[:n]) for n, length in enumerate(lengths) for _ in range(length)]
        assert begin[row].tolist() == starts
    assert bool((real == 1).all())
    assert bool((window == 3).all())


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 1, 1, 9), (2, 1, 5, 9), (1, 1, 9, 9)])
def test_a_dense_mask_comes_back_as_it_was(shape) -> None:
    torch.manual_seed(0)
    visible = torch.rand(shape) > 0.4
    mask = DenseMask(visible, visible & (torch.rand(shape) > 0.5))
    decoded = decode(mask.encode(), *shape[2:])
    assert isinstance(decoded, DenseMask)
    assert all(map(torch.equal, decoded, mask))


def encodings(queries: int, keys: int) -> dict[str, Tensor]:
    visible = torch.ones(4, 1, queries, keys, dtype=torch.bool)
    return {
        "KeyMask": KeyMask(real_keys(keys)).encode(),
        "KeyMask with positions": with_positions(real_keys(keys), 0).encode(),
        "PackedMask": packed_mask([[queries]] * 4).encode(),
        "DenseMask": DenseMask(visible, visible).encode(),
    }


@pytest.mark.parametrize("queries", [1, 2, 3, 9])
@pytest.mark.parametrize("keys", [1, 2, 3, 4, 9, 16])
def test_dtype_and_shape_alone_tell_the_kinds_apart(queries, keys) -> None:
    for name, encoded in encodings(queries, keys).items():
        for same in (encoded, encoded.clone(), encoded.to("cpu", copy=True), torch.empty_like(encoded, device="meta")):
            assert type(decode(same, queries, keys)).__name__ == name.split()[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 1, 1, 9), (4, 1, 9, 9), (4, 4, 9, 9), (1, 1, 4, 12), (1, 1, 12, 9), (2, 4, 9, 1)]
)
def test_integer_masks_of_the_callers_own_are_refused(shape, dtype) -> None:
    with pytest.raises(ZeroTuningError, match=f"attention_mask must be bool or floating point.* got {dtype}"):
        decode(torch.ones(shape, dtype=dtype), shape[2], shape[3] if shape[3] > 1 else 9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_over_a_single_key_an_integer_mask_of_the_callers_own_hides_the_key_by_0(dtype) -> None:
    mask: Any = decode(torch.tensor([1, 0], dtype=dtype).view(2, 1, 1, 1), 1, 1)
    visible = mask.key_mask if isinstance(mask, KeyMask) else mask.visible
    assert visible.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("name", encodings(9, 9))
def test_a_mask_of_another_length_is_refused(name) -> None:
    encoded = encodings(9, 9)[name]
    queries, keys = (9, 17) if name.startswith("KeyMask") else (10, 9)
    with pytest.raises(ZeroTuningError, match=rf"attention_mask must be the .* of {queries} queries and {keys} keys"):
        decode(encoded, queries, keys)


def test_a_callers_own_mask_is_passed_on_unchanged() -> None:
    for mask in (torch.ones(2, 1, 4, 9, dtype=torch.bool), torch.zeros(2, 3, 4, 9), torch.zeros(1, 1, 1, 1)):
        decoded = decode(mask, mask.shape[2], mask.shape[3])
        assert isinstance(decoded, CallerMask)
        assert decoded.mask is mask
    with pytest.raises(ZeroTuningError, match=r"must be \[B, 1, Tq, Tk\] with Tk = 8, got \[2, 1, 4, 9\]"):
        decode(torch.zeros(2, 1, 4, 9), 4, 8)


def test_a_decoded_key_mask_follows_what_is_written_into_its_tensor() -> None:
    encoded = with_positions(real_keys(9), 8).encode()
    decoded = decode(encoded, 1, 9)
    assert decode(encoded, 1, 9) is decoded
    other = with_positions(~real_keys(9), 5)
    encoded.copy_(other.encode())
    assert isinstance(decoded, KeyMask)
    assert torch.equal(decoded.key_mask, other.key_mask.byte())
    assert torch.equal(decoded.query_start, other.query_start)
