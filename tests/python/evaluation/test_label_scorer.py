"""Label scores against one unpadded sequence for each prompt and label, with logits at all positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.tasks.task import Task

SENTIMENT = Task("sentiment", "Review: {text}\nSentiment:", (" negative", " positive"))
# Labels of several tokens, of which the first three begin alike, and one label of one token.
WORDY = Task("wordy", "Review: {text}\nIt is a", (" good story", " good film", " good", " terribly bad", " film"))
QUIZ = Task("quiz", "{text}\n{choices}\nAnswer:", "letters")

TEXTS = [
    "the film is good",
    "a bad story",
    "far too long, and it is not well told, is it",
    "bad",
    "a good film",
]
RECORDS = [{"text": text, "label": index % 2} for index, text in enumerate(TEXTS)]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def log_probability(model: Any, tokenizer: Any, prompt: str, label: str) -> Tensor:
    """log p(label | prompt): the sum over the label's tokens, from the logits of one unpadded sequence."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + label)["input_ids"]])
    logits = model(input_ids=ids).logits[0].float()
    predicted = torch.log_softmax(logits[start - 1 : -1], dim=-1)
    return predicted.gather(1, ids[0, start:, None]).sum()


def plain_scores(model: Any, tokenizer: Any, task: Task, records: list[dict[str, Any]]) -> list[Tensor]:
    """The label log-probabilities of each example, one by one."""
    prompts = [task.render(record) for record in records]
    return [
        torch.stack([log_probability(model, tokenizer, prompt.text, label) for label in prompt.labels])
        for prompt in prompts
    ]


def all_scores(scorer: LabelScorer, *, normalized: bool = True) -> Tensor:
    score = scorer.scores if normalized else scorer.log_probabilities
    return scorer.gather([score(batch) for batch in scorer.batches])


