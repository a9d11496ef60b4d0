"""Real Transformers on real checkpoints: small random ones that the tests make, and SmolLM2 where KVOYANT_SMOLLM2 names its GGUF file."""

import copy
import os
import pathlib
import subprocess
import sys
import time

import pytest
from conftest import Daemon

torch = pytest.importorskip("torch", reason="scripts/check-transformers installs torch and transformers")
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config  # noqa: E402

from kvoyant.transformers import ATTENTION, KvoyantCache  # noqa: E402

VOCABULARY, PAD = 128, 0
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=None, initializer_range=0.2,
)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-sliding": MistralConfig(**SHAPE, sliding_window=48),
    "qwen2": Qwen2Config(**SHAPE),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints in safetensors, written and loaded again."""
    loaded = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(len(name))
        folder = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        assert list(folder.glob("*.safetensors"))
        loaded[name] = folder
    return lambda name: AutoModelForCausalLM.from_pretrained(loaded[name], dtype=torch.float32).eval()


@pytest.fixture(params=FAMILIES)
def model(request, models):
    return models(request.param)


def texts(*lengths, seed=3):
    """Random texts of these lengths, padded on the left."""
    random = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros((len(lengths), width), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(2, VOCABULARY, (length,), generator=random)
        mask[row, width - length :] = 1
    return dict(input_ids=ids, attention_mask=mask)


def generate(model, inputs, cache=None, **how):
    """Tokens with our cache, or with Transformers' own and its own attention."""
    model.set_attn_implementation("sdpa" if cache is None else ATTENTION)
    torch.manual_seed(11)
    how = {"max_new_tokens": 24, "do_sample": False, **how}
    return model.generate(**inputs, **({"cache": cache} if cache is not None else {}), **how)


def cache_for(model, daemon, method="full", **how):
    return KvoyantCache(model, daemon.socket, method=method, window=16, dense_layers=1, **how)


def test_full_gives_the_tokens_of_plain_generate(model, in_place):
    inputs = texts(150)
    wanted = generate(model, inputs)
    with cache_for(model, in_place) as cache:
        assert torch.equal(generate(model, inputs, cache), wanted)
        assert cache.get_seq_length() == wanted.shape[1] - 1
        # The daemon has counted all steps but those that it is still at.
        assert cache.counters()["rows_appended"] >= 150 * 4 * 2
        assert cache.certificate() is None


def test_padding_on_the_left_changes_nothing_and_is_never_stored(model, in_place):
    inputs = texts(150, 90, 20)
    wanted = generate(model, inputs)
    with cache_for(model, in_place) as cache:
        assert torch.equal(generate(model, inputs, cache), wanted)
        assert [sequence.tokens for sequence in cache._sequences] == [150 + 23, 90 + 23, 20 + 23]


def test_several_sequences_are_sampled_from_each_prompt(model, in_place):
    inputs, how = texts(60, 40), dict(do_sample=True, num_return_sequences=3, temperature=0.8, top_k=0)
    wanted = generate(model, inputs, **how)
    assert len({tuple(row.tolist()) for row in wanted}) == 6
    with cache_for(model, in_place) as cache:
        assert torch.equal(generate(model, inputs, cache, **how), wanted)


def test_beams_are_forked_and_dropped(model, in_place):
    inputs, how = texts(60, 40), dict(num_beams=4, num_return_sequences=2)
    wanted = generate(model, inputs, **how)
    with cache_for(model, in_place) as cache:
        assert torch.equal(generate(model, inputs, cache, **how), wanted)
        assert len(cache._sequences) == 8


