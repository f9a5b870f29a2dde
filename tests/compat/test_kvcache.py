"""flash_attn_with_kvcache: a loop over the sequences in float64 says what is right. What is not filled is NaN."""

import warnings

import pytest
import torch

from flashcore import api, kv_cache
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_with_kvcache
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from tests.test_kv_cache import turned
from tests.tolerance import assert_forward

CAPACITY, HEAD_DIM = 24, 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.filterwarnings("ignore:attention over a cache:flashcore.errors.FlashCoreWarning")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    monkeypatch.delenv("FLASHCORE_CHECK_LENGTHS", raising=False)


class Step:
    """A call: sequences with `lengths` keys in a cache, and `new` ones for each."""

    def __init__(
        self, lengths, seqlen_q=1, new=0, heads=(4, 2), dtype=torch.float32, device="cpu", rows=None, leftpad=None,
        capacity=CAPACITY,
    ):  # fmt: skip
        self.lengths, self.new, self.rows = lengths, new, rows or list(range(len(lengths)))
        self.leftpad = leftpad or [0] * len(lengths)
        generator = torch.Generator().manual_seed(len(lengths) + seqlen_q + new)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        batch, (heads_q, heads_k) = len(lengths), heads
        self.q = normal(batch, seqlen_q, heads_q, HEAD_DIM)
        self.k, self.v = (normal(batch, new, heads_k, HEAD_DIM) for _ in range(2))
        self.k_cache, self.v_cache = (normal(max(self.rows) + 1, capacity, heads_k, HEAD_DIM) for _ in range(2))
        filled = torch.zeros(max(self.rows) + 1, capacity, dtype=torch.bool)
        for row, length, pad in zip(self.rows, lengths, self.leftpad, strict=True):
            filled[row, pad:length] = True
        for cached in (self.k_cache, self.v_cache):
            cached[~filled.to(device)] = torch.nan
        self.before = self.k_cache.clone(), self.v_cache.clone()

    def integers(self, numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=self.q.device)

    def __call__(self, **options):
        """(out, lse)"""
        given = {"k": self.k, "v": self.v} if self.new else {}
        if self.rows != list(range(len(self.lengths))):
            given["cache_batch_idx"] = self.integers(self.rows)
        if any(self.leftpad):
            given["cache_leftpad"] = self.integers(self.leftpad)
        options = {"cache_seqlens": self.integers(self.lengths), "return_softmax_lse": True} | options
        return flash_attn_with_kvcache(self.q, self.k_cache, self.v_cache, **given, **options)

    def assert_right(self, out, lse, *, rotary=None, interleaved=True, each=True, score=None, **mask):
        """:param each: whether a query is rotated by its own position."""
        assert out.shape == self.q.shape
        assert lse.shape == (len(out), out.shape[2], out.shape[1])
        assert lse.is_contiguous()
        for b, (row, length, pad) in enumerate(zip(self.rows, self.lengths, self.leftpad, strict=True)):
            q, k, v = self.q[b : b + 1], *(before[row].clone() for before in self.before)
            total = min(length + self.new, k.shape[0])
            for i in range(total - length):
                k[length + i], v[length + i] = self.k[b, i], self.v[b, i]
            if rotary is not None:
                q = torch.stack(
                    [turned(one, *rotary, length + each * i, interleaved) for i, one in enumerate(q[0])]
                ).to(q.dtype)[None]
                for i in range(total - length):
                    k[length + i] = turned(self.k[b, i], *rotary, length + i, interleaved).to(k.dtype)
                torch.testing.assert_close(self.k_cache[row], k, equal_nan=True)
            else:
                torch.testing.assert_close(self.k_cache[row], k, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(self.v_cache[row], v, rtol=0, atol=0, equal_nan=True)
            own = lse[b : b + 1].masked_fill(lse[b : b + 1].isposinf(), -torch.inf)
            changed = score and (lambda s, _, h, i, j, b=b, n=total - pad: score(s, b, h, i + n - len(self.q[0]), j))
            assert not lse.isneginf().any()
            filled = slice(pad, total)
            assert_forward(
                out[b : b + 1], own, q, k[None, filled], v[None, filled], score=changed,
                **({"causal": False} | mask),
            )  # fmt: skip


LENGTHS = [0, 1, CAPACITY - 4, 17, CAPACITY - 3]  # with up to 3 new ones the last is exactly full
SLOPES = torch.rand(len(LENGTHS), 4, generator=torch.Generator().manual_seed(3))
MASKS = {
    "full": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (5, 0)}, {"window": (5, 0)}),
    "both": ({"window_size": (3, 2)}, {"window": (3, 2)}),
    "right": ({"window_size": (-1, 1)}, {"window": (None, 1)}),
    "causal_window": ({"causal": True, "window_size": (6, 6)}, {"window": (6, 0)}),
    "all": ({"window_size": (CAPACITY, CAPACITY)}, {}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("seqlen_q", "new"), [(1, 0), (1, 1), (3, 3), (5, 0), (5, 2)])
