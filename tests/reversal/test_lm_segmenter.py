"""An assistant that reads: units are the text whatever it thinks, and it finds the units that it was taught."""

import functools
import itertools
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from permjax.nets.gpt import GPT2Config
from permjax.nets.registry import build
from permjax.reversal.lm_segmenter import LMSegmenter, huggingface_logits, marked_tokens
from permjax.reversal.segment import SegmentError, check_units, join_words, split_words
from permjax.reversal.segment_metrics import compare

pytestmark = pytest.mark.fast

START, MARK, FIRST = 0, 1, 2
NOUNS, ADJECTIVES, VERBS, PLACES = ["dog", "cat", "bird", "fox"], ["big", "small"], ["sees", "likes"], ["near", "under"]
WORDS = ["the", *NOUNS, *ADJECTIVES, *VERBS, *PLACES]
LENGTH, VOCABULARY = 24, 16


def encode(text):
    """One token per word, unknown ones the last."""
    words = split_words(text)
    ends = np.cumsum([len(word) for word in words]).tolist()
    known = [WORDS.index(word.strip()) if word.strip() in WORDS else len(WORDS) for word in words]
    return [FIRST + number for number in known], [
        (end - len(word.strip()), end) for word, end in zip(words, ends, strict=True)
    ]


def phrase(rng):
    return ["the", *rng.choice(ADJECTIVES, rng.integers(2)).tolist(), str(rng.choice(NOUNS))]


def drawn_units(rng):
    """Noun phrase, verb, noun phrase, and a place or none."""
    parts = [phrase(rng), [str(rng.choice(VERBS))], phrase(rng)]
    parts += [[str(rng.choice(PLACES)), *phrase(rng)]] * int(rng.integers(2))
    words = [word if place == 0 else f" {word}" for place, word in enumerate(itertools.chain(*parts))]
    return join_words(words, list(map(len, parts)))


def marked_rows(count):
    rng, rows = np.random.default_rng(0), np.full((count, LENGTH), -1, np.int32)
    for row in rows:
        units = drawn_units(rng)
        ids = np.repeat(np.arange(len(units), dtype=np.int32), [len(unit.split()) for unit in units])
        tokens = marked_tokens(np.array(encode("".join(units))[0], np.int32), ids, MARK)
        row[: len(tokens) + 1] = [START, *tokens]
    return rows


@pytest.fixture(scope="module")
def assistant():
    """A GPT of one block, trained for some seconds on marked sentences."""
    net = build(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2))
    optimizer, params = optax.adam(2e-2), net.init(jax.random.key(0))

    def loss(params, rows):
        logits = net.apply(params, jnp.maximum(rows[:, :-1], 0))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(rows[:, 1:], 0))
        return jnp.mean(losses * (rows[:, 1:] >= 0))

    @jax.jit
    def train(params, batches):
        def step(carry, rows):
            updates, state = optimizer.update(jax.grad(loss)(carry[0], rows), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    batches = np.random.default_rng(0).permutation(np.tile(marked_rows(320), (10, 1))).reshape(100, 32, LENGTH)
    return jax.jit(functools.partial(net.apply, train(params, batches)))


def arbitrary(tokens):
    """A model that knows nothing: scores by the sum of the tokens so far, causal and the same every time."""
    sums = np.cumsum(tokens, axis=-1)[..., None]
    return np.sin(sums * (1.0 + np.arange(VOCABULARY)))


def reader(logits=arbitrary, **options):
    return LMSegmenter(logits, encode, MARK, **{"prompt": (START,), "context": LENGTH, **options})


@pytest.mark.parametrize("passes", [1, 2])
def test_a_trained_assistant_finds_the_units_that_it_was_taught(assistant, passes):
    rng = np.random.default_rng(1)
    wanted = [drawn_units(rng) for _ in range(30)]
    found = [reader(assistant, passes=passes)("".join(units)) for units in wanted]
    assert compare(found, wanted).boundary_f1 > 0.95
    assert compare([(text,) for text in map("".join, wanted)], wanted).boundary_f1 == 0


@given(st.text(max_size=60), st.sampled_from([1, 2, 3]), st.sampled_from([6, 9, 24]))
def test_units_are_the_text_whatever_the_model_says(text, passes, context):
    check_units(text, reader(passes=passes, context=context)(text))


def test_an_infinite_threshold_cuts_nowhere_and_a_negative_one_before_every_word():
    text = "the  dog sees\na bird "
    assert reader(threshold=np.inf)(text) == (text,)
    assert reader(threshold=-np.inf, passes=3)(text) == tuple(split_words(text))


def test_a_score_is_the_log_odds_of_the_mark_against_the_next_token():
    text = "the dog sees the bird"
    tokens = np.array(encode(text)[0])
    gaps, scores = reader(passes=1).scores(text)
    logits = arbitrary(np.array([[START, *tokens]]))[0]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(1, len(tokens))
    np.testing.assert_allclose(scores, logs[places, MARK] - logs[places, tokens[1:]], rtol=1e-5)
    assert gaps.tolist() == [3, 7, 12, 16]


def test_later_passes_read_the_marks_found_before():
    text = "the dog sees the bird"
    seen = []
    reader(lambda tokens: seen.append(tokens[0]) or arbitrary(tokens), threshold=-np.inf)(text)
    words = encode(text)[0]
    assert seen[0][:6].tolist() == [START, *words]
    assert seen[1][:10].tolist() == [START, words[0], MARK, words[1], MARK, words[2], MARK, words[3], MARK, words[4]]


def test_windows_of_a_short_context_score_like_one_long_pass_where_the_model_looks_back_little():
    def last_two(tokens):
        near = tokens + 3 * np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        return np.sin(near[..., None] * (1.0 + np.arange(VOCABULARY)))

    text = " ".join(np.random.default_rng(0).choice(WORDS, 50).tolist())
    (_, long), (_, short) = (reader(last_two, context=size, passes=1).scores(text) for size in (64, 8))
    np.testing.assert_allclose(short, long, atol=1e-6)


def test_a_hugging_face_model_is_read_through_its_logits():
    torch = pytest.importorskip("torch")

    class Model(torch.nn.Linear):
        def forward(self, input_ids):
            assert input_ids.dtype == torch.int64
            return SimpleNamespace(logits=torch.from_numpy(arbitrary(input_ids.numpy())))

    model = Model(2, 2, dtype=torch.bfloat16)
    text = "the dog sees the bird near the fox"
    assert reader(huggingface_logits(model))(text) == reader()(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"prompt": ()}, "'prompt' is empty"), ({"context": 4}, "no room for text"), ({"passes": 0}, "at least once")],
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(SegmentError, match=words):
        reader(**options)