def test_drafts_of_an_assistant_are_truncated_when_they_are_rejected(models, in_place):
    model, assistant = models("llama"), models("llama")
    with torch.no_grad():
        # An assistant that is often wrong, and often right.
        assistant.lm_head.weight += 0.3 * torch.randn(assistant.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    inputs = texts(80)
    wanted = generate(model, inputs)
    with cache_for(model, in_place) as cache:
        cropped = []
        crop = cache.crop
        cache.crop = lambda tokens: (cropped.append(tokens), crop(tokens))[1]
        assert torch.equal(generate(model, inputs, cache, assistant_model=assistant), wanted)
        assert any(cropped) and cache.get_seq_length() <= wanted.shape[1]
    with cache_for(model, in_place) as cache:
        assert torch.equal(generate(model, inputs, cache, prompt_lookup_num_tokens=3), wanted)


def test_a_text_goes_on_is_cut_and_copied(model, in_place):
    inputs = texts(70)
    first = generate(model, inputs)
    longer = torch.cat([first, texts(9, seed=5)["input_ids"]], 1)
    longer = dict(input_ids=longer, attention_mask=torch.ones_like(longer))
    wanted = generate(model, longer)
    with cache_for(model, in_place) as cache:
        generate(model, inputs, cache)
        with copy.deepcopy(cache) as other:
            # Only what is new is computed: the next turn of a chat.
            assert torch.equal(generate(model, longer, cache), wanted)
            assert torch.equal(generate(model, longer, other), wanted)
        cache.crop(70 - cache.get_seq_length())
        assert cache.get_seq_length() == 70 and cache._sequences[0].tokens == 70
        logits = model(first[:, 70:71], cache=cache).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(logits, model(first[:, :71]).logits[:, -1:], atol=1e-4, rtol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(model, inputs, cache), first)


def test_a_text_whose_rows_lie_on_disk_goes_on(models, in_place, tmp_path):
    (tmp_path / "spill").mkdir()
    daemon = Daemon(tmp_path, "--in-place", "true", "--spill", str(tmp_path / "spill"), "--spill-bytes", "256MiB", "--host-percent", "5")
    try:
        model = models("llama")
        inputs = texts(600)
        said = []
        for each in (in_place, daemon):
            # Which brings nothing back while it decodes.
            with cache_for(model, each, method="window") as cache:
                first = generate(model, inputs, cache)
                longer = torch.cat([first, texts(9, seed=5)["input_ids"]], 1)
                # Several tokens at once, over rows of which most are not in memory.
                said.append(generate(model, dict(input_ids=longer, attention_mask=torch.ones_like(longer)), cache))
                assert cache._session.spills == (each is daemon)
        assert torch.equal(said[0], said[1])
    finally:
        daemon.stop()


def test_rows_of_half_floats_are_stored_as_such(models, in_place):
    model = models("qwen2").to(torch.bfloat16)
    inputs = texts(100)
    with cache_for(model, in_place) as cache:
        assert cache._session.dtype == "bf16"
        logits = model(**inputs, cache=cache).logits
        step = model(inputs["input_ids"][:, :1], cache=cache).logits
    model.set_attn_implementation("sdpa")
    longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], 1)
    wanted = model(longer).logits
    torch.testing.assert_close(logits, wanted[:, :-1], atol=0.3, rtol=0.1)
    torch.testing.assert_close(step, wanted[:, -1:], atol=0.3, rtol=0.1)


def test_kvoyant_selects_and_certifies(models, in_place):
    model = models("llama")
    inputs = texts(1200)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        wanted = model(torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], 1)).logits[0, -1]
        with cache_for(model, in_place, "kvoyant:budget=12%") as cache:
            model(**inputs, cache=cache)
            logits = model(inputs["input_ids"][:, :1], cache=cache).logits[0, -1]
            known = cache.certificate()
            assert known["answers"] == 3 * 4 and 0 < known["missed_mass_mean"] <= known["missed_mass_max"] <= 1
            counted = cache.counters()
            assert 0 < counted["rows_selected"] < 0.3 * 1200 * 3 * 2
    close = torch.nn.functional.cosine_similarity(logits, wanted, dim=0)
    assert close > 0.98


