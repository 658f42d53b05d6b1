"""Chats, scorings and shortened prompts, against texts written by hand and an unpadded forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.tasks.task import Task

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% if enable_thinking is false %}!{% endif %}{% endif %}"
)
FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive", " good film"))
RECORDS = [{"text": text, "label": index % 3} for index, text in enumerate(("good", "a bad story", "far too long"))]


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def with_options(task: Task, **options: Any) -> Task:
    return Task(task.name, task.prompt, task.labels, continuation=task.continuation, **options)


def token_log_probabilities(model: Any, tokenizer: Any, text: str, label: str) -> Tensor:
    """The log-probability of each of the label's tokens after the text, from one unpadded pass."""
    start = len(tokenizer(text)["input_ids"])
    ids = torch.tensor([tokenizer(text + label)["input_ids"]])
    logits = model(ids).logits[0].float().log_softmax(-1)
    return logits[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


def all_scores(scorer: LabelScorer) -> Tensor:
    return scorer.gather([scorer.scores(batch) for batch in scorer.batches])


# Chats.


@torch.no_grad()
def test_a_chat_scores_the_templates_text_with_labels_without_leading_space(
    tiny_model: Any, chat_tokenizer: Any
) -> None:
    task = with_options(FILMS, chat=True).with_shots([{"text": "long", "label": 2}, {"text": "bad", "label": 0}])
    texts = [
        "[user] Review: long\nSentiment:\n[assistant] good film\n[user] Review: bad\nSentiment:\n[assistant] negative\n"
        f"[user] Review: {record['text']}\nSentiment:\n[assistant] !"
        for record in RECORDS
    ]
    expected = torch.stack(
        [
            torch.stack([token_log_probabilities(tiny_model, chat_tokenizer, text, label).sum() for label in labels])
            for text, labels in zip(texts, [("negative", "positive", "good film")] * 3, strict=True)
        ]
    )
    scorer = LabelScorer(tiny_model, chat_tokenizer, task, RECORDS)
    assert [list(example.prompt) for example in scorer.examples] == [
        chat_tokenizer(text)["input_ids"] for text in texts
    ]
    torch.testing.assert_close(all_scores(scorer), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_special_tokens_are_not_added_to_a_template_that_writes_them(tiny_model: Any) -> None:
    words = ["<unk>", "<s>", "</s>", "Review:", "good", "yes", "no"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast.chat_template = "{{ bos_token }} {% for message in messages %}{{ message.content }} {% endfor %}"
    task = Task("t", "Review: {text}", (" yes", " no"), chat=True)
    (example,) = LabelScorer(tiny_model, fast, task, [{"text": "good", "label": 0}]).examples
    assert example.prompt == (1, 3, 4)
    assert example.labels == ((5,), (6,))


def test_a_tokenizer_without_a_template_is_named(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.name_or_path = "plain/words"
    with pytest.raises(ZeroTuningError, match=r"^chat needs a tokenizer with a chat template, plain/words has none$"):
        LabelScorer(tiny_model, tokenizer, with_options(FILMS, chat=True), RECORDS)


def test_an_error_raised_by_a_chat_template_is_shown(tiny_model: Any, chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ZeroTuningError, match="refuses the prompt: no users here"):
        LabelScorer(tiny_model, chat_tokenizer, with_options(FILMS, chat=True), RECORDS)


# Scorings.


@torch.no_grad()
def test_the_mean_divides_by_the_labels_tokens(tiny_model: Any, tiny_tokenizer: Any) -> None:
    expected = torch.stack(
        [
            torch.stack(
                [
                    token_log_probabilities(tiny_model, tiny_tokenizer, FILMS.render(record).text, label).mean()
                    for label in FILMS.labels
                ]
            )
            for record in RECORDS
        ]
    )
    scorer = LabelScorer(tiny_model, tiny_tokenizer, with_options(FILMS, scoring="mean"), RECORDS)
    assert {len(tokens) for tokens in scorer.examples[0].labels} == {1, 2}
    torch.testing.assert_close(all_scores(scorer), expected.log_softmax(-1), atol=1e-4, rtol=0)
    sums = all_scores(LabelScorer(tiny_model, tiny_tokenizer, FILMS, RECORDS))
    assert not torch.allclose(all_scores(scorer), sums, atol=1e-2)


@torch.no_grad()
def test_first_token_scoring_uses_only_the_first_token_of_each_label(tiny_model: Any, tiny_tokenizer: Any) -> None:
    expected = torch.stack(
        [
            torch.stack(
                [
                    token_log_probabilities(tiny_model, tiny_tokenizer, FILMS.render(record).text, label)[0]
                    for label in FILMS.labels
                ]
            )
            for record in RECORDS
        ]
    )
    scorer = LabelScorer(tiny_model, tiny_tokenizer, with_options(FILMS, scoring="first-token"), RECORDS)
    torch.testing.assert_close(all_scores(scorer), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_labels_that_share_their_first_token_are_both_named(tiny_model: Any, tiny_tokenizer: Any) -> None:
    task = Task("t", "Review: {text}\nIt is a", (" good film", " bad", " good story"), scoring="first-token")
    message = r"^example 0: labels ' good film' and ' good story' begin with the same token \(\d+\)"
    with pytest.raises(ZeroTuningError, match=message):
        LabelScorer(tiny_model, tiny_tokenizer, task, [{"text": "x", "label": 0}])


# Prompts that are too long: the tiny model's context is 256.


def test_a_cut_prompt_keeps_as_much_of_its_end_as_fits(tiny_model: Any, tiny_tokenizer: Any) -> None:
    records = [{"text": "fine", "label": 0}, {"text": " good bad long" * 200, "label": 1}]
    scorer = LabelScorer(tiny_model, tiny_tokenizer, FILMS, records, truncate=True)
    text = FILMS.render(records[1]).text
    ends = [tiny_tokenizer(text[cut:])["input_ids"] for cut in range(len(text))]
    assert list(scorer.examples[1].prompt) in ends
    # A word cut in two may have one token more, so that the shortened prompt may leave one token of the context unused.
    assert scorer.examples[1].longest in (255, 256)
    plain = LabelScorer(tiny_model, tiny_tokenizer, FILMS, records[:1])
    assert scorer.examples[0] == plain.examples[0]
    assert scorer.examples[1].labels == plain.examples[0].labels


def test_a_cut_prompt_keeps_the_tokenizers_special_tokens_at_its_beginning(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    end = tokenizer.convert_tokens_to_ids("<end>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", end)]
    )
    record = {"text": " good" * 400, "label": 1}
    (example,) = LabelScorer(tiny_model, tokenizer, FILMS, [record], truncate=True).examples
    assert example.prompt[0] == end
    assert example.longest == 256
    assert tokenizer.decode(example.prompt[1:]).endswith(" good good\nSentiment:")


def test_truncation_drops_whole_shots_before_text_the_oldest_first(tiny_model: Any, tiny_tokenizer: Any) -> None:
    shots = [{"text": f"{name} " + "good " * 60, "label": 0} for name in ("one", "two", "three", "four")]
    record = {"text": "far too long", "label": 1}
    (example,) = LabelScorer(tiny_model, tiny_tokenizer, FILMS.with_shots(shots), [record], truncate=True).examples
    lengths = [
        len(tiny_tokenizer(FILMS.with_shots(shots[gone:]).render(record).text + " good film")["input_ids"]) - 1
        for gone in range(5)
    ]
    gone = next(gone for gone in range(5) if lengths[gone] <= 256)
    assert 0 < gone < 4
    assert list(example.prompt) == tiny_tokenizer(FILMS.with_shots(shots[gone:]).render(record).text)["input_ids"]


def test_a_cut_chat_keeps_its_template_whole(tiny_model: Any, chat_tokenizer: Any) -> None:
    task = with_options(FILMS, chat=True)
    (example,) = LabelScorer(
        tiny_model, chat_tokenizer, task, [{"text": "good " * 400, "label": 1}], truncate=True
    ).examples
    text = chat_tokenizer.decode(example.prompt)
    assert text.startswith("[user] ")
    assert text.endswith("good good \nSentiment:\n[assistant] !")
    assert 250 < example.longest <= 256


def test_a_prompt_that_no_cut_makes_fit_is_an_error_that_names_the_example(
    tiny_model: Any, chat_tokenizer: Any
) -> None:
    chat_tokenizer.chat_template = "z" * 300 + TEMPLATE
    with pytest.raises(ZeroTuningError, match=r"^example 0: prompt and label have \d+ tokens.* context of 256$"):
        LabelScorer(tiny_model, chat_tokenizer, with_options(FILMS, chat=True), RECORDS[:1], truncate=True)


@pytest.mark.model
def test_the_embedded_models_template_is_used(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    task = Task("t", "Is {text} a fruit?", (" Yes", " No"), chat=True).with_shots([{"text": "iron", "label": 1}])
    (example,) = LabelScorer(model, tokenizer, task, [{"text": "a fig", "label": 0}]).examples
    text = tokenizer.decode(example.prompt)
    assert text.endswith(
        "<|im_start|>user\nIs iron a fruit?<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n"
        "<|im_start|>user\nIs a fig a fruit?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(label) for label in example.labels] == ["Yes", "No"]