def random_model(kind: str, tokenizer: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_single_token_labels_score_as_in_unpadded_passes_one_by_one(
    tiny_model: Any, tiny_tokenizer: Any, batch_size: int
) -> None:
    scorer = LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS, batch_size=batch_size)
    assert scorer.num_labels == 2
    assert scorer.labels.tolist() == [0, 1, 0, 1, 0]
    expected = torch.stack(plain_scores(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS))
    torch.testing.assert_close(all_scores(scorer, normalized=False), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(all_scores(scorer), expected.log_softmax(dim=-1), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_labels_of_several_tokens_score_as_in_unpadded_passes_one_by_one(
    tiny_model: Any, tiny_tokenizer: Any, batch_size: int
) -> None:
    scorer = LabelScorer(tiny_model, tiny_tokenizer, WORDY, RECORDS, batch_size=batch_size)
    assert {len(tokens) for tokens in scorer.examples[0].labels} == {1, 2, 9}
    # " good" is the beginning of " good story" and " good film"; labels of one token need no sequence of their own.
    assert len(scorer.examples[0].beginnings) == 2
    expected = torch.stack(plain_scores(tiny_model, tiny_tokenizer, WORDY, RECORDS))
    torch.testing.assert_close(all_scores(scorer, normalized=False), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(all_scores(scorer), expected.log_softmax(dim=-1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_letters_score_each_examples_own_choices(tiny_model: Any, tiny_tokenizer: Any) -> None:
    records = [
        {"text": "Which?", "choices": ["good", "bad", "long"], "label": 2},
        {"text": "Which is the film", "choices": ["good", "bad"], "label": 0},
        {"text": "?", "choices": ["a", "b", "c", "d"], "label": 3},
    ]
    expected = plain_scores(tiny_model, tiny_tokenizer, QUIZ, records)
    scores = all_scores(LabelScorer(tiny_model, tiny_tokenizer, QUIZ, records))
    assert scores.shape == (3, 4)
    for row, own in zip(scores, expected, strict=True):
        torch.testing.assert_close(row[: len(own)], own.log_softmax(dim=-1), atol=1e-4, rtol=0)
        assert bool((row[len(own) :] == -torch.inf).all())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}),
        ("phi", {}),
        ("gpt_neox", {}),
        ("qwen3", {"head_dim": 8}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
def test_a_models_scaling_and_softcapping_of_its_logits_still_apply(
    kind: str, changes: dict[str, Any], tiny_tokenizer: Any
) -> None:
    model = random_model(kind, tiny_tokenizer, **changes)
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    scores = all_scores(LabelScorer(model, tiny_tokenizer, SENTIMENT, RECORDS))
    expected = torch.stack(plain_scores(model, tiny_tokenizer, SENTIMENT, RECORDS)).log_softmax(dim=-1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_only_the_last_position_and_the_labels_rows_are_computed(tiny_model: Any, tiny_tokenizer: Any) -> None:
    shapes = []
    tiny_model.register_forward_hook(lambda model, inputs, output: shapes.append(tuple(output.logits.shape)))
    all_scores(LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS))
    assert shapes == [(5, 1, 2)]
    shapes.clear()
    all_scores(LabelScorer(tiny_model, tiny_tokenizer, WORDY, RECORDS))
    assert shapes == [(10, 9, len(tiny_tokenizer))]


def test_the_output_layer_is_put_back_even_after_an_error(tiny_model: Any, tiny_tokenizer: Any) -> None:
    head = tiny_model.lm_head
    scorer = LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS)
    all_scores(scorer)
    assert tiny_model.lm_head is head

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = tiny_model.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        all_scores(scorer)
    handle.remove()
    assert tiny_model.lm_head is head


@torch.no_grad()
def test_an_output_layer_that_is_not_a_plain_linear_layer_is_not_replaced(tiny_model: Any, tiny_tokenizer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    doubled = Doubled(32, len(tiny_tokenizer), bias=False)
    doubled.weight = tiny_model.lm_head.weight
    tiny_model.lm_head = doubled
    scores = all_scores(LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS))
    expected = torch.stack(plain_scores(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS)).log_softmax(dim=-1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_model_that_cannot_keep_fewer_logits_gives_the_same_scores(tiny_model: Any, tiny_tokenizer: Any) -> None:
    class Older(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.config = inner.config

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
            return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)

    for task in (SENTIMENT, WORDY):
        scores = all_scores(LabelScorer(Older(tiny_model), tiny_tokenizer, task, RECORDS))
        expected = all_scores(LabelScorer(tiny_model, tiny_tokenizer, task, RECORDS))
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("task", [SENTIMENT, WORDY], ids=["one token", "several tokens"])
def test_scores_are_differentiable_and_make_no_weight_gradients(
    task: Task, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    parameter = tiny_model.model.layers[0].input_layernorm.weight.requires_grad_()
    scorer = LabelScorer(tiny_model, tiny_tokenizer, task, RECORDS, batch_size=4)
    picked = all_scores(scorer).gather(1, scorer.labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(picked, parameter)
    plain = torch.stack(plain_scores(tiny_model, tiny_tokenizer, task, RECORDS)).log_softmax(dim=-1)
    (expected,) = torch.autograd.grad(plain.gather(1, scorer.labels[:, None]).sum(), parameter)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    assert all(weight.grad is None for weight in tiny_model.parameters())


@torch.no_grad()
def test_label_scores_of_a_bfloat16_model_are_float32_and_do_not_tie(tiny_tokenizer: Any) -> None:
    model = random_model("llama", tiny_tokenizer).to(torch.bfloat16)
    scores = all_scores(LabelScorer(model, tiny_tokenizer, SENTIMENT, RECORDS))
    assert scores.dtype == torch.float32
    # Logits rounded to bfloat16 would differ by multiples of a power of two; these are finer.
    difference = scores[:, 0] - scores[:, 1]
    assert not torch.equal(difference, difference.bfloat16().float())


def test_batches_hold_examples_of_like_length_within_their_budget(tiny_model: Any, tiny_tokenizer: Any) -> None:
    records = [{"text": "good " * (7 * i % 11), "label": 0} for i in range(23)]
    scorer = LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, records, batch_size=4)
    assert [len(batch) for batch in scorer.batches] == [4, 4, 4, 4, 4, 3]
    lengths = [example.longest for batch in scorer.batches for example in batch.examples]
    assert lengths == sorted(lengths)
    order = [int(index) for batch in scorer.batches for index in batch.indices]
    assert sorted(order) == list(range(23))
    assert order == sorted(order, key=lambda i: (scorer.examples[i].longest, i))
    again = LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, records, batch_size=4)
    for batch, same in zip(scorer.batches, again.batches, strict=True):
        assert torch.equal(batch.input_ids, same.input_ids)
    budget = LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, records, batch_size=23, batch_tokens=100)
    assert all(batch.input_ids.numel() <= 100 or len(batch) == 1 for batch in budget.batches)
    assert 3 < len(budget.batches) < 23
    narrow = LabelScorer(tiny_model, tiny_tokenizer, WORDY, records, batch_size=1, batch_tokens=1)
    assert [len(batch) for batch in narrow.batches] == [1] * 23
    assert all(batch.input_ids.shape[0] == 2 for batch in narrow.batches)


def test_a_batch_is_padded_on_the_left_and_positions_count_from_the_first_real_token(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    (batch,) = LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS).batches
    for row, example in enumerate(batch.examples):
        padding = batch.input_ids.shape[1] - len(example.prompt)
        assert batch.input_ids[row].tolist() == [tiny_tokenizer.pad_token_id] * padding + list(example.prompt)
        assert batch.attention_mask[row].tolist() == [0] * padding + [1] * len(example.prompt)
        assert batch.position_ids[row].tolist() == [0] * padding + list(range(len(example.prompt)))


def test_a_missing_label_is_an_error_only_where_labels_are_required(tiny_model: Any, tiny_tokenizer: Any) -> None:
    records = [{"text": "good", "label": 1}, {"text": "bad"}]
    with pytest.raises(ZeroTuningError, match=r"^example 1: field 'label' is missing$"):
        LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, records)
    scorer = LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, records, require_labels=False)
    assert scorer.labels.tolist() == [1, -1]


def word_tokenizer(*, bos: bool = False, eos: bool = False) -> Any:
    """A tokenizer of whole words; unknown words become <unk>."""
    words = ["<unk>", "<s>", "</s>", "Review:", "good", "bad", "Sentiment:", "yes", "no"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return fast


def test_labels_that_the_tokenizer_cannot_tell_apart_are_both_named(tiny_model: Any) -> None:
    task = Task("t", "Review: {text} Sentiment:", (" yes", " great", " awful"))
    with pytest.raises(ZeroTuningError, match=r"cannot tell labels ' great' and ' awful' apart: both are .*0"):
        LabelScorer(tiny_model, word_tokenizer(), task, [{"text": "good", "label": 0}])


def test_special_tokens_stay_before_the_prompt_and_never_between_prompt_and_label(tiny_model: Any) -> None:
    task = Task("t", "Review: {text} Sentiment:", (" yes", " no"))
    record = {"text": "good", "label": 0}
    for bos in (False, True):
        for eos in (False, True):
            scorer = LabelScorer(tiny_model, word_tokenizer(bos=bos, eos=eos), task, [record])
            assert scorer.examples[0].prompt == ((1, 3, 4, 6) if bos else (3, 4, 6))
            assert scorer.examples[0].labels == ((7,), (8,))


def test_a_label_that_would_merge_with_the_prompts_end_is_tokenised_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    task = Task("t", "Review: {text}\nSentiment: ", ("negative", "positive"))
    scorer = LabelScorer(tiny_model, tiny_tokenizer, task, [{"text": "good", "label": 0}])
    (example,) = scorer.examples
    assert list(example.prompt) == tiny_tokenizer("Review: good\nSentiment: ")["input_ids"]
    assert [list(tokens) for tokens in example.labels] == [tiny_tokenizer(label)["input_ids"] for label in task.labels]
    assert tiny_tokenizer("Review: good\nSentiment: positive")["input_ids"][-1] != example.labels[1][-1]


def test_a_prompt_longer_than_the_models_context_is_an_error_that_names_the_example(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    records = [{"text": "good", "label": 0}, {"text": "good " * 300, "label": 0}]
    with pytest.raises(ZeroTuningError, match=r"^example 1: prompt and label have \d+ tokens.* context of 256$"):
        LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, records)


def test_no_examples_and_wrong_batch_sizes_are_errors(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ZeroTuningError, match="'sentiment' was given no examples"):
        LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, [])
    for size in (0, -1, 2.0, True):
        with pytest.raises(ZeroTuningError, match="batch_size must be a positive integer"):
            LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS, batch_size=size)
    with pytest.raises(ZeroTuningError, match="batch_tokens must be a positive integer"):
        LabelScorer(tiny_model, tiny_tokenizer, SENTIMENT, RECORDS, batch_tokens=0)


@pytest.mark.model
@torch.no_grad()
def test_the_embedded_models_scores_equal_unpadded_passes_in_float32(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(demo_model[0]).float(), demo_model[1]
    for name in ("sst2", "trec"):
        task = Task.load(name)
        records = task.examples("validation", 5)
        scorer = LabelScorer(model, tokenizer, task, records)
        expected = torch.stack(plain_scores(model, tokenizer, task, list(records))).log_softmax(dim=-1)
        torch.testing.assert_close(all_scores(scorer), expected, atol=1e-4, rtol=0)
