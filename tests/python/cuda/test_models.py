"""Patched models on a GPU: logits, head gradients, packed sequences, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formula import error, random_inputs
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, masking_utils
from zerotuning.attention import dense_masks, packed_sequences
from zerotuning.patching import packed_mask
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import apply_scales, head_parameters, patch, unpatch

pytestmark = pytest.mark.gpu


def tiny_llama(**settings: Any) -> Any:
    torch.manual_seed(5)
    values: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        **settings,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False).to("cuda")


def random_scales() -> HeadScales:
    torch.manual_seed(6)
    return HeadScales(torch.exp(torch.randn(3, 4)).cpu())


def test_a_patched_model_gives_the_logits_of_sdpa_and_of_the_cpu() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 500, (3, 200))
    mask = (torch.arange(200) >= torch.tensor([0, 7, 150])[:, None]).long()
    with torch.no_grad():
        plain = [model(ids).logits, model(ids, attention_mask=mask).logits]
        patch(model)
        patched = [model(ids).logits, model(ids, attention_mask=mask).logits]
        model.double()
        exact = [model(ids).logits, model(ids, attention_mask=mask).logits]
        model.bfloat16()
        for a, b, c in zip(patched, plain, exact, strict=True):  # no further from float64 than sdpa is
            assert (a.double() - c)[mask > 0].norm() <= 1.2 * (b.double() - c)[mask > 0].norm()
        apply_scales(model, random_scales())
        tuned = model.float()(ids, attention_mask=mask).logits
        on_cpu = model.cpu()(ids.cpu(), attention_mask=mask.cpu()).logits.cuda()
    torch.testing.assert_close(tuned[mask > 0], on_cpu[mask > 0], rtol=1e-3, atol=1e-3)
    unpatch(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_head_gradients_equal_those_in_float64(checkpointing) -> None:
    model = patch(tiny_llama())
    apply_scales(model, random_scales())
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
        model.enable_input_require_grads()
    ids = torch.randint(0, 500, (3, 120))
    mask = (torch.arange(120) >= torch.tensor([0, 7, 100])[:, None]).long()

    def gradients() -> Tensor:
        with head_parameters(model) as parameters:
            loss = model(ids, attention_mask=mask).logits[:, -1].float().log_softmax(-1)[:, 3].sum()
            return torch.stack(torch.autograd.grad(loss, parameters)).double()

    got = gradients()
    model.double()
    wanted = gradients()
    assert ((got - wanted).norm() / wanted.norm()).item() < 0.05


def packed_batch() -> tuple[Tensor, Tensor]:
    """input_ids and position_ids of three rows of 200 tokens: sequences of several lengths, 1 token, a whole row."""
    lengths = [[1, 120, 3, 1, 75], [200], [50] * 4]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return torch.randint(0, 500, (3, 200)), positions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_sequences_give_the_logits_and_head_gradients_of_each_sequence_alone(dtype) -> None:
    model = patch(tiny_llama().to(dtype))
    ids, positions = packed_batch()

    def logits_alone() -> Tensor:
        rows = []
        for row, places in zip(ids, positions, strict=True):
            begins = (places == 0).nonzero().squeeze(1).tolist()
            parts = [model(part[None], use_cache=False).logits[0] for part in row.tensor_split(begins[1:])]
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def outcome(packed: bool) -> tuple[Tensor, Tensor]:
        with head_parameters(model) as parameters:
            for seed, parameter in enumerate(parameters):
                parameter.data.normal_(generator=torch.Generator("cuda").manual_seed(seed))
            logits = model(ids, position_ids=positions, use_cache=False).logits if packed else logits_alone()
            gradients = torch.autograd.grad(logits.float().log_softmax(-1)[..., 3].sum(), parameters)
        return logits.detach().double(), torch.stack(gradients).double()

    got, alone = outcome(packed=True), outcome(packed=False)
    model.double()
    for a, b, c in zip(got, alone, outcome(packed=False), strict=True):  # no further from float64 than alone
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-5 * c.norm()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_without_a_mask_follows_the_sequences_of_each_run(mode, monkeypatch) -> None:
    model = apply_scales(tiny_llama().float(), random_scales())
    ids, packed = packed_batch()
    whole = torch.arange(200).expand(3, -1)
    for name in ("attention_by_formula", "gradients_by_formula"):
        monkeypatch.delattr(dense_masks, name)  # so that a call of the slow formula fails

    def loss(positions: Tensor) -> Tensor:
        logits = model(ids, position_ids=positions, use_cache=False).logits
        return logits.log_softmax(-1)[..., 3].sum()

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    with head_parameters(model) as parameters:
        for positions in (whole, packed, packed.flip(0), whole, packed):
            want = loss(positions)
            wanted = torch.stack(torch.autograd.grad(want, parameters))
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(positions)
            gradients = torch.stack(torch.autograd.grad(got, parameters))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert error(gradients, wanted) <= 1e-3


def test_layers_of_packed_sequences_do_not_wait_for_the_gpu() -> None:
    _, positions = packed_batch()
    numbers = masking_utils.find_packed_sequence_indices(positions)
    function = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(numbers)
    )
    encoded = packed_mask.read_packed_mask(function, None, 3, 200, "cuda")
    assert encoded is not None
    layout = packed_sequences.layout_of(encoded)
    inputs = [t.requires_grad_() for t in random_inputs((3, 4, 2, 200, 200, 64, 64), torch.bfloat16)]
    grad_output = torch.randn(3, 4, 200, 64, dtype=torch.bfloat16)
    torch.autograd.grad(packed_sequences.attend(*inputs, layout), inputs, grad_output)  # plans are made at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(packed_sequences.attend(*inputs, layout), inputs, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_generation_is_the_same_with_every_cache_and_alone_or_padded() -> None:
    model = apply_scales(tiny_llama().float(), random_scales())
    ids = torch.randint(1, 500, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(input_ids=ids, attention_mask=mask, **options)
    alone = model.generate(input_ids=ids[:1, 15:], **options)
    assert torch.equal(batch[0, 40:], alone[0, 25:])
    half = model.bfloat16()
    dynamic = half.generate(input_ids=ids, attention_mask=mask, **options)
    torch._dynamo.utils.counters.clear()
    static = half.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **options)
    assert (dynamic == static).float().mean().item() > 0.95
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] > 0  # transformers compiles the steps, with CUDA graphs
    assert not counted["graph_break"]
    assert not counted["inductor"]["cudagraph_skips"]


def test_a_decoding_step_does_not_wait_for_the_gpu() -> None:
    model = apply_scales(tiny_llama(), random_scales())
    ids = torch.randint(1, 500, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        step, longer = ids[:, :1], torch.cat((mask, mask[:, :1] + 1), 1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(step, attention_mask=longer.clamp(max=1), past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
