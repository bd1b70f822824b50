"""Where a text is masked, how often, and what stands there instead; and what the frame around it is."""

import numpy as np
import pytest

from maxpretrain.config import BatchConfig, ModelConfig, Run
from maxpretrain.errors import UserError
from maxpretrain.objectives import MLM, masking
from maxpretrain.vocabulary import Vocabulary

# pad, bos, eos, mask and one more special token below 5; a token begins a word where its id is even.
EVEN = np.arange(1000) % 2 == 0
VOCABULARY = Vocabulary(
    size=1000,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    mask_id=3,
    specials=(0, 1, 2, 3, 4),
    word_starts=EVEN | (np.arange(1000) < 5),
)
# Row lengths at which round(0.15·n) grows from one to two, from two to three, … up to 77 at 512: half goes to even, so
# that 10 already has two and 30 still has four.
GROWS = [
    10, 17, 24, 31, 37, 44, 50, 57, 64, 71, 77, 84, 90, 97, 104, 111, 117, 124, 130, 137, 144, 151,
    157, 164, 170, 177, 184, 191, 197, 204, 210, 217, 224, 231, 237, 244, 250, 257, 264, 271, 277, 284, 290, 297,
    304, 311, 317, 324, 330, 337, 344, 351, 357, 364, 370, 377, 384, 391, 397, 404, 410, 417, 424, 431, 437, 444,
    450, 457, 464, 471, 477, 484, 490, 497, 504, 511,
]  # fmt: skip


def generator(seed=0):
    return np.random.default_rng(seed)


def chi_square(found, expected):
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(((found - expected) ** 2 / expected).sum())


def test_exact_count_of_every_length():
    assert [masking.exact_count(0.15, n) for n in range(1, 513)] == [
        1 + sum(n >= grown for grown in GROWS) for n in range(1, 513)
    ]
    assert len(GROWS) == 76
    assert [masking.exact_count(0.15, n) for n in (1, 3, 10, 30, 50, 70, 128, 512)] == [1, 1, 2, 4, 8, 10, 19, 77]
    assert [masking.exact_count(0.15, n, 20) for n in (1, 128, 130, 140, 512)] == [1, 19, 20, 20, 20]
    assert [masking.exact_count(0.25, n) for n in (10, 14, 128)] == [2, 4, 32]


def test_chosen_is_an_exact_number_and_fair():
    places = np.array([3, 4, 9, 11, 30])
    counts = dict.fromkeys(places.tolist(), 0)
    rng = generator()
    for _ in range(5000):
        found = masking.chosen(places, 2, rng).tolist()
        assert len(set(found)) == 2
        assert found == sorted(found)
        for place in found:
            counts[place] += 1
    assert max(abs(n - 2000) for n in counts.values()) < 140  # four standard deviations of a binomial(5000, 0.4)
    assert masking.chosen(places, 9, rng).tolist() == [3, 4, 9, 11, 30]
    assert masking.chosen(places[:0], 3, rng).tolist() == []


def test_special_tokens_are_no_candidates():
    tokens = np.array([1, 50, 4, 51, 3, 2, 0], np.int32)
    assert masking.candidates(tokens, VOCABULARY).tolist() == [1, 3]


def test_shares_of_a_million_decisions():
    # A random token is the old one in 1 of 995 cases, which then looks like one that was kept.
    tokens = np.full(1_000_000, 77, np.int32)
    inputs = masking.corrupted(tokens, np.arange(1_000_000), generator(), VOCABULARY, mask_share=0.8, random_share=0.1)
    masked, kept = int((inputs == 3).sum()), int((inputs == 77).sum())
    expected = [800_000, 100_000 * 994 / 995, 100_000 * 996 / 995]
    assert chi_square([masked, 1_000_000 - masked - kept, kept], expected) < 13.8  # 2 degrees of freedom, 1 in 1000
    drawn = inputs[(inputs != 3) & (inputs != 77)]
    assert drawn.min() == 5  # no special token
    counts = np.bincount(drawn, minlength=1000)[5:]
    assert counts[72] == 0
    assert chi_square(np.delete(counts, 72), np.full(994, len(drawn) / 994)) < 1136  # 993 degrees of freedom, 1 in 1000


