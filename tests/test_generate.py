"""Generation with a cache against the whole prefix run again for every token, by token ids that a tokenizer spells out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import generate as module
from maxpretrain.config import MeshConfig, ModelConfig
from maxpretrain.data.tokenizer import Bytes, Characters
from maxpretrain.errors import Diverged, UserError
from maxpretrain.generate import CHUNK, Generator
from maxpretrain.mesh import make_layout
from maxpretrain.models import build
from maxpretrain.nn.base import is_spec
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import PrefixLM

LETTERS = Characters("abcdefghijklmnopqrstuvwxyz .")
# Positions end at 24: 12 tokens of context go on when they do. 28 ids, and rows of the embedding beyond them.
CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    max_length=24,
    tie_embeddings=False,
    norm="rmsnorm",
    bias=False,
)
# Three prompts and 40 tokens everywhere: what is compiled for one test serves the next.
PROMPTS = ["the quick", "a", "some longer prompt"]
NEW = 40


@functools.cache
def setup(position):
    model = build(dataclasses.replace(CONFIG, position=position))
    rng = np.random.default_rng(3)

    def leaf(spec):  # drawn by numpy, which compiles nothing
        return jnp.asarray((spec.role == "norm") + 0.5 * rng.standard_normal(spec.shape), jnp.float32)

    params = jax.tree.map(leaf, model.abstract, is_leaf=is_spec)
    return model, params, Generator(model, LETTERS)


def generate(prompts, position="learned", count=NEW, params=None, **how):
    _, own, generator = setup(position)
    return generator(params or own, prompts, max_new_tokens=count, **how)


@functools.cache
def likeliest(position):
    model, params, _ = setup(position)
    return jax.jit(lambda tokens, at: model.logits(params, model.apply(params, tokens).hidden)[0, at, :28].argmax())


def whole(prompt, position="learned", count=NEW):
    """Greedy text without a cache: the whole window is run for every token."""
    window = LETTERS.encode(prompt).tolist()
    made = []
    for _ in range(count):
        if position == "learned" and len(window) > 24:
            window = window[-12:]
        padded = np.zeros((1, 24 if position == "learned" else 64), np.int32)
        padded[0, : len(window)] = window
        made.append(int(likeliest(position)(padded, len(window) - 1)))
        window.append(made[-1])
    return LETTERS.decode(made)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_greedy_equals_running_the_whole_prefix_for_each_token(position):
    texts = generate(PROMPTS, position)
    assert texts == [whole(prompt, position) for prompt in PROMPTS]
    assert len(set("".join(texts))) > 10


def test_window_slides_many_times():
    long_prompt = "a prompt that is longer than the window is"
    texts = generate(["abc", long_prompt, "a"], count=120)
    assert texts == [whole("abc", count=120), whole(long_prompt[-12:], count=120), whole("a", count=120)]


def test_long_prompts_go_through_in_pieces(monkeypatch):
    prompts = [("pack my box with five dozen jugs. " * 2)[: CHUNK + 13], "ab", "x" * (CHUNK + 1)]
    monkeypatch.setattr(module, "PIECE", 16)
    assert generate(prompts, "rope", count=6) == [whole(prompt, "rope", count=6) for prompt in prompts]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 7}])
def test_what_else_is_in_the_batch_does_not_matter(how):
    """Rows end their windows at different times, and each must be as if it were the only one."""
    together = generate(PROMPTS, **how)
    assert generate([PROMPTS[0], "zz", "zzzzz zzzzz"], **how)[0] == together[0]
    assert generate(["z" * 23, PROMPTS[1], "z" * 31], **how)[1] == together[1]
    assert generate(["q", "z. " * 15, PROMPTS[2]], **how)[2] == together[2]
    if not how:
        assert generate(PROMPTS[:1]) == together[:1]


def test_sampling_follows_seed_and_filters():
    draw = functools.partial(generate, ["the "] * 3, temperature=1.5)
    one = draw(seed=1)
    assert one == draw(seed=1)
    assert one != draw(seed=2)
    assert len(set(one)) == 3
    greedy = generate(["the "] * 3)
    assert draw(top_k=1) == greedy
    assert draw(top_p=1e-6) == greedy
    assert len(set(draw(top_k=2, seed=1)) - set(greedy)) == 3


def test_shorter_limits_are_prefixes_and_zero_is_nothing():
    full = generate(PROMPTS)
    assert generate(PROMPTS, count=13) == [text[:13] for text in full]
    assert generate(PROMPTS, count=0) == ["", "", ""]
    assert generate([]) == []


def test_streamed_text_is_the_returned_text():
    pieces = {0: [], 1: [], 2: []}
    texts = generate(PROMPTS, stream=lambda index, text: pieces[index].append(text))
    assert texts == generate(PROMPTS)
    assert ["".join(parts) for parts in pieces.values()] == texts
    assert [len(parts) for parts in pieces.values()] == [40, 40, 40]


def test_ids_beyond_the_tokenizer_are_never_made():
    model, params, _ = setup("learned")
    kernel = params["unembed"]["kernel"].at[:, 28:].multiply(50.0)  # by far the largest logits, of either sign
    louder = params | {"unembed": {"kernel": kernel}}
    hidden = jax.jit(model.apply)(louder, jnp.zeros((1, 4), jnp.int32)).hidden
    assert (model.logits(louder, hidden).argmax(-1) >= 28).any()
    for how in ({}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 30}):
        assert [len(text) for text in generate(PROMPTS, params=louder, **how)] == [40, 40, 40]


def test_settings_and_models_that_cannot_serve():
    model, params, _ = setup("learned")
    with pytest.raises(UserError, match="max_new_tokens is -1; it must be at least 0"):
        generate(["a"], count=-1)
    with pytest.raises(UserError, match="top_k is 0"):
        generate(["a"], top_k=0)
    with pytest.raises(UserError, match="the tokenizer has 256 ids, but the model only 32"):
        Generator(model, Bytes())
    norm = jax.tree.map(lambda x: x * jnp.nan, params["decoder"]["norm"])
    broken = params | {"decoder": params["decoder"] | {"norm": norm}}
    with pytest.raises(Diverged, match="the model's logits after 9 tokens of prompt 0 are not finite"):
        generate(PROMPTS, params=broken)


def test_networks_that_do_not_generate():
    def ask(**changes):
        model = build(dataclasses.replace(CONFIG, **changes))
        return Generator(model, LETTERS)({}, ["a"], max_new_tokens=1)

    with pytest.raises(UserError, match="an encoder does not continue texts; give it one with masks to fill"):
        ask(architecture="encoder")
    with pytest.raises(UserError, match=r'model.heads are sequence; without "lm" there is nothing to generate with'):
        ask(heads=("sequence",))
    with pytest.raises(UserError, match=r"model.decoder_start_id is None; set it to the id"):
        ask(architecture="encoder-decoder")


@contextlib.contextmanager
def compilations():
    """A list that grows by one for each compilation inside."""
    events = []
    note = lambda event, *_, **__: events.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_parameters_spread_over_a_mesh():
    model, params, _ = setup("learned")
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(params, layout.param_shardings(model.abstract))
    expected = generate(PROMPTS)
    with compilations() as first:
        assert generate(PROMPTS, params=spread) == expected
    # An empty state and a chunk. Placed as the partitioner likes it, the state would be compiled for again and again.
    assert len(first) == 2


def test_how_the_model_was_trained_is_not_how_it_is_run():
    _, params, _ = setup("learned")
    generator = Generator(build(CONFIG, Execution(scan=False, remat="full", dtype="bfloat16")), LETTERS)
    assert generator._model.execution == Execution(scan=True, remat="none", dtype="bfloat16")
    assert [len(text) for text in generator(params, PROMPTS, max_new_tokens=NEW)] == [40, 40, 40]


def test_other_prompts_and_settings_compile_nothing():
    generate(PROMPTS, temperature=0.8, seed=1)
    with compilations() as found:
        generate(["a cat", "b", "c"], count=33, temperature=1.1, seed=2)
    assert found == []


class Chain:
    """A model that answers each token with the one that a table names; the table is its parameters."""

    def __init__(self, config, execution):
        self.config, self.execution = config, execution

    def empty_cache(self, rows, capacity):
        return {"key": jnp.zeros((1, rows, capacity, 1, 1))}

    def decode(self, params, tokens, positions, cache, memory_segments=None):
        return jax.nn.one_hot(tokens, self.config.vocab_size), cache

    def logits(self, params, hidden):
        return hidden @ params


@pytest.fixture
def chain(monkeypatch):
    def make(follows, tokenizer):
        monkeypatch.setattr(module, "build", Chain)
        size = tokenizer.vocab_size
        table = np.zeros((size, size), np.float32)
        table[list(follows), list(follows.values())] = 1
        model = Chain(ModelConfig(vocab_size=size, position="none"), Execution())
        return functools.partial(Generator(model, tokenizer), jnp.asarray(table))

    return make


def test_eos_ends_each_row_by_itself(chain):
    tokenizer = Characters("abcdef", ["</s>"])
    assert tokenizer.eos_id == 6
    answer = chain({0: 1, 1: 2, 2: 6, 3: 4, 4: 3, 6: 0}, tokenizer)
    assert answer(["a", "d", "c"], max_new_tokens=5) == ["bc", "edede", ""]
    assert answer([""], max_new_tokens=5) == ["abc"]  # begins with eos, for want of a bos


def test_an_empty_prompt_begins_with_bos_or_says_what_is_missing(chain):
    follows = {0: 1, 1: 2, 2: 3, 3: 0}
    with_bos = chain(follows | {4: 2, 5: 0}, Characters("abcd", ["<s>", "</s>"]))
    assert with_bos([""], max_new_tokens=2) == ["cd"]
    with pytest.raises(UserError, match="the prompt is empty, and a characters tokenizer without bos and eos"):
        chain(follows, Characters("abcd"))(["a", ""], max_new_tokens=2)


def test_no_half_character_is_streamed(chain):
    data = list("é😀.".encode())  # 2, 4 and 1 bytes
    answer = chain(dict(zip(data, [*data[1:], data[0]], strict=True)), Bytes())
    pieces = []
    stream = lambda _, piece: pieces.append(piece)  # noqa: E731
    assert answer(["é"], max_new_tokens=14, stream=stream) == ["😀.é😀.é"]
    assert pieces == ["😀", ".", "é", "😀", ".", "é"]
    pieces.clear()
    assert answer(["."], max_new_tokens=4, stream=stream) == ["é�"]  # cut inside the second one
    assert pieces == ["é", "�"]


@pytest.mark.parametrize("piece", [4, 256])
def test_a_prompt_read_in_both_directions(piece, monkeypatch):
    """As a prefix language model learns to: all of the prompt's tokens see each other, however long it is."""
    model, params, _ = setup("rope")
    monkeypatch.setattr(module, "PIECE", piece)
    prompts = ["abc", "pack my box with five dozen jugs. " * 2]
    generator = Generator(model, LETTERS, PrefixLM())

    @jax.jit
    def following(tokens, length, at):
        prefix = jnp.arange(96)[None] < length
        logits = model.logits(params, model.apply(params, tokens[None], prefix=prefix).hidden)
        return logits[0, at, :28].argmax()

    def whole(prompt, count=6):
        ids = LETTERS.encode(prompt).tolist()
        for made in range(count):
            padded = np.pad(np.array(ids), (0, 96 - len(ids)))
            ids.append(int(following(padded, len(ids) - made, len(ids) - 1)))
        return LETTERS.decode(ids[-count:])

    texts = generator(params, prompts, max_new_tokens=6)
    assert texts == [whole(prompt) for prompt in prompts]
    assert texts[1] != generate([prompts[1]], "rope", count=6)[0]


FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
# 32 ids: letters, eos 28, and what stands before a prefix, a suffix and a middle.
MIDDLE = Characters("abcdefghijklmnopqrstuvwxyz .", ["</s>"], FIM)


def test_a_middle_is_what_follows_prefix_and_suffix(chain):
    answer = chain({31: 4, 4: 5, 5: 28}, MIDDLE)
    pieces = []
    stream = lambda _, piece: pieces.append(piece)  # noqa: E731
    assert answer(["ab", ""], suffixes=["ef", ""], max_new_tokens=9, stream=stream) == ["cd", "cd"]
    assert "".join(pieces) == "ccdd"
    assert answer(["ab"], suffixes=["ef"], max_new_tokens=1) == ["c"]
    assert answer([], suffixes=[], max_new_tokens=1) == []


def test_a_middle_sees_both_sides_and_ends_with_the_positions():
    model, params, _ = setup("learned")
    generator = Generator(model, MIDDLE)
    given = [29, *MIDDLE.encode("the qu"), 30, *MIDDLE.encode("jumps"), 31]  # 14 of 24 positions
    quiet = params | {"unembed": {"kernel": params["unembed"]["kernel"].at[:, 28:].set(0.0)}}  # letters alone
    logits = jax.jit(lambda tokens: model.logits(quiet, model.apply(quiet, tokens).hidden)[0])
    ids = list(given)
    while len(ids) < 25:
        ids.append(int(logits(np.array([ids + [0] * (24 - len(ids))], np.int32))[len(ids) - 1].argmax()))
    expected = MIDDLE.decode(ids[14:])
    assert len(expected) == 11
    ask = lambda prompts, suffixes, count=40: generator(  # noqa: E731
        quiet, prompts, suffixes=suffixes, max_new_tokens=count
    )
    assert ask(["the qu"], ["jumps"]) == [expected]
    assert ask(["the qu", "a" * 20], ["jumps", ""])[0] == expected
    assert ask(["the qu"], ["jumps"], 3) == [expected[:3]]
    assert ask(["the qu"], ["jumpy"]) != [expected]
    with pytest.raises(
        UserError, match="prompt 1 and its suffix have 25 tokens, and the model positions for 24; shorten them"
    ):
        ask(["a", "a" * 20], ["", "bb"])


