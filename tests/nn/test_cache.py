"""Caches, one claim at a time, with what defects of others would show: those of mlx-lm 0.32.2, and the traps T1.4 to
T1.15 of llm_prep. tests/test_cache_properties.py has every combination."""

import copy
import gc
import pickle
import threading

import mlx.core as mx
import numpy as np
import pytest
from support.harness import draw

from mlx_xformer.backend.threads import clear_streams_at_thread_end
from mlx_xformer.nn.attention.core import attention
from mlx_xformer.nn.attention.layer import Attention
from mlx_xformer.nn.cache import CrossCache, KVCache, Quantized, RewindError, cache_bytes, merge_caches
from mlx_xformer.nn.rotary import Rotary

B, H, G, D, DV = 2, 6, 3, 11, 13
HEADS = {"MHA": 6, "GQA": 2, "MQA": 1}


def normal(*shape, seed=0, dtype=mx.float32):
    return mx.array(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)).astype(dtype)


def pair(n, seed=0, batch=B, heads=G, D=D, DV=DV, dtype=mx.float32):
    return normal(batch, heads, n, D, seed=seed, dtype=dtype), normal(batch, heads, n, DV, seed=seed + 1, dtype=dtype)


def layer(seed=0, **options):
    """An Attention that is causal and turns its queries and keys, with drawn parameters."""
    made = Attention(30, 6, **{"rotary": Rotary(4), "causal": True, "head_dim": 8, **options})
    draw(made, seed)
    made.eval()
    return made


def stepped(made, x, cache, chunks):
    """The layer's output, chunk by chunk."""
    parts, at = [], 0
    for n in chunks:
        parts.append(made(x[:, at : at + n], cache=cache))
        at += n
    assert at == x.shape[1]
    return mx.concatenate(parts, axis=1)


def difference(a, b):
    assert a.shape == b.shape
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


# Prefill and steps (S1-17, teacher-forced)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", HEADS)
def test_steps_and_chunks_are_the_full_pass(heads, batch):
    made, x = layer(num_kv_heads=HEADS[heads]), normal(batch, 41, 30)
    full = made(x)
    for chunks in ([17] + [1] * 24, [17, 5, 2, 9, 8], [1] * 41, [41]):
        assert difference(stepped(made, x, KVCache(), chunks), full) <= 2e-6