@pytest.mark.parametrize(("shares", "expected"), [((1.0, 0.0), {3}), ((0.0, 0.0), {77}), ((0.85, 0.0), {3, 77})])
def test_other_shares(shares, expected):
    tokens = np.full(2000, 77, np.int32)
    inputs = masking.corrupted(
        tokens, np.arange(2000), generator(), VOCABULARY, mask_share=shares[0], random_share=shares[1]
    )
    assert set(inputs.tolist()) == expected
    assert (tokens == 77).all()


def test_what_is_no_place_stays():
    tokens = np.arange(100, 200, dtype=np.int32)
    places = np.array([0, 40, 41, 99])
    inputs = masking.corrupted(tokens, places, generator(), VOCABULARY, mask_share=1.0, random_share=0.0)
    assert np.flatnonzero(inputs != tokens).tolist() == [0, 40, 41, 99]


def test_a_group_has_one_decision():
    tokens, groups = np.full(30_000, 77, np.int32), np.repeat(np.arange(10_000), 3)
    inputs = masking.corrupted(
        tokens, np.arange(30_000), generator(), VOCABULARY, mask_share=0.8, random_share=0.1, groups=groups
    ).reshape(-1, 3)
    masked, kept = (inputs == 3).all(1), (inputs == 77).all(1)
    random = ((inputs != 3) & (inputs != 77)).sum(1) >= 2  # of three random tokens at most one is the old one
    assert (masked.astype(int) + kept + random == 1).all()
    assert chi_square([masked.sum(), random.sum(), kept.sum()], [8000, 1000, 1000]) < 13.8
    assert (inputs[random][:, 0] != inputs[random][:, 1]).mean() > 0.99  # each token of the group is another


def words(tokens, segments=None, pieces=False):
    tokens = np.asarray(tokens, np.int32)
    segments = np.ones(len(tokens), np.int32) if segments is None else np.asarray(segments, np.int32)
    return masking.words_of(tokens, segments, ~VOCABULARY.is_special[tokens], VOCABULARY, pieces=pieces)


def test_words_hold_their_pieces_and_no_special_token():
    found = words([1, 11, 13, 20, 21, 4, 23, 25, 30, 2])
    assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == [(1, 3), (3, 5), (6, 8), (8, 9)]
    assert found.joined.tolist() == [True, False, True, False]
    pieces = words([1, 11, 13, 20, 4, 23], pieces=True)
    assert pieces.starts.tolist() == [1, 2, 3, 5]
    assert pieces.ends.tolist() == [2, 3, 4, 6]
    assert pieces.joined.tolist() == [True, True, False, False]


def test_words_end_where_a_document_does():
    found = words([20, 21, 23, 25], [1, 1, 2, 2])
    assert found.starts.tolist() == [0, 2]
    assert found.ends.tolist() == [2, 4]
    assert found.joined.tolist() == [False, False]  # and no n-gram goes on there


def test_words_are_taken_in_random_order_but_for_those_that_are_too_long():
    lengths = np.array([1, 2, 3, 1, 5, 2, 8])
    for seed in range(200):
        for budget in (0, 1, 2, 4, 7, 12, 22, 30):
            order = generator(seed).permutation(7)
            expected, left = [], budget
            for word in order.tolist():
                if lengths[word] <= left:
                    expected.append(word)
                    left -= lengths[word]
            assert masking.chosen_words(lengths, budget, generator(seed)).tolist() == expected


def test_shares_of_ngrams():
    np.testing.assert_allclose(masking.ngram_shares(3), [0.54545455, 0.27272727, 0.18181818], rtol=1e-7)
    row = words(np.full(4000, 20))
    lengths = np.zeros(4)
    for seed in range(150):  # so few that hardly two of them meet
        first, last = masking.chosen_ngrams(row, 40, 3, generator(seed))
        # The last ones are shortened to what is left.
        np.add.at(lengths, (last - first + 1)[:-2], 1)
    assert chi_square(lengths[1:], lengths.sum() * np.array([0.5454545, 0.2727273, 0.1818182])) < 13.8


def test_ngrams_keep_their_budget_their_distance_and_their_run():
    tokens = generator(1).integers(10, 1000, 300)
    tokens[::17] = 4  # runs of sixteen
    row = words(tokens)
    for seed in range(100):
        first, last = masking.chosen_ngrams(row, 45, 3, generator(seed))
        covered = np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])
        assert len(set(covered.tolist())) == len(covered)
        assert int((row.ends - row.starts)[covered].sum()) <= 45
        assert ((last - first) < 3).all()
        for a, b in zip(first, last, strict=True):  # nothing but words of the run in between
            assert row.ends[b] - row.starts[a] == (row.ends - row.starts)[a : b + 1].sum()