def test_attention_without_a_cache_is_the_models_own(models, in_place):
    model = models("llama")
    inputs = texts(30, 12)
    wanted = model(**inputs, use_cache=False).logits
    with cache_for(model, in_place):
        mine = model(**inputs, use_cache=False).logits
    text = inputs["attention_mask"].bool()
    torch.testing.assert_close(mine[text], wanted[text], atol=1e-4, rtol=1e-4)


def test_wrong_use_is_told(models, in_place):
    model = models("llama")
    with cache_for(model, in_place) as cache:
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="has not attended by kvoyant"):
            model(**texts(5), cache=cache)
    with cache_for(model, in_place) as cache:
        generate(model, texts(8), cache)
        with pytest.raises(ValueError, match="a batch of 2, where the cache has 1 texts"):
            model(**texts(4, 4), cache=cache)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)
        with pytest.raises(ValueError, match="another cache"):
            model.generate(**texts(8), max_new_tokens=2, do_sample=False)
    with pytest.raises(Exception, match="clairvoyance"):
        KvoyantCache(model, in_place.socket, method="clairvoyance")


def test_another_transformers_is_refused_by_a_plain_error():
    program = "import transformers; transformers.__version__ = '4.0.1'; import kvoyant.transformers"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.returncode and f"pip install 'transformers=={kvoyant_tested()}.*'" in said.stderr.splitlines()[-1]


def kvoyant_tested():
    import kvoyant.transformers

    assert transformers.__version__.startswith(kvoyant.transformers.TESTED + ".")
    return kvoyant.transformers.TESTED


PAGE = pathlib.Path(__file__).resolve().parents[3] / "docs/transformers.md"
TOKENS, TOKENS_SAID = 768, 16
SMOLLM2 = os.environ.get("KVOYANT_SMOLLM2")


@pytest.fixture(scope="module")
def smollm2():
    if not SMOLLM2:
        pytest.skip("KVOYANT_SMOLLM2 names no GGUF file: scripts/check-transformers says which")
    file = pathlib.Path(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model, tokenizer


def follow(model, cache, ids, tokens, greedy=False):
    """Log-probabilities of the next token after a prompt and after each of `tokens`, or of the likeliest ones; and the time of a step in ms."""
    found = [model(ids, cache=cache).logits[0, -1].log_softmax(-1)]
    since = time.perf_counter()
    for at in range(TOKENS_SAID - 1):
        token = found[-1].argmax() if greedy else tokens[at]
        found.append(model(token.view(1, 1), cache=cache).logits[0, -1].log_softmax(-1))
    return torch.stack(found), (time.perf_counter() - since) / (TOKENS_SAID - 1) * 1e3


def test_the_real_model_says_the_same_with_full_and_nearly_with_a_tenth(smollm2, tmp_path):
    model, tokenizer = smollm2
    text = PAGE.read_text() + (PAGE.parent / "architecture.md").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :TOKENS]
    daemon = Daemon(tmp_path, "--in-place", "true", arena="1GiB")
    try:
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            dense, plain_ms = follow(model, transformers.DynamicCache(config=model.config), ids, None, greedy=True)
            wanted = dense.argmax(-1)
            with KvoyantCache(model, daemon.socket, method="full") as cache:
                inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
                said = generate(model, inputs, cache, max_new_tokens=TOKENS_SAID, repetition_penalty=1.0, eos_token_id=None)
                assert torch.equal(said[0, TOKENS:], wanted)
            with KvoyantCache(model, daemon.socket, method="kvoyant:budget=12%") as cache:
                sparse, ms = follow(model, cache, ids, wanted)
                known = cache.certificate()
    finally:
        daemon.stop()
    same = (sparse.argmax(-1) == wanted).float().mean().item()
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    print(f"after {TOKENS} tokens, kvoyant:budget=12%: next token as plain {same:.1%}, KL {kl:.5f} nats, {ms:.0f} ms per token (plain {plain_ms:.0f})")
    print("certified:", known)
    assert same >= 0.9 and kl < 0.02 and known["missed_mass_mean"] < 0.2