@pytest.mark.parametrize(
    "options",
    [{"window": 5}, {"alibi": True}, {"relative": (8, 20)}, {"qk_norm": "rms", "sinks": True, "softcap": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 7])
def test_layers_of_every_kind(options, window):
    """The layer's own window applies where the cache has none or a wider one."""
    made, x = layer(**options), normal(B, 23, 30)
    near = mx.abs(mx.arange(23)[:, None] - mx.arange(23)) < (window or 23)
    full = made(x, mask=near)
    for chunks in ([1] * 23, [9, 1, 1, 12]):
        assert difference(stepped(made, x, KVCache(window=window), chunks), full) <= 2e-6


@pytest.mark.parametrize("window", [None, 6])
def test_masks_and_biases_of_the_call(window):
    """They are of all positions so far, or of those that are shown; a query without a key gives 0 as ever."""
    made, x = layer(), normal(B, 12, 30)
    mask = np.random.default_rng(1).random((B, 1, 12, 12)) > 0.3
    mask[1, 0, 9] = False
    mask, bias = mx.array(mask), normal(6, 12, 12)
    near = mask & (mx.arange(12)[:, None] - mx.arange(12) < (window or 12))
    full, cache, parts = made(x, mask=near, bias=bias), KVCache(window=window), []
    for at, n in ((0, 5), (5, 1), (6, 6)):
        some = slice(at, at + n)
        parts.append(made(x[:, some], cache=cache, mask=mask[:, :, some, : at + n], bias=bias[:, some, : at + n]))
    assert difference(mx.concatenate(parts, axis=1), full) <= 2e-6


def test_without_a_batch_axis():
    made, x, cache = layer(), normal(1, 9, 30), KVCache()
    out = mx.concatenate([made(x[0, :4], cache=cache), made(x[0, 4:], cache=cache)])
    assert difference(out, made(x)[0]) <= 2e-6


def test_ragged_rows_are_single_sequences():
    """Left padding: row by row what a cache of its own gives; rows in their padding give 0."""
    made, lengths, new = layer(num_kv_heads=2), [7, 2, 11], 5
    rows = [normal(1, n + new, 30, seed=n) for n in lengths]
    padding = [max(lengths) - n for n in lengths]
    x = mx.concatenate([mx.pad(row, [(0, 0), (p, 0), (0, 0)]) for row, p in zip(rows, padding, strict=True)])
    for kind in ({}, {"window": 4}, {"window": 4, "keep": 2, "slack": 1}):
        cache = KVCache(**kind, padding=padding)
        assert (cache.offset == -mx.array(padding)).all()
        out = stepped(made, x, cache, [max(lengths)] + [1] * new)
        assert (cache.offset == mx.array(lengths) + new).all() and cache.length == max(lengths) + new
        for b, row in enumerate(rows):
            alone = stepped(made, row, KVCache(**kind), [lengths[b]] + [1] * new)
            assert difference(out[b : b + 1, padding[b] :], alone) <= 2e-6
    view = KVCache(padding=padding).append(*pair(11, batch=3))
    inside = attention(normal(3, 6, 11, D), view.keys, view.values, **view.options)
    assert (inside[1, :, : padding[1]] == 0).all() and (mx.abs(inside[1, :, padding[1] :]) > 0).all()


# Defects of mlx-lm 0.32.2


def test_trimmed_positions_are_gone():
    """Its concatenating cache returns 6 keys after 5 - 2 + 1."""
    cache = KVCache()
    cache.append(*pair(5))
    cache.trim(2)
    more = pair(1, seed=9)
    view = cache.append(*more)
    assert cache.length == cache.offset == view.keys.shape[2] == 4
    assert (view.keys == mx.concatenate([pair(5)[0][:, :, :3], more[0]], axis=2)).all()
    assert (view.values == mx.concatenate([pair(5)[1][:, :, :3], more[1]], axis=2)).all()


@pytest.mark.parametrize("before", [3, 40])
def test_kept_positions_are_seen_by_every_query_of_a_chunk(before):
    """Its rotating cache hides them from the second query on."""
    cache, first = KVCache(window=4, keep=2), pair(before)
    cache.append(*first)
    view = cache.append(*pair(5, seed=3))
    mask = view.options.get("mask", mx.ones((5, view.keys.shape[2]), mx.bool_)).reshape(5, -1)
    assert (view.keys[:, :, :2] == first[0][:, :, :2]).all() and mask[:, :2].all()


def test_a_windowed_cache_rewinds_by_its_slack_and_no_further():
    """Its rotating cache returns 0, silently, once it has wrapped."""
    cache, made, x = KVCache(window=8, slack=3), layer(window=8), normal(1, 600, 30)
    full = made(x)
    for at in range(0, 595, 5):
        assert difference(made(x[:, at : at + 5], cache=cache), full[:, at : at + 5]) <= 2e-6
    with pytest.raises(RewindError, match="rewound by 0 to 3 of its 595 positions, got 4"):
        cache.trim(4)
    assert cache.length == cache.offset == 595
    cache.trim(3)
    with pytest.raises(RewindError, match="by 0 to 0 of its 592 positions, got 1"):
        cache.trim(1)
    assert difference(made(x[:, 592:597], cache=cache), full[:, 592:597]) <= 2e-6
    assert issubclass(RewindError, ValueError)
    early = KVCache(window=8)
    early.append(*pair(6))
    early.trim(6)  # nothing is lost yet
    assert early.length == 0


@pytest.mark.parametrize("chunks", [(300, 1, 212), (10, 300), (255, 1, 1), (1,) * 260, (5, 700, 3)])
@pytest.mark.parametrize("kind", [{}, {"bits": 8}, {"window": 30}, {"window": 300, "keep": 3}, {"capacity": 1000}])
def test_slots_stay_multiples_of_256(kind, chunks):
    """Its capacity is 557 after 300 + 1 + 212, and 522 after 10 + 300."""
    cache = KVCache(**kind)
    for n in chunks:
        cache.append(*pair(n, heads=1))
        assert all(x.shape[2] % 256 == 0 for x in cache._lines)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_quantized_attention_leaves_its_arguments_alone(n):
    """Its form scales the caller's queries in place."""
    q, (k, v) = normal(B, H, n, D), pair(40)
    k, v = Quantized.of(k, 8), Quantized.of(v, 8)
    given = [q, *k.parts, *v.parts]
    before = [np.array(x) for x in given]
    outs = [attention(q, k, v, causal=True, scale=0.3) for _ in range(2)]
    assert (outs[0] == outs[1]).all() and all((np.array(x) == y).all() for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_lengths_bytes_and_emptiness(bits):
    """Its quantized cache has size 0 at any length, and no nbytes while it is empty."""
    cache = KVCache(bits=bits)
    assert (cache.nbytes, cache.length, cache.offset, cache.arrays) == (0, 0, 0, [])
    cache.append(*pair(5))
    assert cache.length == cache.offset == 5 and cache.nbytes == sum(x.nbytes for x in cache.arrays) > 0
    cache.reset()
    assert (cache.nbytes, cache.length, cache.offset, cache.arrays) == (0, 0, 0, [])


# llm_prep's traps


@pytest.mark.parametrize("training", [False, True])
def test_trap_1_4_a_cache_that_is_given_is_used(training):
    """There it needed a private flag that nothing set."""
    made, cache = layer(), KVCache()
    made.train(training)
    x = normal(1, 6, 30)
    made(x[:, :5], cache=cache)
    assert difference(made(x[:, 5:], cache=cache), made(x)[:, 5:]) <= 2e-6 and cache.length == 6


def test_trap_1_5_positions_come_from_the_cache():
    """There every cached step was at position 0."""
    made, x, cache = layer(), normal(1, 9, 30), KVCache()
    stepped(made, x[:, :8], cache, [4, 1, 3])
    fork = cache.fork()
    made(x[:, 8:], cache=cache)
    k = made.config.rotary(mx.unflatten(made.k_proj(x), -1, (6, 8)).swapaxes(1, 2))
    assert difference(cache.append(*pair(1, batch=1, heads=6, D=8, DV=8)).keys[:, :, :9], k) <= 2e-6
    elsewhere = made(x[:, 8:], cache=fork, positions=mx.array([0]))
    assert difference(elsewhere, made(x)[:, 8:]) > 1e-3


def test_what_fitted_once_is_asked_about_again():
    """Not the same shapes as last time, nor the same after all is forgotten."""
    cache = KVCache()
    for _ in range(3):
        cache.append(*pair(1, batch=1))
    for wrong in (pair(1, batch=2), pair(1, batch=1, D=5), tuple(x.astype(mx.float16) for x in pair(1, batch=1))):
        with pytest.raises(ValueError, match="must have the batch size, heads and width that are cached"):
            cache.append(*wrong)
    cache.append(*pair(2, batch=1))
    assert cache.length == 5
    cache.reset()
    cache.append(*pair(1, batch=2))
    with pytest.raises(ValueError, match="that are cached"):
        cache.append(*pair(1, batch=1))


@pytest.mark.parametrize("change", ["another memory", "reset"])
def test_trap_1_6_a_memory_is_projected_once_until_it_changes(change):
    """There cross-attention took in one more source token every step, and kept the old source for a new one."""
    made = layer(rotary=None, causal=False, kv_dim=17)
    memory, other, x = normal(B, 7, 17), normal(B, 7, 17, seed=5), normal(B, 4, 30)
    cache, calls = CrossCache(), []
    plain = made._keys_and_values
    object.__setattr__(made, "_keys_and_values", lambda *given: calls.append(1) or plain(*given))
    assert (cache.length, cache.nbytes, cache.arrays) == (0, 0, [])
    for i in range(4):
        step = x[:, i : i + 1]
        assert difference(made(step, memory, cache=cache), made(step, memory)) == 0
        calls[1:] = []
        assert cache.length == 7 and cache.nbytes == 2 * B * 6 * 7 * 8 * 4
    assert len(calls) == 1
    if change == "reset":
        cache.reset()
        assert (cache.length, cache.nbytes) == (0, 0)
        other = memory
    fresh = made(x, other)
    calls.clear()
    assert difference(made(x, other, cache=cache), fresh) == 0 and len(calls) == 1


def test_trap_1_7_all_new_positions_are_kept():
    """There two new tokens gave two rows of which one was attended to and kept."""
    made, x, cache = layer(), normal(B, 8, 30), KVCache()
    made(x[:, :6], cache=cache)
    assert difference(made(x[:, 6:], cache=cache), made(x)[:, 6:]) <= 2e-6
    assert cache.length == 8


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 12], [20]])
def test_trap_1_8_the_window_is_what_it_was_set_to(chunks):
    """There it was the length of the input, 1 in every step."""
    made, x = layer(), normal(1, 20, 30)
    near = mx.arange(20)[:, None] - mx.arange(20) < 6
    assert difference(stepped(made, x, KVCache(window=6), chunks), made(x, mask=near)) <= 2e-6


