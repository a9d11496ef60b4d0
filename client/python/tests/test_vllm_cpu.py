"""vLLM on the CPU with the connector and with the attention backend: a small Llama with random weights, generate() and `vllm serve` from end to end.

Needs a vLLM that runs on the CPU: scripts/check-vllm --install-cpu has it. Each run is a process of its own, since vLLM is set up once in a process.
"""

import contextlib
import json
import os
import socket as sockets
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vLLM is not installed: scripts/check-vllm installs it")
from vllm.platforms import current_platform  # noqa: E402

if not current_platform.is_cpu():
    pytest.skip("this build of vLLM does not run on a CPU: scripts/check-vllm --install-cpu installs one that does", allow_module_level=True)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip

PROGRAM = """
import json, os, sys
from vllm import LLM, SamplingParams

folder, told = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=4, block_size=32, seed=1,
          disable_hybrid_kv_cache_manager=True, **told["options"])
prompts = [{"prompt_token_ids": tokens} for tokens in told["prompts"]]
outputs = llm.generate(prompts, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, detokenize=False), use_tqdm=False)
said = {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "cached": [output.num_cached_tokens for output in outputs]}
try:
    from kvoyant.vllm.attention import sessions
    shared = sessions()
    said["sparse"] = shared.sparse if shared else 0
    said["counters"] = shared.model.counters() if shared else None
except ImportError:
    pass
print("SAID", json.dumps(said))
"""


# The daemon's, once it runs.
SOCKET = []


@pytest.fixture(scope="module", autouse=True)
def socket(in_place):
    SOCKET[:] = [in_place.socket]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with random weights whose attention is peaked, as a trained one's is."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("llama")
    (path / "config.json").write_text(json.dumps(CONFIG))
    random = torch.Generator().manual_seed(5)
    hidden, kv, inner = 128, 64, 256
    tensors = {"model.embed_tokens.weight": torch.randn(512, hidden, generator=random), "model.norm.weight": torch.ones(hidden)}
    tensors["lm_head.weight"] = torch.randn(512, hidden, generator=random) / hidden**0.5
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            peaked = 3**0.5 if name.endswith(("q_proj", "k_proj")) else 1
            weight = torch.randn(rows, columns, generator=random) * peaked / columns**0.5
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden)
    save_file(tensors, path / "model.safetensors")
    return path


def prompt(seed, count):
    return [int(token) for token in torch.randint(3, 500, (count,), generator=torch.Generator().manual_seed(seed))]


def generate(folder, prompts, options, **environment):
    told = json.dumps({"prompts": prompts, "options": options})
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), told], env=env, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert done.returncode == 0 and lines, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(lines[-1].removeprefix("SAID "))


PROMPTS = [prompt(1, 300), prompt(2, 70), prompt(1, 300)[:150] + prompt(3, 40)]


@pytest.fixture(scope="module")
def plain(folder):
    return generate(folder, PROMPTS, {"enable_prefix_caching": False})


def test_the_connector_gives_plain_vllms_tokens_and_a_second_process_begins_with_the_firsts_prefixes(folder, plain):
    transfer = {
        "kv_connector": "KvoyantConnector",
        "kv_connector_module_path": "kvoyant.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"socket": SOCKET[0], "fingerprint": os.urandom(16).hex()},
    }
    first = generate(folder, PROMPTS, {"kv_transfer_config": transfer})
    second = generate(folder, PROMPTS, {"kv_transfer_config": transfer})
    assert first["tokens"] == second["tokens"] == plain["tokens"]
    assert second["cached"][0] == 288 and second["cached"][1] == 64 and second["cached"][2] >= 128, second["cached"]


def test_decode_steps_attend_through_the_daemon(folder, plain):
    full, quest = (
        generate(
            folder,
            PROMPTS,
            {"enable_prefix_caching": False},
            KVOYANT_VLLM_METHOD=method,
            KVOYANT_VLLM_SOCKET=SOCKET[0],
        )
        for method in ("full", "quest:budget=30%,hint=current")
    )
    # 39 steps of each request in each layer; the first token comes from the prompt.
    assert full["sparse"] == quest["sparse"] == len(PROMPTS) * 39 * CONFIG["num_hidden_layers"]
    assert full["tokens"] == plain["tokens"]
    assert [len(tokens) for tokens in quest["tokens"]] == [40] * len(PROMPTS)
    assert 0 < quest["counters"]["rows_selected"] < 0.6 * full["counters"]["rows_selected"]