def test_masks(name, seqlen_q, new, device):
    options, mask = MASKS[name]
    step = Step(LENGTHS, seqlen_q, new, device=device)
    step.assert_right(*step(**options), **mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("seqlen_q", "new"), [(1, 1), (3, 3), (3, 1)])
def test_rotary(seqlen_q, new, interleaved, name, device):
    options, mask = MASKS[name]
    step = Step(LENGTHS, seqlen_q, new, device=device)
    angle = torch.randn(CAPACITY, 4, device=device)
    table = angle.cos(), angle.sin()
    rotary = {"rotary_cos": table[0], "rotary_sin": table[1], "rotary_interleaved": interleaved}
    each = name not in ("full", "all")
    step.assert_right(*step(**options, **rotary), rotary=table, interleaved=interleaved, each=each, **mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_and_dtypes(heads, dtype, device):
    step = Step(LENGTHS, 2, 2, heads, dtype, device)
    step.assert_right(*step(causal=True), causal=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_scores(seqlen_q, device):
    slopes = SLOPES.to(device)
    step = Step(LENGTHS, seqlen_q, 1, device=device)
    capped = step(causal=True, softcap=1.5)
    step.assert_right(*capped, causal=True, score=lambda s, *_: 1.5 * torch.tanh(s / 1.5))
    step = Step(LENGTHS, seqlen_q, 1, device=device)
    biased = step(causal=True, alibi_slopes=slopes)
    step.assert_right(*biased, causal=True, score=lambda s, b, h, i, j: s - slopes[b, h] * (i - j).abs())
    step = Step(LENGTHS, seqlen_q, 1, device=device)
    step.assert_right(*step(softmax_scale=0.3), scale=0.3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leftpad", [None, [0, 1, 20, 16, 5]])
@pytest.mark.parametrize("rows", [None, [6, 0, 3, 2, 5]])
@pytest.mark.parametrize("capacity", [CAPACITY, 32])
def test_rows_of_the_cache(rows, leftpad, capacity, device):
    slopes = SLOPES.to(device)
    for options, expected in (
        ({"causal": True}, {"causal": True}),
        ({"window_size": (4, 1)}, {"window": (4, 1)}),
        ({"alibi_slopes": slopes}, {"score": lambda s, b, h, i, j: s - slopes[b, h] * (i - j).abs()}),
    ):
        step = Step(LENGTHS, 2, 2, rows=rows, leftpad=leftpad, capacity=capacity, device=device)
        step.assert_right(*step(**options), **expected)


@pytest.mark.parametrize("rows", [None, [4, 0]])
@pytest.mark.parametrize("leftpad", [None, [0, 6]])
@pytest.mark.parametrize(("length", "new"), [(0, 1), (8, 2), (CAPACITY - 2, 2), (CAPACITY, 0), (8, 0)])
def test_a_length_of_the_host(length, new, leftpad, rows):
    if leftpad and length < max(leftpad):
        leftpad = [0, length]
    step = Step([length] * 2, 2, new, leftpad=leftpad, rows=rows)
    step.assert_right(*step(causal=True, cache_seqlens=length), causal=True)
    if length == CAPACITY:
        step.assert_right(*step(causal=True, cache_seqlens=None), causal=True)


def test_lengths_of_the_device_beyond_the_capacity_are_cut_off_there(monkeypatch):
    step = Step([CAPACITY, 5], new=1)
    step.assert_right(*step())
    cut = flash_attn_with_kvcache(
        step.q, step.k_cache, step.v_cache, cache_seqlens=step.integers([CAPACITY + 7, 6])
    )
    whole = flash_attn_with_kvcache(step.q, step.k_cache, step.v_cache, cache_seqlens=step.integers([CAPACITY, 6]))
    assert torch.equal(cut, whole)
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    with pytest.raises(InvalidInputError, match=r"append: lengths \[24, 5\] are not all 23 or less"):
        step()
    with pytest.raises(InvalidInputError, match=r"flash_attn_with_kvcache: lengths \[25, 5\] are not all 24"):
        flash_attn_with_kvcache(step.q, step.k_cache, step.v_cache, cache_seqlens=step.integers([25, 5]))


def test_sinks_and_names_of_others():
    step, sinks = Step([0, 7]), torch.tensor([0.3, -1.0, 2.0, 0.0])
    out, lse = step(sinks=sinks, num_splits=4, pack_gqa=True, sm_margin=2, scheduler_metadata=sinks)
    step = Step([0, 7])
    filled = slice(0, 7)
    expected = flash_attn_func(
        step.q[1:], step.k_cache[1:, filled], step.v_cache[1:, filled], s_aux=sinks, return_lse=True
    )
    torch.testing.assert_close(out[1:], expected[0])
    torch.testing.assert_close(lse[1:], expected[1])
    torch.testing.assert_close(lse[0, :, 0], sinks)
    by_name = step(sinks=sinks, return_softmax_lse=False, return_lse=True)
    assert torch.equal(by_name[0], out)
    assert torch.equal(step(sinks=sinks, return_softmax_lse=False), out)


def test_no_gradient_comes_from_it():
    step = Step([4, 7], new=1)
    step.q.requires_grad_()
    step.k.requires_grad_()
    assert not step()[0].requires_grad
    assert not step.k_cache.requires_grad


def test_rows_are_copied_where_they_are_no_pages():
    for capacity, leftpad, copied in ((CAPACITY, None, True), (32, None, False), (32, [1, 0], True)):
        kv_cache._warn_of_a_copy.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                Step([4, 7], rows=[2, 0], leftpad=leftpad, capacity=capacity)()
        warned = [w for w in caught if w.category is FlashCoreWarning]
        assert len(warned) == copied
        assert all("each call copies it first, because batch_index" in str(w.message) for w in warned)


@pytest.mark.parametrize("device", DEVICES)
def test_decoding(device):
    """Step by step on one cache, lengths counted in place: as one call over all."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, CAPACITY, heads, HEAD_DIM, device=device) for heads in (4, 2, 2))
    k_cache, v_cache = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    lengths, outs = torch.zeros(3, dtype=torch.int32, device=device), []
    for at in (slice(0, 5), *(slice(i, i + 1) for i in range(5, CAPACITY))):
        outs.append(
            flash_attn_with_kvcache(
                q[:, at], k_cache, v_cache, k[:, at], v[:, at], cache_seqlens=lengths, causal=True
            )
        )
        lengths += at.stop - at.start
    assert torch.equal(k_cache, k)
    assert len(api.runs) == 2  # the prompt, and all the steps
    assert_forward(torch.cat(outs, 1), None, q, k, v, causal=True)


@pytest.mark.filterwarnings("ignore:Dynamo detected")
@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_in_one_graph_of_torch_compile(dynamic, heads_first, rows):
    torch.compiler.reset()
    angle = torch.randn(32, 4)
    options = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "causal": True, "return_softmax_lse": True}
    compiled = torch.compile(flash_attn_with_kvcache, backend="eager", fullgraph=True, dynamic=dynamic)
    if rows is not None:
        options["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    results = []
    for function in (flash_attn_with_kvcache, compiled):
        step = Step([3, 31], seqlen_q=2, new=2, rows=rows, capacity=32)
        caches = step.k_cache, step.v_cache
        if heads_first:
            caches = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in caches)
        for lengths in ([3, 31], [0, 17]):
            found = function(step.q, *caches, step.k, step.v, cache_seqlens=step.integers(lengths), **options)
            results.append((*found, *(t.nan_to_num(7.0) for t in caches)))
    for eager, graph in zip(results[:2], results[2:], strict=True):
        for mine, theirs in zip(eager, graph, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.gpu
def test_a_captured_step_replays_with_new_lengths():
    step = Step([2, 9, CAPACITY - 2], new=1, dtype=torch.bfloat16, device="cuda")
    angle = torch.randn(CAPACITY, 8, device="cuda")
    lengths = step.integers(step.lengths)
    call = {
        "cache_seqlens": lengths, "rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "return_softmax_lse": True
    }  # fmt: skip

    def decode(k_cache, v_cache):
        return flash_attn_with_kvcache(step.q, k_cache, v_cache, step.k, step.v, causal=True, **call)

    decode(*map(torch.clone, step.before))  # kernels are compiled
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(*map(torch.clone, step.before))
        with torch.cuda.graph(graph):
            out, lse = decode(step.k_cache, step.v_cache)
            lengths += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):  # the last sequence is full after two
        for changed in (step.q, step.k, step.v):
            changed.copy_(torch.randn_like(changed))
        caches = step.k_cache.clone(), step.v_cache.clone()
        expected = decode(*caches)
        graph.replay()
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        for mine, theirs in zip((step.k_cache, step.v_cache), caches, strict=True):
            assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert lengths.tolist() == [n + 3 for n in step.lengths]


INVALID = {
    "v": ({"v": None}, "k, v and cache_seqlens belong together"),
    "k": ({"k": None}, "k, v and cache_seqlens belong together"),
    "cache_seqlens": ({"cache_seqlens": None}, "k, v and cache_seqlens belong together"),
    "rotary": ({"rotary_cos": torch.ones(CAPACITY, 4)}, "rotary_cos and rotary_sin belong together"),
    "rotary without k": (
        {"rotary_cos": torch.ones(CAPACITY, 4), "rotary_sin": torch.ones(CAPACITY, 4), "k": None, "v": None},
        "and need new k and v",
    ),
    "too long": ({"cache_seqlens": CAPACITY}, r"from 0 to 23, so that the new positions \(1\) fit .* \(given 24\)"),
    "negative": ({"cache_seqlens": -1}, r"an int from 0 to 23.*\(given -1\)"),
    "float": ({"cache_seqlens": 3.0}, r"must be an int32 tensor, or an int .*\(given 3.0\)"),
    "int64": ({"cache_seqlens": torch.tensor([1, 2])}, r"lengths must be an int32 tensor"),
    "window": ({"window_size": 5}, "flash_attn_with_kvcache: window_size=5 is not a window"),
    "sinks": ({"sinks": torch.ones(4), "s_aux": torch.ones(4)}, "flash_attn_with_kvcache: s_aux and sinks name"),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_wrong_is_named(name):
    change, message = INVALID[name]
    step = Step([4, 7], new=1)
    given = {"k": step.k, "v": step.v, "cache_seqlens": step.integers([4, 7])} | change
    with pytest.raises(InvalidInputError, match=message):
        flash_attn_with_kvcache(step.q, step.k_cache, step.v_cache, **given)
    assert torch.equal(step.k_cache.nan_to_num(7.0), step.before[0].nan_to_num(7.0))


def test_a_cache_of_other_sequences_is_named():
    step = Step([4, 7])
    for k_cache, v_cache in ((step.k_cache[:1], step.v_cache[:1]), (step.k_cache, step.v_cache[:, :9])):
        with pytest.raises(InvalidInputError, match=r"must be \(2, capacity, heads_k, head_dim\), as q has"):
            flash_attn_with_kvcache(step.q, k_cache, v_cache, cache_seqlens=step.integers([4, 7]))


@pytest.mark.parametrize("name", ["block_table", "page_table"])
def test_pages_are_refused_by_name(name):
    step = Step([4, 7])
    with pytest.raises(UnsupportedError, match=f"flash_attn_with_kvcache: {name} is not supported"):
        step(**{name: torch.zeros(2, 1, dtype=torch.int32)})
