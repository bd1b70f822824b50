"""CLM's host side: what is predicted, and what never is."""

from __future__ import annotations

import numpy as np
import pytest

from maxpretrain.objectives import CLM

EOS = 2


def lists(example):
    return {name: array.tolist() for name, array in example.items()}


def test_plain_predicts_every_next_token():
    example = CLM(mask_documents=False).example(np.array([5, 6, EOS, 7, 8]), None, np.array([1, 1, 1, 2, 2], np.int32))
    assert lists(example) == {"tokens": [5, 6, 2, 7], "labels": [6, 2, 7, 8], "weights": [1, 1, 1, 1]}


def test_packed_documents_do_not_predict_each_other():
    tokens = np.array([5, 6, EOS, 7, EOS, 8, 9, 10])
    segments = np.array([1, 1, 1, 2, 2, 3, 3, 3], np.int32)
    assert lists(CLM().example(tokens, None, segments)) == {
        "tokens": [5, 6, 2, 7, 2, 8, 9],
        "labels": [6, 2, 0, 2, 0, 9, 10],  # the end of a document is predicted, the next one's first token is not
        "weights": [1, 1, 0, 1, 0, 1, 1],
        "segments": [1, 1, 1, 2, 2, 3, 3],
        "positions": [0, 1, 2, 0, 1, 0, 1],
    }


def test_a_document_that_begins_at_the_last_raw_token_is_not_predicted():
    assert lists(CLM().example(np.array([5, EOS, 7]), None, np.array([1, 1, 2], np.int32))) == {
        "tokens": [5, 2],
        "labels": [2, 0],
        "weights": [1, 0],
        "segments": [1, 1],
        "positions": [0, 1],
    }


def test_without_segments_it_is_one_document():
    assert lists(CLM().example(np.array([5, 6, 7]), None)) == {
        "tokens": [5, 6],
        "labels": [6, 7],
        "weights": [1, 1],
        "segments": [1, 1],
        "positions": [0, 1],
    }


@pytest.mark.parametrize("mask", [True, False])
def test_padding_is_zero_everywhere(mask):
    tokens, segments = np.array([5, EOS, 7, 8, 99, 99]), np.array([1, 1, 2, 2, 0, 0], np.int32)
    expected = {
        "tokens": [5, 2, 7, 0, 0],
        "labels": [2, 0, 8, 0, 0] if mask else [2, 7, 8, 0, 0],
        "weights": [1, 0, 1, 0, 0] if mask else [1, 1, 1, 0, 0],
    }
    if mask:
        expected |= {"segments": [1, 1, 2, 0, 0], "positions": [0, 1, 0, 0, 0]}
    assert lists(CLM(mask_documents=mask).example(tokens, None, segments)) == expected
    # Padding says no more than the shorter array alone.
    short = CLM(mask_documents=mask).example(tokens[:4], None, segments[:4])
    assert lists(short) == {name: values[:3] for name, values in expected.items()}


@pytest.mark.parametrize("mask", [True, False])
def test_shapes_and_dtypes_are_the_declared_fields(mask):
    objective = CLM(mask_documents=mask)
    example = objective.example(np.arange(9, dtype=np.uint16), None, np.ones(9, np.int32))
    assert {name: (a.shape, a.dtype.name) for name, a in example.items()} == objective.fields(8)


@pytest.mark.parametrize("mask", [True, False])
def test_many_at_once_equal_one_by_one(mask):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (20, 33)).astype(np.int32)
    segments = 1 + np.cumsum(rng.random((20, 33)) < 0.2, axis=1, dtype=np.int32)
    segments[-1, 10:] = 0
    segments[-2] = 0
    objective = CLM(mask_documents=mask)
    together = objective.examples(tokens, segments)
    for row in range(20):
        alone = reference(tokens[row].tolist(), segments[row].tolist(), mask)
        assert {name: array[row].tolist() for name, array in together.items()} == alone
        assert lists(objective.example(tokens[row], None, segments[row])) == alone


def reference(tokens: list[int], segments: list[int], mask: bool) -> dict[str, list[int]]:
    """The rule token by token."""
    out: dict[str, list[int]] = {"tokens": [], "labels": [], "weights": [], "segments": [], "positions": []}
    position = -1
    for t in range(len(tokens) - 1):
        position = 0 if t == 0 or segments[t] != segments[t - 1] else position + 1
        real = segments[t + 1] != 0
        predicted = real and (not mask or segments[t] == segments[t + 1])
        out["tokens"].append(tokens[t] if real else 0)
        out["labels"].append(tokens[t + 1] if predicted else 0)
        out["weights"].append(int(predicted))
        out["segments"].append(segments[t] if real else 0)
        out["positions"].append(position if real else 0)
    return out if mask else {name: out[name] for name in ("tokens", "labels", "weights")}


def test_the_input_is_left_alone():
    tokens, segments = np.arange(6, dtype=np.int32), np.array([1, 1, 1, 2, 2, 0], np.int32)
    CLM().example(tokens, None, segments)
    assert tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert segments.tolist() == [1, 1, 1, 2, 2, 0]
