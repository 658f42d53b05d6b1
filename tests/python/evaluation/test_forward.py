"""Forward objects: the logits they compute and how they wrap each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zerotuning.evaluation.cuda_graphs import RecordedForward, Recordings
from zerotuning.evaluation.forward import PlainForward
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import PrefixForward, behind_prefix
from zerotuning.tasks.task import Task

TASK = Task("films", "The story is told well, and the film is good. {text}:", (" bad", " good"))
RECORDS = [{"text": text, "label": 0} for text in ("good", "a bad story", "far too long, and not well told")]


class ImmediateRecordings(Recordings):
    """Stands in for CUDA graphs: launches each pass instead of recording it."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    def supports(self, input_ids: Tensor, copies: int = 1, prefix_length: int = 0) -> bool:
        return True

    def replay(self, inputs: Any, recordable: Any, key: Any, copies: int = 1) -> Tensor:
        self.keys.append(key)
        with recordable() as compute:
            logits: Tensor = compute(inputs)
        return logits


def whole_logits(model: Any, scorer: LabelScorer) -> Tensor:
    """Logits of the last position, one unpadded prompt at a time: [3, vocabulary]."""
    return torch.stack([model(torch.tensor([example.prompt])).logits[0, -1] for example in scorer.examples])


def forwards(model: Any, scorer: LabelScorer) -> dict[str, Any]:
    return {
        "plain": PlainForward(model),
        "prefix": PrefixForward(model, scorer.shared_prefix),
        "recorded": RecordedForward(PlainForward(model), ImmediateRecordings()),
        "recorded prefix": RecordedForward(PrefixForward(model, scorer.shared_prefix), ImmediateRecordings()),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "prefix", "recorded", "recorded prefix"])
@pytest.mark.parametrize("token_ids", [None, (3, 7, 11)])
def test_every_forward_gives_the_logits_of_whole_prompts(
    tiny_model: Any, tiny_tokenizer: Any, kind: str, token_ids: tuple[int, ...] | None
) -> None:
    scorer = LabelScorer(tiny_model, tiny_tokenizer, TASK, RECORDS)
    assert len(scorer.shared_prefix) > 10
    forward = forwards(tiny_model, scorer)[kind]
    batch = scorer.prompt_batch(range(3))
    expected = whole_logits(tiny_model, scorer)
    if token_ids is not None:
        expected = expected[:, list(token_ids)]
    for _ in range(2):
        logits = forward.logits(batch, 1, token_ids)[:, -1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_a_prefix_is_cached_between_passes_unless_they_are_recorded(
    tiny_model: Any, tiny_tokenizer: Any, recorded: bool
) -> None:
    scorer = LabelScorer(tiny_model, tiny_tokenizer, TASK, RECORDS, batch_size=1)
    recordings = ImmediateRecordings()
    if recorded:
        scorer = scorer.using(RecordedForward(PlainForward(tiny_model), recordings))
    prefix_passes: list[int] = []
    tiny_model.register_forward_pre_hook(
        lambda _, args, options: prefix_passes.append(options["input_ids"].shape[1] == len(scorer.shared_prefix)),
        with_kwargs=True,
    )
    at_point = behind_prefix(scorer)
    for batch in at_point.batches:
        at_point.scores(batch)
    assert sum(prefix_passes) == (3 if recorded else 1)
    assert len({key[0] for key in recordings.keys}) == int(recorded)


@torch.no_grad()
def test_passes_that_cannot_be_recorded_are_launched_from_python(tiny_model: Any, tiny_tokenizer: Any) -> None:
    scorer = LabelScorer(tiny_model, tiny_tokenizer, TASK, RECORDS)
    recordings = Recordings(tiny_model, [torch.zeros(4)], lambda _: None)  # leaves that are not on a GPU
    other = scorer.using(RecordedForward(PlainForward(tiny_model), recordings))
    for batch in scorer.batches:
        assert torch.equal(other.scores(batch), scorer.scores(batch))


def test_a_scorer_keeps_its_forward_when_another_one_is_derived(tiny_model: Any, tiny_tokenizer: Any) -> None:
    scorer = LabelScorer(tiny_model, tiny_tokenizer, TASK, RECORDS)
    plain = scorer.forward
    other = behind_prefix(scorer)
    assert scorer.forward is plain
    assert (plain.prefix_length, other.forward.prefix_length) == (0, len(scorer.shared_prefix))
    assert other.examples is scorer.examples
