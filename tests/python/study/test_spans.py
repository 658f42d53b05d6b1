"""Where the parts of a prompt stand in its tokens, on prompts whose tokens are counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from zerotuning.errors import ZeroTuningError
from zerotuning.study.spans import POSITIONS, find_spans, has_position
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import LETTERS, Task

# Words by index:  0   1    2  3  4 (.)  5    6 (:)  7…                …
FILMS = Task("films", "Say good or bad.\nText: {text}\nBy: {author}\nIt is", (" good", " bad"))
RECORDS = [Record({"text": "a b c", "author": "d"}, "one"), Record({"text": "a", "author": "d e"}, "two")]
LENGTHS = [15, 14]


def words(begin: bool = False) -> Any:
    """A token for each word and mark; with `begin` one more in front, as tokenizers with a BOS token have."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", bos_token="<s>")


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("initial", [(0, 1), (0, 1)]),
        ("token 1", [(1, 2), (1, 2)]),
        ("token 4", [(4, 5), (4, 5)]),
        ("middle", [(7, 8), (7, 8)]),
        ("last", [(14, 15), (13, 14)]),
        ("instruction", [(1, 5), (1, 5)]),  # "good or bad ." without the initial token
        ("labels", [(1, 4), (1, 4)]),  # "good or bad"
        ("content", [(7, 13), (7, 12)]),  # "a b c By : d", "a By : d e"
    ],
)
def test_positions_of_spans_equal_a_count_by_hand(position: str, expected: list[tuple[int, int]]) -> None:
    tokenizer = words()
    assert [len(tokenizer(FILMS.render(record).text)["input_ids"]) for record in RECORDS] == LENGTHS
    assert find_spans(position, FILMS, RECORDS, tokenizer, LENGTHS, (0,)) == expected


def test_a_token_in_front_of_the_text_moves_the_spans_and_is_itself_the_initial_token() -> None:
    tokenizer = words(begin=True)
    assert find_spans("instruction", FILMS, RECORDS[:1], tokenizer, [16], (0,)) == [(1, 6)]
    assert find_spans("content", FILMS, RECORDS[:1], tokenizer, [16], (0,)) == [(8, 14)]


def test_random_tokens_follow_the_seed_and_are_never_the_initial_one() -> None:
    records, lengths = RECORDS[:1] * 200, [3] * 200
    drawn = find_spans("random", FILMS, records, words(), lengths, (1, 0))
    assert {first for first, _ in drawn} == {1, 2}
    assert all(end == first + 1 for first, end in drawn)
    assert drawn == find_spans("random", FILMS, records, words(), lengths, (1, 0))
    assert drawn != find_spans("random", FILMS, records, words(), lengths, (2, 0))


def test_a_task_has_no_labels_span_unless_its_instruction_names_all_labels() -> None:
    assert all(has_position(FILMS, position) for position in POSITIONS)
    partly = Task("partly", "Say good.\nText: {text}\nIt is", (" good", " bad"))
    within = Task("within", "A goodly or badly one.\nText: {text}\nIt is", (" good", " bad"))
    letters = Task("letters", "{choices}\nAnswer:", LETTERS)
    assert not has_position(partly, "labels")
    assert not has_position(within, "labels")  # words that only begin like a label
    assert not has_position(letters, "labels")
    assert not has_position(letters, "instruction")
    with pytest.raises(ZeroTuningError, match="task 'partly' has no position 'labels'"):
        find_spans("labels", partly, RECORDS, words(), LENGTHS, (0,))


def test_a_tokenizer_without_offsets_is_refused_by_name() -> None:
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(ZeroTuningError, match="spans need a fast tokenizer"):
        find_spans("content", FILMS, RECORDS, slow, LENGTHS, (0,))


def test_pieces_joined_are_the_rendered_prompt_and_name_their_fields() -> None:
    pieces = FILMS.pieces(RECORDS[0])
    assert pieces == [
        (None, "Say good or bad.\nText: "),
        ("text", "a b c"),
        (None, "\nBy: "),
        ("author", "d"),
        (None, "\nIt is"),
    ]
    letters = Task("letters", "Q: {question}\n{choices}\nAnswer:", LETTERS)
    record = Record({"question": "x", "choices": ["one", "two"], "label": 1}, "three")
    assert letters.pieces(record)[3] == ("choices", "A. one\nB. two")
    assert "".join(text for _, text in letters.pieces(record)) == letters.render(record).text
