"""Fill in the middle: rows worked by hand, documents put together again, and how often and where they are cut."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import numpy as np
import pytest

from maxpretrain.config import BatchConfig, ModelConfig, Run, TokenizerConfig, validate
from maxpretrain.data.tokenizer import Bytes, Characters, train_tokenizer
from maxpretrain.errors import UserError
from maxpretrain.objectives import CLM, FillInTheMiddle
from maxpretrain.vocabulary import Vocabulary

SYMBOLS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
PRE, SUF, MID, EOS = 91, 92, 93, 2
PLAIN = Vocabulary(size=100, eos_id=EOS, fim=(PRE, SUF, MID))
LETTERS = Vocabulary.of(Characters("abcdefghijklmnopqrstuvwxyz .", ["</s>"], SYMBOLS))


class Draws:
    """In the place of a generator: the numbers that a test wants, in the order in which they are asked for."""

    def __init__(self, moved, suffix_first, *cuts):
        self.flags, self.cuts = [moved, suffix_first], list(cuts)

    def random(self, size):
        flags = self.flags.pop(0)
        assert len(flags) == size
        return np.where(flags, 0.0, 0.99)

    def integers(self, low, high, size):
        assert (low, size) == (0, 2)
        pair = np.array(self.cuts.pop(0))
        assert (pair < high).all()
        return pair


def lists(example):
    return {name: array.astype(int).tolist() for name, array in example.items()}


def parts(document, fim, eos):
    """Prefix, middle and suffix of a document in its new order, and whether it is SPM, whose prefix and middle are not
    told apart and come as the middle (so does PSM without a prefix). None: it is in its own order.
    """
    pre, suf, mid = fim
    body = document[:-1] if document[-1:] == [eos] else document
    if body[:1] != [pre]:
        return None
    s, m = body.index(suf), body.index(mid)
    assert body.count(pre) == body.count(suf) == body.count(mid) == 1
    suffix_first = s == 1
    prefix, suffix, rest = body[1:s], body[s + 1 : m], body[m + 1 :]
    return prefix, rest, suffix, suffix_first


def test_orders_worked_by_hand():
    """[5 6 7 8 9 eos] in PSM, [11 12 13 eos] as it is, [21 22 23] in SPM with an empty middle."""
    tokens = np.array([5, 6, 7, 8, 9, EOS, 11, 12, 13, EOS, 21, 22, 23], np.uint16)
    segments = np.array([1] * 6 + [2] * 4 + [3] * 3, np.int32)
    objective = FillInTheMiddle(level="token").bind(PLAIN)
    draws = lambda: Draws([True, False, True], [False, True, True], (4, 1), (2, 2))  # noqa: E731
    row, numbers = objective.reordered(tokens, draws(), segments)
    first, second = [PRE, 5, SUF, 9, MID, 6, 7, 8, EOS], [11, 12, 13, EOS]
    assert row.tolist() == [*first, *second, PRE, SUF, 23, MID, 21, 22]
    assert numbers.tolist() == [1] * 9 + [2] * 4 + [3] * 6
    # Trimmed to the 13 tokens of the window, all of which are predicted from those before them in their document.
    assert lists(objective.example(tokens, draws(), segments)) == {
        "tokens": [PRE, 5, SUF, 9, MID, 6, 7, 8, EOS, 11, 12, 13],
        "labels": [5, SUF, 9, MID, 6, 7, 8, EOS, 0, 12, 13, EOS],
        "weights": [1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1],
        "segments": [1] * 9 + [2] * 3,
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2],
    }


def test_characters_are_cut_wherever_they_are():
    objective = FillInTheMiddle().bind(LETTERS)
    tokens = LETTERS.tokenizer.encode("the cat")
    pre, suf, mid = LETTERS.fim
    row, _ = objective.reordered(tokens, Draws([True], [False], (2, 5)))
    assert row.tolist() == [pre, *tokens[:2], suf, *tokens[5:], mid, *tokens[2:5]]
    row, _ = objective.reordered(tokens, Draws([True], [True], (7, 0)))  # everything is the middle
    assert row.tolist() == [pre, suf, mid, *tokens]


@functools.cache
def pieces():
    words = "the quick brown fox jumps over the lazy dog while seven wizards brew café au lait and naïve jokes"
    config = TokenizerConfig(vocab_size=296, control_symbols=SYMBOLS)
    return Vocabulary.of(train_tokenizer(config, [words.replace(" ", "  ", i % 3) for i in range(30)]))


def documents(vocabulary, rng, count=40):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog,", "naïve", "café", "😀", "\n", "seven"]
    encode = vocabulary.tokenizer.encode
    for _ in range(count):
        text = " ".join(rng.choice(words, rng.integers(1, 12)))
        yield text, [*encode(text).tolist(), *([] if vocabulary.eos_id is None else [vocabulary.eos_id])]


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
@pytest.mark.parametrize("level", ["character", "token"])
def test_documents_can_be_put_together_again(kind, level):
    vocabulary = pieces() if kind == "sentencepiece" else Vocabulary.of(Bytes(["</s>"], SYMBOLS))
    tokenizer, eos = vocabulary.tokenizer, vocabulary.eos_id
    objective = FillInTheMiddle(rate=0.8, level=level).bind(vocabulary)
    rng = np.random.default_rng(0)
    texts, ids = zip(*documents(vocabulary, rng), strict=True)
    segments = np.repeat(np.arange(1, len(ids) + 1), [len(d) for d in ids])
    row, numbers = objective.reordered(np.concatenate(ids), rng, segments)
    seen, retokenized = Counter(), 0
    for number, (text, own) in enumerate(zip(texts, ids, strict=True), 1):
        document = row[numbers == number].tolist()
        assert document[-1] == eos
        found = parts(document, vocabulary.fim, eos)
        seen["whole" if found is None else "spm" if found[3] else "psm"] += 1
        if found is None:
            assert document == own
            continue
        prefix, middle, suffix = found[:3]
        assert tokenizer.decode(prefix + middle + suffix) == text
        if level == "token":
            assert prefix + middle + suffix == own[:-1]
        else:  # as a prompt and a suffix would be
            alone = (suffix,) if found[3] else (prefix, middle, suffix)
            assert all(tokenizer.encode(tokenizer.decode(part)).tolist() == part for part in alone)
            retokenized += prefix + middle + suffix != own[:-1]
    assert min(seen["whole"], seen["psm"], seen["spm"]) >= 3
    if kind == "sentencepiece" and level == "character":
        assert retokenized > 5  # words were cut


def test_a_character_that_the_window_cuts_keeps_its_bytes():
    """The window begins with the last three bytes of 😀 and ends with the first byte of é."""
    vocabulary = Vocabulary.of(Bytes(["</s>"], SYMBOLS))
    window = np.frombuffer("😀ab\ufffdcdé".encode(), np.uint8)[1:-1].astype(np.int32)
    objective = FillInTheMiddle(rate=1.0, spm_rate=0.0).bind(vocabulary)
    cuts = Counter()
    for seed in range(60):
        row, _ = objective.reordered(window, np.random.default_rng(seed))
        prefix, middle, suffix, _ = parts(row.tolist(), vocabulary.fim, vocabulary.eos_id)
        assert prefix + middle + suffix == window.tolist()
        assert len(prefix) >= 3
        assert suffix[-1:] == [0xC3]
        cuts[len(prefix) - 3] += 1
    assert set(cuts) == {0, 1, 2, 5, 6, 7}  # never inside the three bytes of U+FFFD, which the text itself has


def test_cuts_are_uniform_over_all_places_both_ends_too():
    """Two of the 5 places of a text of 4: the smaller is 0 … 4 in 9, 7, 5, 3, 1 of 25 (χ², p = 0.001: 18.5)."""
    tokens = LETTERS.tokenizer.encode("abcd")
    for level in ("character", "token"):
        objective = FillInTheMiddle(rate=1.0, spm_rate=0.0, level=level).bind(LETTERS)
        rng = np.random.default_rng(1)
        low, high = Counter(), Counter()
        rows, numbers = objective.reordered(np.tile(tokens, 5000), rng, np.repeat(np.arange(1, 5001), 4))
        for row in np.split(rows, np.flatnonzero(np.diff(numbers)) + 1):
            prefix, _, suffix, _ = parts(row.tolist(), LETTERS.fim, LETTERS.eos_id)
            low[len(prefix)] += 1
            high[len(suffix)] += 1
        for counts in (low, high):
            assert sum((counts[k] - e) ** 2 / e for k, e in enumerate([1800, 1400, 1000, 600, 200])) < 18.5


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.2), (0.0, 0.5), (1.0, 1.0)])
def test_rates(rate, spm_rate):
    """Of 10,000 documents; within four standard deviations. A sixteenth of PSM has no prefix, and looks like SPM."""
    objective = FillInTheMiddle(rate=rate, spm_rate=spm_rate, level="token").bind(PLAIN)
    tokens, segments = np.tile([*range(5, 36), EOS], 10000), np.repeat(np.arange(1, 10001), 32)
    row, numbers = objective.reordered(tokens, np.random.default_rng(0), segments)
    within = lambda count, n, p: abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5  # noqa: E731
    moved = np.flatnonzero(row == PRE)
    assert within(len(moved), 10000, rate)
    # No prefix in PSM: one of the two cuts at 0, of 32 places.
    assert within((row[moved + 1] == SUF).sum(), len(moved), spm_rate + (1 - spm_rate) * 63 / 1024)
    assert (np.bincount(numbers)[1:] == 32 + 3 * np.isin(np.arange(1, 10001), numbers[moved])).all()


def test_without_moving_it_is_clm():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 90, 65)
    segments = 1 + np.cumsum(rng.random(65) < 0.1)
    for mask in (True, False):
        found = FillInTheMiddle(rate=0.0, mask_documents=mask).bind(LETTERS).example(tokens, rng, segments)
        assert lists(found) == lists(CLM(mask_documents=mask).example(tokens, None, segments))


def test_edges():
    objective = FillInTheMiddle(rate=1.0, spm_rate=0.0).bind(LETTERS)
    eos = LETTERS.eos_id
    assert objective.raw_length(512) == 513
    one = objective.example(np.array([4]), np.random.default_rng(0))
    assert {name: array.shape for name, array in one.items()} == dict.fromkeys(objective.fields(8), (0,))
    # Documents of eos alone stay as they are.
    only = objective.example(np.array([eos, eos, eos]), np.random.default_rng(0), np.array([1, 2, 3]))
    assert lists(only)["tokens"] == [eos, eos]
    assert not only["weights"].any()
    tokens, segments = np.arange(20) % 26, np.repeat([1, 2], 10)
    example = objective.example(tokens, np.random.default_rng(3), segments)
    assert {name: (a.shape, a.dtype.name) for name, a in example.items()} == objective.fields(19)
    assert lists(example) == lists(objective.example(tokens, np.random.default_rng(3), segments))
    assert lists(example) != lists(objective.example(tokens, np.random.default_rng(4), segments))
    assert tokens.tolist() == list(range(20))


def test_what_cannot_be():
    run = Run(
        name="x",
        model=ModelConfig(vocab_size=300, num_layers=1, model_dim=16, num_heads=2, max_length=16),
        objective=FillInTheMiddle(),
        tokenizer=TokenizerConfig(kind="bytes", control_symbols=SYMBOLS),
        batch=BatchConfig(size=8, length=16),
    )
    validate(run)
    assert FillInTheMiddle().symbols() == SYMBOLS
    with pytest.raises(UserError, match=r"objective.rate is 1.5; it must be in \[0, 1\]"):
        validate(dataclasses.replace(run, objective=FillInTheMiddle(rate=1.5)))
    with pytest.raises(UserError, match=r"objective.spm_rate is -0.1; it must be in \[0, 1\]"):
        validate(dataclasses.replace(run, objective=FillInTheMiddle(spm_rate=-0.1)))
    with pytest.raises(UserError, match=r"objective FillInTheMiddle needs a decoder; model.architecture is encoder"):
        validate(dataclasses.replace(run, model=dataclasses.replace(run.model, architecture="encoder")))
    validate(dataclasses.replace(run, batch=BatchConfig(size=8, length=5)))
    with pytest.raises(
        UserError, match=r"batch.length is 4, too short for the tokens before prefix, suffix and middle and text"
    ):
        validate(dataclasses.replace(run, batch=BatchConfig(size=8, length=4)))
    with pytest.raises(UserError, match=r"needs tokens for prefix, suffix and middle, and the tokenizer has none"):
        FillInTheMiddle().bind(Vocabulary(size=10))
    with pytest.raises(UserError, match=r'objective.level is "character", and there is no tokenizer'):
        FillInTheMiddle().bind(PLAIN)