def test_a_prefix_cache_beside_the_backend_falls_back_to_dense_attention(folder, plain):
    both = generate(
        folder,
        [PROMPTS[0], PROMPTS[0]],
        {"enable_prefix_caching": True, "max_num_batched_tokens": 320},
        KVOYANT_VLLM_METHOD="full",
        KVOYANT_VLLM_SOCKET=SOCKET[0],
    )
    assert both["tokens"] == [plain["tokens"][0]] * 2
    assert both["cached"][1] > 0
    # The first goes through the daemon; of the second it does not have the beginning.
    assert both["sparse"] == 39 * CONFIG["num_hidden_layers"]


@pytest.fixture(scope="module")
def named(folder):
    """The same model with a tokenizer, of which a server takes and gives words: token 7 is `w7`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # No word may begin as a special token does: those are looked for within words.
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{token}": token for token in range(3, CONFIG["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


# `vllm serve`. The command asks for the version of the package `vllm`, which builds for the CPU that have another name have not.
SERVE = """
import importlib.metadata, sys
from importlib.metadata import PackageNotFoundError, version

def known(name):
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "vllm":
            raise
        # By its end vLLM knows what it was built for.
        return version("vllm-cpu") + "+cpu"

importlib.metadata.version = known
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    sys.argv[0] = "vllm"
    main()
"""


@contextlib.contextmanager
def served(folder, tmp_path, *options, **environment):
    """A server of vLLM's own, and a function that asks it for the words after others, and for how many of those it had already."""
    with sockets.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", **environment}
    program = tmp_path / "vllm_serve.py"
    program.write_text(SERVE)
    command = [sys.executable, str(program), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4", "--block-size", "32", "--seed", "1"]
    command += ["--served-model-name", "small", "--enable-prompt-tokens-details", *options]
    log = tmp_path / f"served-{port}"
    with open(log, "wb") as out:
        server = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def ask(words, tokens=24):
        body = {"model": "small", "prompt": words, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            said = json.load(answer)
        details = said["usage"].get("prompt_tokens_details") or {}
        return said["choices"][0]["text"].split(), details.get("cached_tokens") or 0

    try:
        since = time.monotonic()
        while True:
            assert server.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() - since < 600, log.read_text()[-6000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield ask
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


def test_a_server_begins_with_what_another_one_published_and_both_give_the_same_words(named, tmp_path):
    transfer = json.dumps({
        "kv_connector": "KvoyantConnector",
        "kv_connector_module_path": "kvoyant.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"socket": SOCKET[0], "fingerprint": os.urandom(16).hex()},
    })  # fmt: skip
    options = ["--disable-hybrid-kv-cache-manager", "--kv-transfer-config", transfer]
    first, longer = (" ".join(f"w{token}" for token in tokens) for tokens in (PROMPTS[0], PROMPTS[0] + prompt(9, 20)))
    with served(named, tmp_path, *options) as ask:
        words, cached = ask(first)
        assert len(words) == 24 and cached == 0, (words, cached)
        # The same prefix again, and more behind it.
        _, cached = ask(longer)
        assert cached >= 288, cached
    with served(named, tmp_path, *options) as ask:
        again, cached = ask(first)
        assert again == words and cached == 288, (again, words, cached)


def test_a_server_attends_through_the_daemon_and_gives_plain_vllms_words(named, tmp_path):
    words = " ".join(f"w{token}" for token in PROMPTS[1])
    with served(named, tmp_path, "--no-enable-prefix-caching") as ask:
        plain, _ = ask(words)
    method = {"KVOYANT_VLLM_METHOD": "full", "KVOYANT_VLLM_SOCKET": SOCKET[0]}
    with served(named, tmp_path, "--no-enable-prefix-caching", **method) as ask:
        found, _ = ask(words)
        assert found == plain
