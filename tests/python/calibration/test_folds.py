"""The draw of examples, and the examples that each fold holds out."""

from __future__ import annotations

from film_reviews import RECORDS
from zerotuning.calibration.folds import draw_examples, make_folds
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.tasks.examples import as_records


def test_every_example_is_held_out_once_and_labels_keep_their_shares() -> None:
    records = as_records([{"text": str(i), "label": int(i % 4 == 0)} for i in range(40)])
    folds = make_folds(records, 4, seed=3)
    assert sorted(place for fold in folds for place in fold.held_out) == list(range(40))
    for fold in folds:
        assert sorted(fold.fit + fold.held_out) == list(range(40))
        assert sum(records[place]["label"] for place in fold.held_out) in (2, 3)
    assert make_folds(records, 4, seed=3) == folds
    assert make_folds(records, 4, seed=4) != folds


def test_one_fold_holds_out_a_fifth() -> None:
    (fold,) = make_folds(as_records(RECORDS), 1, seed=0)
    assert (len(fold.fit), len(fold.held_out)) == (16, 4)


def test_few_examples_make_few_folds() -> None:
    folds = make_folds(as_records(RECORDS[:4]), 4, seed=0)
    assert [len(fold.held_out) for fold in folds] == [2, 2]


def test_the_folds_depend_on_the_seed_alone() -> None:
    drawn = draw_examples(as_records(RECORDS), CalibrationOptions(examples=8, seed=1))
    assert drawn == draw_examples(as_records(RECORDS), CalibrationOptions(examples=8, seed=1, folds=3))
    assert drawn != draw_examples(as_records(RECORDS), CalibrationOptions(examples=8, seed=2))