@pytest.mark.parametrize("heads", HEADS)
def test_trap_1_9_only_key_and_value_heads_are_stored(heads):
    """There the heads were repeated before they were stored."""
    made, cache = layer(num_kv_heads=HEADS[heads]), KVCache()
    made(normal(3, 5, 30), cache=cache)
    assert [x.shape for x in cache.arrays] == [(3, HEADS[heads], 256, 8)] * 2
    assert cache.nbytes == 2 * 3 * HEADS[heads] * 256 * 8 * 4


def test_trap_1_10_bytes():
    """There a table of elements was called bytes, and a cache was said to save memory. 7 B at 32 layers, by hand."""
    table = {name: cache_bytes(4096, num_kv_heads=n, head_dim=128, dtype=mx.float16, layers=32) for name, n in
             (("MHA", 32), ("GQA", 8), ("MQA", 1))}  # fmt: skip
    slots = 4608  # 256, 512, 768, 1024, 1280, ... 2048, 2560, ..., a quarter more each time
    assert table["MHA"] == 2 * 32 * 32 * slots * 128 * 2 and table["GQA"] * 4 == table["MHA"] == table["MQA"] * 32
    assert cache_bytes(1024, num_kv_heads=8, head_dim=64) == 2 * 8 * 1024 * 64 * 4
    assert cache_bytes(3, num_kv_heads=8, head_dim=64, capacity=1000) == 2 * 8 * 1024 * 64 * 4
    for given, message in (
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"slack": -3}, "slack must be at least 0, got -3"),
        ({"capacity": 2}, "capacity must be at least 3, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_bytes(3, num_kv_heads=8, head_dim=64, **given)
    assert cache_bytes(0, num_kv_heads=8, head_dim=64) == 0
    half = cache_bytes(1024, num_kv_heads=8, head_dim=64, dtype=mx.float16)
    assert cache_bytes(1024, num_kv_heads=8, head_dim=64, dtype=mx.float16, bits=8) == half * (64 + 4) // 128
    assert cache_bytes(1024, num_kv_heads=8, head_dim=64, dtype=mx.float16, bits=4) == half * (32 + 4) // 128
    window = {"num_kv_heads": 8, "head_dim": 64, "window": 500}
    assert cache_bytes(10**6, **window) == cache_bytes(10**4, **window) == 2 * 8 * 768 * 64 * 4


def test_trap_1_15_caches_are_no_state_of_the_module():
    """There the module held the cache: two sequences met in it, and nothing cleared it."""
    made, x, y = layer(), normal(1, 9, 30), normal(1, 9, 30, seed=1)
    full_x, full_y = made(x), made(y)
    first, second = KVCache(), KVCache()
    for i in range(9):
        assert difference(made(x[:, i : i + 1], cache=first), full_x[:, i : i + 1]) <= 2e-6
        assert difference(made(y[:, i : i + 1], cache=second), full_y[:, i : i + 1]) <= 2e-6
    assert difference(made(x), full_x) == 0
    first.reset()
    assert difference(stepped(made, y, first, [9]), full_y) <= 2e-6


def test_trap_1_15_gradients_pass_through_a_cache():
    made, x = layer(), normal(1, 9, 30)
    u = normal(1, 9, 30, seed=4)
    whole = mx.grad(lambda x: (made(x) * u).sum())(x)
    cached = mx.grad(lambda x: (stepped(made, x, KVCache(), [4, 1, 4]) * u).sum())(x)
    assert difference(cached, whole) <= 4e-6


def test_trap_1_15_threads_with_caches_of_their_own():
    made, results, errors = layer(num_kv_heads=2), {}, []
    mx.eval(made.parameters())

    def run(seed):
        clear_streams_at_thread_end()
        work(seed)

    def work(seed):
        try:
            x, cache, parts = normal(1, 70, 30, seed=seed), KVCache(window=20, bits=8 if seed % 2 else None), []
            for i in range(70):
                parts.append(made(x[:, i : i + 1], cache=cache))
                mx.eval(parts[-1], cache.arrays)
            results[seed] = np.array(mx.concatenate(parts, axis=1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 4
    for seed in range(4):
        parallel = results[seed]
        work(seed)
        assert np.abs(results[seed] - parallel).max() == 0


# Copies


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_of_a_memory(copied):
    """A copy has what is projected; a pickle too, of its own array of the memory: any other is projected. Same bits."""
    made, x, memory, calls = Attention(30, 6), normal(1, 1, 30), normal(1, 9, 30, seed=1), []

    class Counted(type(made.k_proj)):
        def __call__(self, y):
            calls.append(len(y))
            return super().__call__(y)

    made.k_proj = Counted(30, 30)
    cache = CrossCache()
    made(x, memory, cache=cache)
    again = copied(cache)
    assert again.length == 9 and again.nbytes == cache.nbytes
    assert all(mx.array_equal(*both) for both in zip(again.arrays, cache.arrays, strict=True))
    assert mx.array_equal(made(2 * x, memory, cache=again), made(2 * x, memory, cache=cache))
    assert len(calls) == (2 if copied is pickled else 1)
    both = pickled((memory, cache))
    assert mx.array_equal(made(3 * x, both[0], cache=both[1]), made(3 * x, memory, cache=cache))
    assert len(calls) == (2 if copied is pickled else 1)
    assert copied(CrossCache()).length == 0


# Memory


def peak(work):
    """Bytes beyond what was held, at the most, while work() runs; it is evaluated inside."""
    mx.clear_cache()
    mx.reset_peak_memory()
    gc.collect()  # what other tests left would be freed while this one measures
    before = mx.get_active_memory()
    work()
    return mx.get_peak_memory() - before


def step(cache, seed=1, n=1, heads=8, width=64):
    k, v = pair(n, seed=seed, batch=1, heads=heads, D=width, DV=width)
    mx.eval(k, v)

    def work():
        view = cache.append(k, v)
        out = attention(k, view.keys, view.values, **view.options)
        del view
        mx.eval(out, cache.arrays)

    return work


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", [{}, {"window": 1500}, {"window": 1500, "keep": 4, "slack": 5}])
def test_an_append_copies_nothing(kind, bits):
    cache = KVCache(**kind, bits=bits)
    for n in (1800, 1, 1):
        step(cache, n=n)()
    assert max(peak(step(cache)) for _ in range(5)) < cache.nbytes / 2


def test_growth_is_amortised():
    """4096 appends: few lines, and less than 4 times the last one's bytes in all of them."""
    cache, sizes = KVCache(), []
    k, v = pair(1, batch=1, heads=1)
    for _ in range(4096):
        cache.append(k, v)
        if cache.nbytes not in sizes:
            sizes.append(cache.nbytes)
            mx.eval(cache.arrays)
    assert len(sizes) < 13 and sum(sizes) < 5.5 * sizes[-1]
    assert cache.nbytes == cache_bytes(4096, num_kv_heads=1, head_dim=D, value_dim=DV)


def test_a_windowed_line_is_renewed_once_in_many_appends():
    cache, renewed = KVCache(window=100, keep=3), 0
    k, v = pair(1, batch=1, heads=1)
    for _ in range(2000):
        before = cache._slot
        cache.append(k, v)
        mx.eval(cache.arrays)
        renewed += cache._slot < before
    assert 0 < renewed < 2000 / 250
    assert cache.nbytes == cache_bytes(2000, num_kv_heads=1, head_dim=D, value_dim=DV, window=100, keep=3)


def test_a_fork_costs_a_copy_at_its_first_write():
    cache = KVCache()
    for n in (1500, 1):
        step(cache, n=n)()
    gc.collect()  # what other tests left would be freed while this one measures
    held = mx.get_active_memory()
    fork = cache.fork()
    assert mx.get_active_memory() == held
    first = peak(step(fork))
    assert cache.nbytes <= first < 1.5 * cache.nbytes
    assert mx.get_active_memory() - held == pytest.approx(cache.nbytes, rel=0.05)
    assert max(peak(step(one)) for one in (fork, cache, fork, cache)) < cache.nbytes / 2
    assert fork.length == 1504 and cache.length == 1503


def test_forks_share_their_prefix_and_nothing_else():
    made, x = layer(window=9), normal(1, 30, 30)
    cache = KVCache(window=9, slack=2)
    stepped(made, x[:, :20], cache, [19, 1])
    others = [cache.fork() for _ in range(2)]
    others[0].trim(2)
    for fork, at in ((others[0], 18), (others[1], 20), (cache, 20)):
        tail = normal(1, 6, 30, seed=at)
        full = made(mx.concatenate([x[:, :at], tail], axis=1))[:, at:]
        assert difference(stepped(made, tail, fork, [1, 5]), full) <= 2e-6


@pytest.mark.parametrize("heads", [8, 2])
def test_an_8_bit_cache_lowers_bytes_and_peak(heads):
    """Against float16, in a chunk of prefill and in decode (bench/cases/cache.py: at 8k)."""
    found = {}
    for bits in (None, 8):
        cache = KVCache(bits=bits)
        k, v = pair(1792, batch=1, heads=heads, D=64, DV=64, dtype=mx.float16)
        cache.append(k, v)
        mx.eval(cache.arrays)
        del k, v
        peaks = []
        for n in (256, 1):
            new = [normal(1, 8, n, 64, dtype=mx.float16), *pair(n, batch=1, heads=heads, D=64, DV=64, dtype=mx.float16)]
            mx.eval(new)

            def work(new=new, cache=cache):
                view = cache.append(*new[1:])
                out = attention(new[0], view.keys, view.values, **view.options)
                del view
                mx.eval(out, cache.arrays)

            peaks.append(cache.nbytes + peak(work))
        found[bits] = (cache.nbytes, *peaks)
    assert found[8][0] <= 0.6 * found[None][0]
    assert found[8][1] <= found[None][1] and found[8][2] <= found[None][2]


# Rows


@pytest.mark.parametrize("kind", [{}, {"bits": 8}, {"window": 5, "slack": 2}, {"window": 5, "keep": 2}], ids=str)
def test_rows_are_selected_reordered_and_repeated(kind):
    made, x = layer(num_kv_heads=2), normal(3, 40, 30)
    cache = KVCache(**kind)
    stepped(made, x[:, :39], cache, [30, 9])
    expected = made(x[:, 39:], cache=cache.fork())
    beams = cache.select(mx.array([2, 0, 0, 1]))
    assert difference(made(x[mx.array([2, 0, 0, 1]), 39:], cache=beams), expected[mx.array([2, 0, 0, 1])]) <= 2e-6
    assert beams.length == 40 and cache.length == 39


@pytest.mark.parametrize("kind", [{}, {"bits": 4}, {"window": 5, "slack": 2}, {"window": 5, "keep": 2}], ids=str)
def test_merged_rows_go_on_as_before(kind):
    """Prompts of 3, 40 and 12 tokens, each prefilled alone; then one batch; then rows leave it, and come back."""
    made, lengths = layer(num_kv_heads=2), [3, 40, 12]
    xs = [normal(1, n + 8, 30, seed=n) for n in lengths]
    alone = [KVCache(**kind) for _ in lengths]
    for x, n, cache in zip(xs, lengths, alone, strict=True):
        made(x[:, :n], cache=cache)
    batch = merge_caches(alone)
    assert batch.padding == (37, 0, 28) and (batch.offset == mx.array(lengths)).all()

    def same(rows, i):
        """Token i of these rows, in the batch and alone."""
        new = mx.concatenate([xs[row][:, lengths[row] + i : lengths[row] + i + 1] for row in rows])
        expected = mx.concatenate([made(new[j : j + 1], cache=alone[row]) for j, row in enumerate(rows)])
        assert difference(made(new, cache=batch), expected) <= 2e-6

    same([0, 1, 2], 0)
    same([0, 1, 2], 1)
    batch = batch.select([2, 0])
    assert batch.padding == (0, 9) and batch.length == 14
    same([2, 0], 2)
    made(xs[1][:, 42:43], cache=alone[1])
    batch = merge_caches([batch, alone[1]])
    for i in range(3, 6):
        same([2, 0, 1], i)
    rows, wanted = batch.split(), [alone[row] for row in (2, 0, 1)]
    assert [row.padding for row in rows] == [None] * 3 and [row.length for row in rows] == [c.length for c in wanted]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"keep": -1}, "keep must be at least 0, got -1"),
        ({"slack": -2}, "slack must be at least 0, got -2"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"bits": 5}, "bits must be None or one of 8, 4, got 5"),
        ({"padding": []}, r"padding must be at least 0 for each of at least one row, got \[\]"),
        ({"padding": [3, -1]}, r"padding must be at least 0 .*, got \[3, -1\]"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KVCache(**options)


SINGLE = mx.zeros((B, G, 1, D))


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (mx.zeros((G, 1, D)), SINGLE, r"k must be \(batch, heads, length, dim\) of 1 .*, got \(3, 1, 11\)"),
        (SINGLE[:, :, :0], SINGLE[:, :, :0], "k must be .* of 1 or more positions, got"),
        (SINGLE, mx.zeros((B, G, 2, D)), r"v must have the .* length of k, \(2, 3, 1\), got \(2, 3, 2\)"),
        (SINGLE.astype(mx.int32), SINGLE, "k must be a float, got mlx.core.int32"),
        (SINGLE, SINGLE[..., :5], r"v must have .* that are cached, \(2, 3, 13\) in mlx.core.float32, got \(2, 3, 5\)"),
        (mx.zeros((B, 1, 1, D)), mx.zeros((B, 1, 1, DV)), r"k must have .* that are cached, \(2, 3, 11\)"),
        (mx.zeros((3, G, 1, D)), mx.zeros((3, G, 1, DV)), r"k must have .* that are cached, \(2, 3, 11\)"),
        (SINGLE.astype(mx.float16), mx.zeros((B, G, 1, DV)), "k must have .* got .* in mlx.core.float16"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("bits", [None, 8])
def test_appends_that_are_refused_change_nothing(bits, k, v, message):
    cache = KVCache(bits=bits)
    cache.append(*pair(3))
    before = cache.arrays
    with pytest.raises(ValueError, match=message):
        cache.append(k, v)
    assert cache.length == 3 and all(x is y for x, y in zip(cache.arrays, before, strict=True))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        cache.append(*pair(1), window=0)
    with pytest.raises(ValueError, match="k must have the 5 rows that padding names, got 2"):
        KVCache(padding=[0] * 5).append(SINGLE, SINGLE)


@pytest.mark.parametrize("window", [None, 20])
def test_a_full_cache_says_so(window):
    cache = KVCache(capacity=300, window=window)
    cache.append(*pair(299))
    with pytest.raises(ValueError, match="the cache is full: its capacity is 300 positions, got 301"):
        cache.append(*pair(2))
    cache.append(*pair(1))
    assert cache.length == 300 and cache._lines[0].shape[2] == 512


@pytest.mark.parametrize("n", [-1, 6])
def test_trims_that_are_refused(n):
    cache = KVCache()
    cache.append(*pair(5))
    with pytest.raises(RewindError, match=f"rewound by 0 to 5 of its 5 positions, got {n}"):
        cache.trim(n)
    assert cache.length == 5


def test_rows_that_are_refused():
    cache = KVCache()
    cache.append(*pair(5))
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match=r"rows must be at least one of 0 to 1, got \[.*\]"):
            cache.select(rows)
    with pytest.raises(ValueError, match="caches must be at least one to merge, got none"):
        merge_caches([])
    with pytest.raises(ValueError, match=r"caches must be of one kind, .*'window': None.* got .*'window': 4"):
        merge_caches([cache, KVCache(window=4)])
    other = KVCache()
    other.append(*pair(5, heads=1))
    with pytest.raises(
        ValueError, match=r"caches must agree in heads, widths and dtype, \(3, 11, 13, .*got \(1, 11, 13"
    ):
        merge_caches([cache, other])


@pytest.mark.parametrize(
    ("cache", "given", "message"),
    [
        (KVCache(), {"source": normal(B, 7, 17)}, "needs causal self-attention, got a source or causal=False"),
        (KVCache(), {"causal": False}, "a KVCache needs causal self-attention"),
        (KVCache(), {"offset": 3}, "offset must be 0 with a KVCache, which has its own, got 3"),
        (KVCache(keep=2), {"mask": mx.ones((4, 4), mx.bool_)}, "needs keep 0 for masks and biases .* got 2"),
        (CrossCache(), {}, "a CrossCache needs a source and no value_source"),
        (CrossCache(), {"source": normal(B, 7, 17), "value_source": normal(B, 7, 17)}, "a CrossCache needs a source"),
    ],
)  # fmt: skip
def test_calls_that_are_refused(cache, given, message):
    made = layer(rotary=None, kv_dim=17) if "source" in given else layer()
    with pytest.raises(ValueError, match=message):
        made(normal(B, 4, 30), cache=cache, **given)
    assert cache.length == 0


def test_biases_by_distance_need_caches_without_kept_positions():
    with pytest.raises(ValueError, match="needs keep 0 for masks and biases"):
        layer(alibi=True)(normal(B, 4, 30), cache=KVCache(keep=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": -1}, "length must be at least 0, got -1"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"bits": 3}, "bits must be None or one of 8, 4, got 3"),
    ],
    ids=str,
)
def test_sizes_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        cache_bytes(**{"length": 4, "num_kv_heads": 2, "head_dim": 8, **given})


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"window": 90}, {"window": 90, "keep": 4, "slack": 7}], ids=str)
def test_the_table_of_bytes(kind, dtype, bits):
    cache = KVCache(**kind, bits=bits)
    for n in (1, 100, 1, 600, 200):
        cache.append(*pair(n, dtype=dtype, D=64, DV=40))
        sizes = {"num_kv_heads": G, "head_dim": 64, "value_dim": 40, "batch": B}
        assert cache.nbytes == cache_bytes(cache.length, **sizes, dtype=dtype, bits=bits, **kind)
        assert 3 * cache.nbytes == cache_bytes(cache.length, **sizes, dtype=dtype, bits=bits, **kind, layers=3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"window": 5}, {"window": 5, "keep": 2}], ids=str)
def test_half_precision(kind, dtype):
    """What is stored is what was appended, and attention is as exact as over one array."""
    cache, (k, v), q = KVCache(**kind), pair(30, dtype=dtype), normal(B, H, 30, D, dtype=dtype)
    for at in range(0, 30, 3):
        some = slice(at, at + 3)
        view = cache.append(k[:, :, some], v[:, :, some])
        out = attention(q[:, :, some], view.keys, view.values, **view.options)
        near = mx.arange(at, at + 3)[:, None] - mx.arange(at + 3)
        seen = (near < kind.get("window", 30)) | (mx.arange(at + 3) < kind.get("keep", 0))
        whole = attention(q[:, :, some], k[:, :, : at + 3], v[:, :, : at + 3], causal=True, mask=seen)
        unit = {mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
        assert out.dtype == dtype and difference(out, whole) <= 3 * unit * mx.abs(whole).max().item()