def test_suffixes_that_cannot_be():
    model, params, plain = setup("learned")
    with pytest.raises(UserError, match="the tokenizer has no tokens for prefix, suffix and middle"):
        plain(params, ["a"], suffixes=["b"], max_new_tokens=1)
    with pytest.raises(UserError, match="there are 2 prompts and 1 suffixes; give one for each"):
        Generator(model, MIDDLE)(params, ["a", "b"], suffixes=["b"], max_new_tokens=1)
    _, params, both = answering("t5")
    with pytest.raises(
        UserError, match=r"a suffix is for a decoder .* this network is an encoder-decoder; leave it out"
    ):
        both(params, ["a"], suffixes=["b"], max_new_tokens=1)


ENDING = Characters("abcdefghijklmnopqrstuvwxyz .", ["</s>"])  # id 28
KINDS = {
    "t5": {"position": "t5", "num_decoder_layers": 3},
    "bart": {"position_offset": 2, "max_length": 32, "norm_placement": "post", "embed_norm": True, "bias": True},
}


@functools.cache
def answering(kind, tokenizer=LETTERS):
    """An encoder-decoder, its parameters, its generator; the decoder starts with id 30."""
    shape = dataclasses.replace(
        CONFIG, architecture="encoder-decoder", num_kv_heads=4, decoder_start_id=30, **KINDS[kind]
    )
    model = build(shape)
    rng = np.random.default_rng(0)

    def leaf(spec):
        return jnp.asarray((spec.role == "norm") + 0.3 * rng.standard_normal(spec.shape), jnp.float32)

    return model, jax.tree.map(leaf, model.abstract, is_leaf=is_spec), Generator(model, tokenizer)


