"""The options of a calibration: accepted forms of values, defaults, effects and names."""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zerotuning as zt
from film_reviews import FILMS, RECORDS, calibrate
from zerotuning.calibration.options import RENAMED_OPTIONS, CalibrationKeywords, CalibrationOptions
from zerotuning.errors import ZeroTuningError

# Values and defaults.


def test_options_may_come_as_arrays_and_sets() -> None:
    plain = CalibrationOptions(layers=(0, 1), heads=((0, 1), (1, 2)), exclude_heads=((1, 0),), examples=8)
    given = CalibrationOptions(
        layers=np.array([0, 1]), heads={(1, 2), (0, 1)}, exclude_heads=torch.tensor([[1, 0]]), examples=np.int64(8)
    )
    assert given == plain
    shares = CalibrationOptions(
        prior=np.array([0.5, 0.5]), l2_penalties=np.array([0.25]), objective="information", seconds=np.float32(2.5)
    )
    assert (shares.prior, shares.l2_penalties) == ((0.5, 0.5), (0.25,))
    assert json.loads(json.dumps([given.to_json(), shares.to_json()])) == [given.to_json(), shares.to_json()]


@pytest.mark.parametrize(
    ("count", "options", "searches", "folds"),
    [
        (128, {}, 3, 1),
        (128, {"num_searches": 2}, 2, 1),
        (128, {"folds": 2}, 1, 2),
        (128, {"folds": 1}, 3, 1),
        (127, {}, 1, 4),
    ],
)
def test_many_examples_are_calibrated_by_three_searches_of_one_fold(
    tiny: Any, count: int, options: dict[str, int], searches: int, folds: int
) -> None:
    records = (RECORDS * 7)[:count]
    report = zt.calibrate(*tiny, FILMS, records=records, steps=1, **options).report
    assert (report["num_searches"], report["seeds"], report["folds"]) == (searches, searches, folds)


def test_only_a_gradient_search_with_labels_makes_several_searches() -> None:
    for options in ({"objective": "information"}, {"method": "paper"}, {"method": "cma-es"}):
        assert CalibrationOptions(**options).resolved(200).search_count == 1


# Their names: in Python, in the signature, and the old ones.


def test_the_signature_of_calibrate_shows_every_option_with_its_type_and_default() -> None:
    for function in (zt.calibrate, zt.choose_shots):
        shown = inspect.signature(function).parameters
        for field in fields(CalibrationOptions):
            parameter = shown[field.name]
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert (parameter.default, parameter.annotation) == (field.default, field.type), field.name
        assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in shown.values())
        assert "options" in shown


def test_the_typed_keywords_are_the_fields_of_the_options() -> None:
    expected = {name: hint for name, hint in typing.get_type_hints(CalibrationOptions).items()}
    assert typing.get_type_hints(CalibrationKeywords) == expected
    assert CalibrationKeywords.__optional_keys__ == set(expected)


def test_every_option_is_documented() -> None:
    documentation = inspect.getdoc(CalibrationOptions) or ""
    for field in fields(CalibrationOptions):
        assert f"\n    {field.name}: " in documentation, field.name


def test_options_may_be_given_whole_and_keywords_replace_their_fields(tiny: Any) -> None:
    options = zt.CalibrationOptions(steps=2, folds=2, seed=3)
    report = zt.calibrate(*tiny, FILMS, records=RECORDS, options=options).report
    assert (report["steps"], report["seed"], report["folds"]) == (2, 3, 2)
    report = zt.calibrate(*tiny, FILMS, records=RECORDS, options=options, seed=4).report
    assert (report["steps"], report["seed"], report["folds"]) == (2, 4, 2)
    with pytest.raises(ZeroTuningError, match="options must be CalibrationOptions, got dict"):
        zt.calibrate(*tiny, FILMS, records=RECORDS, options={"steps": 2})


def test_old_names_of_options_still_work_and_warn(tiny: Any) -> None:
    assert RENAMED_OPTIONS == {"seeds": "num_searches", "penalties": "l2_penalties"}
    with pytest.warns(DeprecationWarning, match="the option (seeds|penalties) is now called") as caught:
        report = calibrate(tiny, steps=1, seeds=2, penalties=[0.5]).report
    assert {Path(warning.filename).name for warning in caught} == {"film_reviews.py"}  # the caller's line
    assert (report["options"]["num_searches"], report["options"]["l2_penalties"]) == (2, [0.5])
    assert report["num_searches"] == report["seeds"] == 2
    assert report["warnings"] == report["setbacks"]
    with (
        pytest.warns(DeprecationWarning, match="the option seeds is now called num_searches"),
        pytest.raises(ZeroTuningError, match="seeds is the old name of num_searches: give one of the two, got both"),
    ):
        calibrate(tiny, seeds=2, num_searches=3)


def test_the_old_path_of_the_choice_of_shots_still_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="shot_choice is now zerotuning.calibration.few_shot_choice"):
        old = importlib.reload(importlib.import_module("zerotuning.shot_choice"))
    assert old.choose_shots is zt.choose_shots
