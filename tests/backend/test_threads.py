"""Threads that share a model: the same bits as one after the other, in processes that exit without an error."""

import os
import subprocess
import sys

import pytest

# A process: three threads with one model, each doing everything several times. `work(i)` is what thread i does.
PROCESS = """
import hashlib, sys, threading
import numpy as np
import mlx_xformer
import mlx.core as mx
from mlx_xformer import clear_streams_at_thread_end
from mlx_xformer.text import batch_generate, generate

def evaluated(model):
    model.eval()
    mx.eval(model.parameters())
    return model

def tokens(model, prompt, **options):
    return [(t.id, t.logprob) for t in generate(model, prompt, max_tokens=12, logprobs=True, **options)]

def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()

mx.random.seed(0)
MODEL
expected = [work(i) for i in range(3)] if sys.argv[1] == "after" else None
found, failed = {}, []

def run(i):
    clear_streams_at_thread_end()
    try:
        found[i] = [work(i) for _ in range(int(sys.argv[2]))]
    except Exception as error:
        failed.append(repr(error))

threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
if expected is None:  # the model was new to all threads
    expected = [work(i) for i in range(3)]
assert len(set(map(str, expected))) == 3
for i in range(3):
    assert all(one == expected[i] for one in found[i]), i
print("equal", end="")
"""

MODELS = {
    "CausalLM": """
from mlx_xformer import CausalLM, CausalLMConfig
sizes = dict(vocab_size=97, num_heads=4, num_kv_heads=2, hidden_dim=61)
model = evaluated(CausalLM(CausalLMConfig(embed_dim=32, num_layers=2, **sizes)))
draft = evaluated(CausalLM(CausalLMConfig(embed_dim=16, num_layers=1, **sizes)))

def work(i):
    prompt = [3, 5, 7 + i]
    return tokens(model, prompt), tokens(model, prompt, draft=draft), batch_generate(model, [prompt, [2]], max_tokens=9)
""",
    "CausalLM, packed, with a mixture": """
from mlx_xformer import CausalLM, CausalLMConfig, MoEConfig
from mlx_xformer.models.causal_lm.model import Quantization, quantize
moe = MoEConfig(64, 32, num_experts=5, num_experts_per_tok=2, gated=True, activation="silu")
model = CausalLM(CausalLMConfig(vocab_size=97, embed_dim=64, num_layers=2, num_heads=4, hidden_dim=96, moe=moe))
mx.random.seed(1)
quantize(model, Quantization(bits=4, group_size=32))
evaluated(model)

def work(i):
    return tokens(model, [3, 5, 7 + i])
""",
    "T5": """
from mlx_xformer.models.t5 import T5, T5Config
sizes = dict(vocab_size=97, embed_dim=32, num_layers=2, num_heads=4, head_dim=8, hidden_dim=61)
model = evaluated(T5(T5Config(**sizes)))
shared = model.conditioned(mx.array([[5, 8, 2, 7], [1, 6, 4, 3]]))

def work(i):
    own = model.conditioned(mx.array([[5, 8, 2, 7 + i]]))
    return tokens(own, [0]), batch_generate(shared, [[0], [i + 1, 2]], max_tokens=9), digest(shared.memory)
""",
    "Whisper": """
from mlx_xformer.models.bound import Conditioned
from mlx_xformer.models.whisper import Whisper, WhisperConfig
sizes = dict(vocab_size=97, embed_dim=32, num_heads=4, hidden_dim=61, encoder_layers=2, decoder_layers=2)
model = evaluated(Whisper(WhisperConfig(**sizes, mel_bins=11, source_positions=30, target_positions=40)))
mel = np.random.default_rng(0).normal(size=(1, 50, 11)).astype(np.float32)

def work(i):
    memory = model.encoder(mx.array(mel + i))
    return tokens(Conditioned(model, memory), [1]), digest(memory)
""",
    "Stack": """
from mlx_xformer import KVCache
from mlx_xformer.models.guides.scratch import StackConfig, TransformerStack
model = evaluated(TransformerStack(StackConfig(32, 8, 61, num_heads=4, enc_out_dim=24, num_stack=2, causal=True)))
x, memory = (np.random.default_rng(0).normal(size=(1, 9, n)).astype(np.float32) for n in (32, 24))

def work(i):
    given, caches = mx.array(x + i), [KVCache() for _ in range(2)]
    steps = [model(given[:, at : at + 1], mx.array(memory), caches=caches) for at in range(9)]
    return digest(model(given, mx.array(memory)), *steps)
""",
    "Transformer": """
from mlx_xformer.models.transformer import Transformer, TransformerConfig
sizes = dict(embed_dim=32, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, hidden_dim=61)
model = evaluated(Transformer(TransformerConfig(97, **sizes)))

def work(i):
    return tokens(model.conditioned(mx.array([[5, 8, 2, 7 + i]])), [0])
""",
    "Separator": """
from mlx_xformer import Separator
separator = Separator("htdemucs_mini", shifts=1)
audio = np.random.default_rng(0).normal(size=(2, 44100)).astype(np.float32) / 9

def work(i):
    return digest(*separator.separate(audio * (i + 1), 44100).values())
""",
}


def run(model, *arguments):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    code = PROCESS.replace("MODEL", MODELS[model])
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (ended.returncode, ended.stdout) == (0, "equal"), ended.stderr[-2000:]


@pytest.mark.parametrize("model", MODELS)
def test_threads_with_one_model(model):
    run(model, "before", 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attempt", range(20))
def test_threads_with_one_model_many_times(model, attempt):
    run(model, ("before", "after")[attempt % 2], 3)


POOL = """
from concurrent.futures import ThreadPoolExecutor
import mlx_xformer, sys, threading
import mlx.core as mx
cleared, clear = [], mx.clear_streams
mx.clear_streams = lambda: (cleared.append(threading.get_ident()), clear())
square = mx.compile(lambda x: x * x + 1)

def work(i):
    return threading.get_ident(), (square(mx.full((50, 50), float(i))) @ mx.ones((50, 50)))[0, 0].item()

with ThreadPoolExecutor(2, initializer=mlx_xformer.clear_streams_at_thread_end) as pool:
    found = list(pool.map(work, range(20)))
assert [value for _, value in found] == [50.0 * (i * i + 1) for i in range(20)]
assert {ident for ident, _ in found} <= set(cleared) and len(cleared) == len(set(cleared))  # each thread its own
print("cleared", end="")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not abort")
def test_streams_of_a_pool_are_cleared_by_its_threads():
    ended = subprocess.run([sys.executable, "-c", POOL], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "cleared"), ended.stderr[-2000:]