@functools.cache
def scores(kind):
    model, _, _ = answering(kind)

    def of_the_next(params, tokens, segments, decoder_tokens, at):
        hidden = model.apply(params, tokens, segments=segments, decoder_tokens=decoder_tokens).hidden
        return model.logits(params, hidden)[0, at]

    return jax.jit(of_the_next)


def answer_whole(prompt, kind, params, count, tokenizer=LETTERS):
    """A greedy answer without a cache and with the prompt alone in its batch."""
    ids = tokenizer.encode(prompt).tolist() + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    tokens, segments, made = np.zeros((1, 32), np.int32), np.zeros((1, 32), np.int32), [30]
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    while len(made) <= count:
        decoder_tokens = np.zeros((1, 32), np.int32)
        decoder_tokens[0, : len(made)] = made
        found = scores(kind)(params, tokens, segments, decoder_tokens, len(made) - 1)
        made.append(int(found[: tokenizer.vocab_size].argmax()))
        if made[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode(made[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_answers_as_if_all_were_run_for_each_token(kind):
    _, params, generator = answering(kind)
    pieces = {0: [], 1: [], 2: []}
    texts = generator(params, PROMPTS, max_new_tokens=25, stream=lambda index, text: pieces[index].append(text))
    assert texts == [answer_whole(prompt, kind, params, 25) for prompt in PROMPTS]
    assert ["".join(parts) for parts in pieces.values()] == texts
    assert len(set(texts)) == 3
    # the other prompts do not matter
    assert generator(params, ["q", PROMPTS[1], "z" * 30], max_new_tokens=25)[1] == texts[1]


def test_drawn_answers():
    _, params, generator = answering("t5")
    texts = generator(params, PROMPTS, max_new_tokens=25)
    drawn = generator(params, PROMPTS, max_new_tokens=25, temperature=1.0, seed=3)
    assert drawn != texts
    assert generator(params, [PROMPTS[0], "z" * 20, "z"], max_new_tokens=25, temperature=1.0, seed=3)[0] == drawn[0]


def test_eos_ends_the_prompt_and_the_answer():
    _, params, generator = answering("t5", ENDING)
    kernel = params["unembed"]["kernel"]
    likely = params | {"unembed": {"kernel": kernel.at[:, 28].set(1.1 * kernel[:, ENDING.encode("g")[0]])}}
    texts = generator(likely, PROMPTS, max_new_tokens=25)
    assert texts == [answer_whole(prompt, "t5", likely, 25, ENDING) for prompt in PROMPTS]
    assert [len(text) for text in texts] == [25, 3, 10]
    assert len(generator(likely, ["", "ab", PROMPTS[2]], max_new_tokens=25)) == 3  # eos alone is something to read


def test_answers_that_outgrow_the_positions_go_on():
    _, params, generator = answering("bart")
    texts = generator(params, PROMPTS, max_new_tokens=70)  # they end at 32
    assert [len(text) for text in texts] == [70] * 3
    assert generator(params, PROMPTS, max_new_tokens=25) == [text[:25] for text in texts]


def test_prompts_that_an_encoder_cannot_read():
    _, params, generator = answering("bart")
    with pytest.raises(UserError, match="prompt 1 has 33 tokens, and the encoder positions for 32; shorten it"):
        generator(params, ["a", "b" * 33], max_new_tokens=1)
    assert len(generator(params, ["b" * 32], max_new_tokens=1)[0]) == 1
    with pytest.raises(UserError, match="the prompt is empty, and a characters tokenizer without bos and eos"):
        generator(params, ["a", ""], max_new_tokens=1)


def test_other_questions_compile_nothing():
    _, params, generator = answering("t5")
    generator(params, PROMPTS, max_new_tokens=25)
    with compilations() as found:
        generator(params, ["a longer cat than that", "b", "c"], max_new_tokens=20)
    assert found == []


def test_an_encoder_decoder_spread_over_a_mesh():
    model, params, generator = answering("t5")
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(params, layout.param_shardings(model.abstract))
    expected = generator(params, PROMPTS, max_new_tokens=25)
    with compilations() as first:
        assert generator(spread, PROMPTS, max_new_tokens=25) == expected
    assert len(first) == 3  # an empty state, the prompts, a chunk
