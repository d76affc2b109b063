"""Fine-tuning a checkpoint of files on permuted units, in all weights or by low-rank updates."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.experiments.language_files import open_language_model
from permjax.experiments.progress import Progress
from permjax.experiments.spt import run
from permjax.experiments.spt_config import LoraConfig, SptConfig
from permjax.io.checkpoint import save_checkpoint
from permjax.io.tokenizers import train_byte_bpe
from permjax.lora.formats import open_adapter
from permjax.nets.gpt import GPT2Config
from permjax.nets.registry import build, config_to_dict
from permjax.reversal.checkpoint_words import CheckpointWords, special_of
from permjax.reversal.corpus import names, token_documents
from permjax.reversal.lora_training import lora_net, with_updates
from permjax.reversal.training import ReversalTraining

CORPUS = names(6, 6, pool=9, tellings=1)
TRAINING = ReversalTraining(steps=4, batch_size=8, warmup_steps=1, every=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_byte_bpe(CORPUS.texts, 300)
    config = GPT2Config(vocab_size=tokenizer.size, n_positions=96, n_embd=16, n_layer=1, n_head=2)
    save_checkpoint(path, build(config).init(jax.random.key(0)))
    values = config_to_dict(config) | {"bos_token_id": 0, "eos_token_id": 0}
    (path / "config.json").write_text(json.dumps({key: value for key, value in values.items() if key != "prefix"}))
    tokenizer.inner.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return open_language_model(folder)


def config(folder, **options):
    sizes = {"both": 6, "one_way": 6, "pool": 9, "tellings": 1}
    return SptConfig(options=sizes, methods=("spt",), checkpoint=str(folder), training=TRAINING, **options)


def test_all_texts_begin_with_a_space_where_the_tokenizer_tells_the_start_apart(model):
    words = CheckpointWords(model.tokenizer, special_of(model.config))
    ids, offsets = words("Ann is here")
    assert words.tokenizer.decode(ids) == " Ann is here"
    assert offsets[0][0] == 0
    assert "".join("Ann is here"[start:end] for start, end in offsets) == "Ann is here"
    document = token_documents(CORPUS, words)[0]
    units = document["unit_ids"]
    for number, unit in enumerate(CORPUS.documents[0]):
        assert words.tokenizer.decode(document["tokens"][units == number]).strip() == unit.strip()


@pytest.mark.fast
def test_the_tokens_around_a_text_are_those_of_the_configuration():
    assert special_of({"bos_token_id": 1, "eos_token_id": [2, 3]})[:3] == (1, 2, 2)
    assert special_of({"eos_token_id": 5})[:2] == (5, 5)
    with pytest.raises(ValueError, match="bos_token_id"):
        special_of({})


def test_updates_start_at_nothing_and_leave_the_weights_alone(model):
    net = lora_net(model.net, model.params, rank=2, targets="*attn*")
    updates = net.init(jax.random.key(0))
    assert {*updates} == {"h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"}
    (tokens,) = model.net.example_inputs(2)
    here, there = net.apply(updates, tokens, frozen=model.params), model.net.apply(model.params, tokens)
    np.testing.assert_array_equal(here, there)
    grown = {name: one._replace(b=jnp.ones_like(one.b)) for name, one in updates.items()}
    changed = with_updates(model.params, grown, 3.0)
    name = "h.0.attn.c_proj.weight"
    expected = np.asarray(model.params[name]) + 3.0 * np.asarray(grown[name].b) @ np.asarray(grown[name].a)
    np.testing.assert_allclose(changed[name], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"'\*query\*'.*h.0.attn.c_attn.weight"):
        lora_net(model.net, model.params, targets="*query*")


def test_a_checkpoint_is_tuned_whole_and_saved_with_its_tokenizer(folder, model, tmp_path):
    with Progress(visible=False) as progress:
        outcome = run(config(folder), tmp_path, progress)
    assert "fine-tuned in all weights from the checkpoint" in outcome.summary
    tuned = open_language_model(tmp_path / "model" / "spt")
    assert any(np.abs(np.asarray(tuned.params[name] - leaf)).max() > 0 for name, leaf in model.params.items())


def test_updates_of_a_checkpoint_are_saved_as_an_adapter_that_gives_the_tuned_model(folder, model, tmp_path):
    with Progress(visible=False) as progress:
        outcome = run(config(folder, lora=LoraConfig(rank=2)), tmp_path, progress)
    assert "by updates of rank 2" in outcome.summary
    factors = open_adapter(tmp_path / "model" / "spt").factors()
    assert {*factors} == {f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    one = factors["h.0.mlp.c_proj"]
    assert (one.b @ one.a).shape == model.params["h.0.mlp.c_proj.weight"].shape[::-1]
    assert np.abs(one.b @ one.a).max() > 0


@pytest.mark.fast
def test_what_a_checkpoint_cannot_be_trained_by_is_refused():
    whole = SptConfig(checkpoint="model", methods=("spt",))
    with pytest.raises(ValueError, match="mlm_u, which needs a token for masks"):
        replace(whole, methods=("mlm_u",))
    with pytest.raises(ValueError, match="lora needs a checkpoint"):
        SptConfig(lora=LoraConfig())