def test_tokens_of_stretches():
    assert masking.tokens_of(np.array([7, 1]), np.array([9, 4])).tolist() == [1, 2, 3, 7, 8]
    assert masking.tokens_of(np.array([], int), np.array([], int)).tolist() == []


def lists(row):
    return {name: array.tolist() for name, array in row.items()}


def test_frame():
    row = masking.framed(np.array([7, 8, 2, 9]), np.array([1, 1, 1, 2]), VOCABULARY)
    assert lists(row) == {
        "tokens": [1, 7, 8, 2, 9, 2],
        "segments": [1, 1, 1, 1, 2, 2],
        "positions": [0, 1, 2, 3, 0, 1],
    }
    assert all(array.dtype == np.int32 for array in row.values())
    whole = masking.framed(np.array([7, 8, 2, 9]), np.array([1, 1, 1, 2]), VOCABULARY, mask_documents=False)
    assert lists(whole)["segments"] == [1, 1, 1, 1, 1, 1]
    assert lists(whole)["positions"] == [0, 1, 2, 3, 4, 5]


def test_no_second_eos_and_no_second_bos():
    assert masking.framed(np.array([7, 8, 2]), None, VOCABULARY)["tokens"].tolist() == [1, 7, 8, 2]
    assert masking.framed(np.array([1, 8]), None, VOCABULARY)["tokens"].tolist() == [1, 8, 2]


def test_a_vocabulary_without_bos_and_eos():
    plain = Vocabulary(size=1000, mask_id=3, specials=(3,))
    assert lists(masking.framed(np.array([7, 8]), None, plain)) == {
        "tokens": [7, 8],
        "segments": [1, 1],
        "positions": [0, 1],
    }
    assert MLM().bind(plain).raw_length(128) == 128
    assert MLM().bind(VOCABULARY).raw_length(128) == 126


def test_padding_is_left_out():
    row = masking.framed(np.array([7, 8, 0, 0]), np.array([1, 1, 0, 0]), VOCABULARY)
    assert row["tokens"].tolist() == [1, 7, 8, 2]


def test_filled_up_and_never_cut():
    fields = {"a": ((4,), "int32"), "b": ((), "float32")}
    example = masking.filled({"a": np.array([5, 6]), "b": np.float64(2)}, fields)
    assert example["a"].tolist() == [5, 6, 0, 0]
    assert (example["a"].dtype.name, example["b"].dtype.name, float(example["b"])) == ("int32", "float32", 2.0)
    with pytest.raises(AssertionError):
        masking.filled({"a": np.arange(5), "b": np.float32(0)}, fields)


def run(objective=None, **changes):
    model = ModelConfig(architecture="encoder", vocab_size=64, heads=("lm",))
    return Run(objective=objective or MLM(), model=model, batch=BatchConfig(length=changes.pop("length", 64))).replace(
        **changes
    )


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (MLM(rate=0.0), "objective.rate is 0.0"),
        (MLM(rate=1.0), "objective.rate is 1.0"),
        (MLM(mask_share=1.2), "objective.mask_share is 1.2"),
        (MLM(random_share=-0.1), "objective.random_share is -0.1"),
        (MLM(mask_share=0.8, random_share=0.3), "more than 1 together"),
    ],
)
def test_fields_are_checked(objective, sentence):
    with pytest.raises(UserError, match=sentence):
        objective.validate(run())


def test_what_cannot_be_trained_is_named():
    MLM().validate(run())
    decoder = ModelConfig(vocab_size=64)
    with pytest.raises(UserError, match=r"objective MLM needs an encoder; model\.architecture is decoder"):
        MLM().validate(run(model=decoder))
    with pytest.raises(UserError, match=r"batch\.length is 2"):
        MLM().validate(run(length=2))
    with pytest.raises(UserError, match="needs a mask token, and the tokenizer has none"):
        MLM().bind(Vocabulary(size=10))
    with pytest.raises(UserError, match="special tokens only"):
        MLM().bind(Vocabulary(size=2, mask_id=1, specials=(0, 1)))
    assert MLM().symbols() == ("<mask>",)
