"""Recorded passes: the shapes of recordings, and on a GPU their results against passes launched from Python."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formula import poison
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from zerotuning.calibration.batched_candidates import CandidateScorer
from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.evaluation.cuda_graphs import RecordedForward, Recordings, recorded_tokens, supports_recording
from zerotuning.evaluation.evaluate import label_scores
from zerotuning.evaluation.forward import PlainForward
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import behind_prefix, scores_behind_prefix
from zerotuning.patching.patch import head_parameters, patch
from zerotuning.tasks.task import Task


@pytest.mark.parametrize(
    ("sequences", "length", "copies", "tokens"),
    [
        (16, 128, 1, 16 * 128),  # multiples of a step stay as they are
        (16, 129, 1, 16 * 144),
        (8, 512, 1, 8 * 512),
        (9, 57, 1, 16 * 64),
        (3, 1, 1, 4 * 8),
        (6, 40, 2, 2 * 4 * 40),  # two copies of three sequences, each rounded up to four
    ],
)
def test_few_shapes_are_recorded(sequences: int, length: int, copies: int, tokens: int) -> None:
    assert recorded_tokens(torch.zeros(sequences, length), copies) == tokens


def test_a_recording_is_at_most_an_eighth_longer_than_its_batch() -> None:
    for length in range(64, 3000):
        assert length <= recorded_tokens(torch.zeros(8, length)) / 8 <= length * 9 / 8


@pytest.fixture
def gpu_model(tiny_tokenizer: Any) -> Iterator[Any]:
    """A random Llama in float32 on the GPU, whose memory is poisoned: a read of uninitialized memory gives NaN."""
    torch.manual_seed(5)
    torch.set_default_device("cuda")
    poison()
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    yield LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_device(None)


def losses_and_gradients(
    model: Any, tokenizer: Any, recorded: bool, instruction: str = "", share_prefix: bool = False
) -> tuple[list[float], list[Tensor], list[str]]:
    """Losses, head gradients and notes of 21 examples, in batches of two lengths, at three points.

    Args:
        recorded: whether passes are replayed from CUDA graphs.
        instruction: the text at the beginning of every prompt.
        share_prefix: whether the instruction is computed once per batch with gradients, and once per point without.
    """
    task = Task("reviews", prompt=instruction + "Review: {text} Sentiment:", labels=[" positive", " negative"])
    records = [{"text": "good " * (1 + n % 3 * 6), "label": n % 2} for n in range(21)]
    losses, gradients, notes = [], [], []
    with torch.device("cpu"), head_parameters(model) as parameters:
        scorer = LabelScorer(model, tokenizer, task, records, batch_size=8)
        if recorded:
            assert supports_recording(model)
            scorer = scorer.using(RecordedForward(PlainForward(model), Recordings(model, parameters, notes.append)))
        for value in (0.0, -0.7, 0.4):
            with torch.no_grad():
                for leaf in parameters:
                    leaf.fill_(value)
            for batch in scorer.batches:
                at_batch = behind_prefix(scorer) if share_prefix else scorer
                loss = F.cross_entropy(at_batch.scores(batch), batch.labels.cuda())
                gradients.append(torch.stack(torch.autograd.grad(loss, parameters)).cpu().clone())
            at_point = behind_prefix(scorer) if share_prefix else scorer
            with torch.no_grad():
                losses += [
                    float(F.cross_entropy(at_point.scores(batch), batch.labels.cuda())) for batch in scorer.batches
                ]
    return losses, gradients, notes


@pytest.mark.gpu
def test_recorded_passes_give_the_losses_and_gradients_of_launched_passes(gpu_model: Any, tiny_tokenizer: Any) -> None:
    model = patch(gpu_model)
    plain, recorded = (losses_and_gradients(model, tiny_tokenizer, way) for way in (False, True))
    assert recorded[2] == []
    torch.testing.assert_close(torch.tensor(recorded[0]), torch.tensor(plain[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(recorded[1]), torch.stack(plain[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True])
def test_the_shared_beginning_of_all_prompts_is_computed_once_per_pass(
    gpu_model: Any, tiny_tokenizer: Any, recorded: bool
) -> None:
    model = patch(gpu_model)
    instruction = "a good story, well told " * 8
    whole = losses_and_gradients(model, tiny_tokenizer, False, instruction)
    read: Counter[torch.Size] = Counter()
    hook = model.register_forward_pre_hook(
        lambda _, args, options: read.update([options["input_ids"].shape]), with_kwargs=True
    )
    losses, gradients, notes = losses_and_gradients(model, tiny_tokenizer, recorded, instruction, share_prefix=True)
    hook.remove()
    assert notes == []
    beginnings = sum(times for shape, times in read.items() if shape[0] == 1)
    rests = {shape: times for shape, times in read.items() if shape[0] > 1}
    if recorded:  # two warm-ups and one recording of each shape
        assert set(rests.values()) == {3}
        assert beginnings == sum(rests.values())
    else:  # once a batch with gradients, once for all without
        assert beginnings == 3 * (3 + 1)
        assert sum(rests.values()) == 3 * (3 + 3)
    assert max(shape[1] for shape in rests) < 40
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(whole[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(gradients), torch.stack(whole[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_recorded_batched_candidates_score_as_each_candidate_alone(gpu_model: Any, tiny_tokenizer: Any) -> None:
    model = patch(gpu_model)
    task = Task("reviews", prompt="Review: {text} Sentiment:", labels=[" positive", " negative", " none at all"])
    records = [{"text": "good " * (1 + n % 3), "label": n % 3} for n in range(21)]
    with torch.device("cpu"), head_parameters(model) as parameters:
        scorer = LabelScorer(model, tiny_tokenizer, task, records, batch_size=8)
        memory = OutOfMemoryRetry()
        candidates = CandidateScorer(model, parameters, memory)
        size = sum(len(leaf) for leaf in parameters)
        points = list(np.random.default_rng(0).normal(0.0, 0.8, (11, size)))
        expected = [
            [scores for _, _, scores in candidates.scores(scorer, [batch], [point])]
            for batch in scorer.batches
            for point in points
        ]
        recordings = Recordings(model, parameters, memory.note)
        scorer = scorer.using(RecordedForward(PlainForward(model), recordings))
        for _ in range(2):  # the first pass is recorded, the second is a replay
            found = candidates.scores(scorer, scorer.batches, points)
            assert [index for index, _, _ in found] == list(range(11)) * len(scorer.batches)
            for (_, _, scores), (one,) in zip(found, expected, strict=True):
                torch.testing.assert_close(scores, one, rtol=1e-4, atol=1e-5)
    assert memory.notes == []
    assert any(copies > 1 for _, _, copies, *_ in recordings._recorded)


@pytest.mark.gpu
def test_scores_behind_a_shared_prefix_are_those_of_whole_prompts(gpu_model: Any, tiny_tokenizer: Any) -> None:
    model = patch(gpu_model)
    task = Task("reviews", prompt="a good story, well told " * 8 + "{text}:", labels=[" positive", " none at all"])
    records = [{"text": "good " * (1 + n % 5), "label": n % 2} for n in range(21)]
    with torch.device("cpu"), head_parameters(model) as parameters, torch.no_grad():
        scorer = LabelScorer(model, tiny_tokenizer, task, records, batch_size=8)
        for leaf in parameters:
            leaf.copy_(torch.linspace(-1.0, 1.5, len(leaf)))
        whole = label_scores(scorer)
        torch.testing.assert_close(scores_behind_prefix(scorer), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_garbage_collection_of_old_graphs_does_not_disturb_a_recording(gpu_model: Any, tiny_tokenizer: Any) -> None:
    model = patch(gpu_model)
    threshold = gc.get_threshold()
    gc.collect()
    gc.disable()
    try:  # reference cycles keep earlier graphs alive, as after each search
        for _ in range(2):
            assert losses_and_gradients(model, tiny_tokenizer, True)[2] == []
        gc.enable()
        gc.set_threshold(1)  # a collection after every allocation
        assert losses_and_gradients(model, tiny_tokenizer, True)[2] == []
    finally:
        gc.enable()
        gc.set_threshold(*threshold)


@pytest.mark.gpu
def test_lengths_for_which_no_memory_is_left_are_not_recorded(
    gpu_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch(gpu_model)
    plain = losses_and_gradients(model, tiny_tokenizer, False)
    free = iter([8])  # room for the first length alone
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free, 1), 10))
    losses, gradients, notes = losses_and_gradients(model, tiny_tokenizer, True)
    assert len(set(notes)) == 1
    assert "a quarter of the GPU's memory is left" in notes[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(gradients), torch.stack(plain[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_a_model_that_cannot_be_recorded_is_calibrated_without_graphs(gpu_model: Any, tiny_tokenizer: Any) -> None:
    model = gpu_model
    inner = model.model.layers[0].mlp.forward
    # The host waits for the GPU, as models with experts do.
    model.model.layers[0].mlp.forward = lambda hidden: inner(hidden) * float(hidden.abs().max() > 0)
    patch(model)
    losses, gradients, notes = losses_and_gradients(model, tiny_tokenizer, True)
    assert len(notes) == 1
    assert "not recorded" in notes[0]
    torch.rand(3)  # the random number generator still works after a recording that failed
    plain = losses_and_gradients(model, tiny_tokenizer, False)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(gradients), torch.stack(plain[1]), rtol=1e-3, atol=1e-5)
