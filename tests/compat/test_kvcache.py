"""flash_attn_with_kvcache: a loop over the sequences in float64 says what is right. What is not filled is NaN."""

import itertools
import random
import warnings

import pytest
import torch

from flashcore import api, kv_cache
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from tests.paged import LAYOUTS, NO_PAGES, SPARE
from tests.test_kv_cache import turned
from tests.tolerance import assert_forward

CAPACITY, HEAD_DIM = 24, 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.filterwarnings("ignore:attention over a cache:flashcore.errors.FlashCoreWarning")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    monkeypatch.delenv("FLASHCORE_CHECK_LENGTHS", raising=False)


class Step:
    """A call: sequences with `lengths` keys in a cache, and `new` ones for each. Of pages, the table names as many as
    they fill, shuffled, and then numbers that are none."""

    def __init__(
        self, lengths, seqlen_q=1, new=0, heads=(4, 2), dtype=torch.float32, device="cpu", rows=None, leftpad=None,
        capacity=CAPACITY, page_size=None, layout="nhd",
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
        self.table = None
        if page_size is not None:
            self._deal(page_size, layout)

    def _deal(self, page_size, layout):
        """The caches in pages, of as much capacity."""
        shuffle, rows, width = random.Random(0), len(self.k_cache), self.k_cache.shape[1] // page_size
        ends = (min(n + self.new, width * page_size) for n in self.lengths)
        needed = dict(zip(self.rows, (-(-end // page_size) for end in ends), strict=True))
        unused = shuffle.sample(range(rows * width + SPARE), rows * width + SPARE)
        numbers = [[unused.pop() if i < needed.get(row, 0) else shuffle.choice(NO_PAGES) for i in range(width)]
                   for row in range(rows)]  # fmt: skip
        self.table = self.integers(numbers)
        dense = self.k_cache, self.v_cache
        self.k_cache, self.v_cache = LAYOUTS[layout](
            rows * width + SPARE, page_size, *(cache[0, :0] for cache in dense)
        )
        for paged, cache in zip((self.k_cache, self.v_cache), dense, strict=True):
            for row, pages in enumerate(numbers):
                for i in range(needed.get(row, 0)):
                    paged[pages[i]] = cache[row, i * page_size : (i + 1) * page_size]

    def now(self, cache, row):
        """What is in a row of the cache."""
        if self.table is None:
            return cache[row]
        there = [page for page in self.table[row].tolist() if 0 <= page < len(cache)]
        filled = cache[there].flatten(0, 1)
        end = filled.new_full((self.before[0].shape[1] - len(filled), *filled.shape[1:]), torch.nan)
        return torch.cat((filled, end))

    def integers(self, numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=self.q.device)

    def __call__(self, **options):
        """(out, lse)"""
        given = {"k": self.k, "v": self.v} if self.new else {}
        if self.rows != list(range(len(self.lengths))):
            given["cache_batch_idx"] = self.integers(self.rows)
        if any(self.leftpad):
            given["cache_leftpad"] = self.integers(self.leftpad)
        if self.table is not None:
            given["block_table"] = self.table
        given |= {"cache_seqlens": self.integers(self.lengths), "return_softmax_lse": True}
        return flash_attn_with_kvcache(self.q, self.k_cache, self.v_cache, **(given | options))

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
                torch.testing.assert_close(self.now(self.k_cache, row), k, equal_nan=True)
            else:
                torch.testing.assert_close(self.now(self.k_cache, row), k, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(self.now(self.v_cache, row), v, rtol=0, atol=0, equal_nan=True)
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
    "all": ({"window_size": (32, 32)}, {}),  # of the largest capacity below
}


PAGES = [None, 1, 4, 16]  # None: a dense cache. In pages of 16 the capacity is larger


def of_pages(page_size):
    """The arguments of a Step."""
    return {} if page_size is None else {"page_size": page_size, "capacity": -(-CAPACITY // page_size) * page_size}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize(("seqlen_q", "new"), [(1, 0), (1, 1), (3, 3), (5, 0), (5, 2)])
def test_masks(name, page_size, seqlen_q, new, device):
    options, mask = MASKS[name]
    step = Step(LENGTHS, seqlen_q, new, device=device, **of_pages(page_size))
    step.assert_right(*step(**options), **mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize(("seqlen_q", "new"), [(1, 1), (3, 3), (3, 1)])
def test_rotary(seqlen_q, new, page_size, interleaved, name, device):
    options, mask = MASKS[name]
    step = Step(LENGTHS, seqlen_q, new, device=device, **of_pages(page_size))
    angle = torch.randn(32, 4, device=device)
    table = angle.cos(), angle.sin()
    rotary = {"rotary_cos": table[0], "rotary_sin": table[1], "rotary_interleaved": interleaved}
    each = name not in ("full", "all")
    step.assert_right(*step(**options, **rotary), rotary=table, interleaved=interleaved, each=each, **mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [None, 4, 16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_and_dtypes(heads, dtype, page_size, device):
    step = Step(LENGTHS, 2, 2, heads, dtype, device, **of_pages(page_size))
    step.assert_right(*step(causal=True), causal=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_scores(seqlen_q, page_size, device):
    slopes, pages = SLOPES.to(device), of_pages(page_size)
    step = Step(LENGTHS, seqlen_q, 1, device=device, **pages)
    capped = step(causal=True, softcap=1.5)
    step.assert_right(*capped, causal=True, score=lambda s, *_: 1.5 * torch.tanh(s / 1.5))
    step = Step(LENGTHS, seqlen_q, 1, device=device, **pages)
    biased = step(causal=True, alibi_slopes=slopes)
    step.assert_right(*biased, causal=True, score=lambda s, b, h, i, j: s - slopes[b, h] * (i - j).abs())
    step = Step(LENGTHS, seqlen_q, 1, device=device, **pages)
    step.assert_right(*step(softmax_scale=0.3), scale=0.3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leftpad", [None, [0, 1, 20, 16, 5]])
@pytest.mark.parametrize("rows", [None, [6, 0, 3, 2, 5]])
@pytest.mark.parametrize(
    "places",
    [{}, {"capacity": 32}, of_pages(1), of_pages(16), *({**of_pages(4), "layout": name} for name in ("hnd", "rows"))],
    ids=lambda places: "_".join(map(str, places.values())) or "dense",
)
def test_rows_of_the_cache(rows, leftpad, places, device):
    slopes = SLOPES.to(device)
    for options, expected in (
        ({"causal": True}, {"causal": True}),
        ({"window_size": (4, 1)}, {"window": (4, 1)}),
        ({"alibi_slopes": slopes}, {"score": lambda s, b, h, i, j: s - slopes[b, h] * (i - j).abs()}),
    ):
        step = Step(LENGTHS, 2, 2, rows=rows, leftpad=leftpad, device=device, **places)
        step.assert_right(*step(**options), **expected)


@pytest.mark.parametrize("rows", [None, [4, 0]])
@pytest.mark.parametrize("leftpad", [None, [0, 6]])
@pytest.mark.parametrize(("length", "new"), [(0, 1), (8, 2), (CAPACITY - 2, 2), (CAPACITY, 0), (8, 0)])
@pytest.mark.parametrize("page_size", [None, 1, 4])
def test_a_length_of_the_host(page_size, length, new, leftpad, rows):
    if leftpad and length < max(leftpad):
        leftpad = [0, length]
    step = Step([length] * 2, 2, new, leftpad=leftpad, rows=rows, **of_pages(page_size))
    step.assert_right(*step(causal=True, cache_seqlens=length), causal=True)
    if length == CAPACITY:
        step.assert_right(*step(causal=True, cache_seqlens=None), causal=True)


@pytest.mark.parametrize("leftpad", [None, [3, 1]])
@pytest.mark.parametrize("page_size", [None, 1, 4, 8])
def test_lengths_beyond_the_capacity_are_cut_off_there(page_size, leftpad):
    step = Step([CAPACITY, 6], leftpad=leftpad, page_size=page_size)
    cut = step(cache_seqlens=step.integers([CAPACITY + 7, 6]), causal=True)
    step.assert_right(*cut, causal=True)
    step = Step([CAPACITY - 1, 6], new=2, seqlen_q=2, leftpad=leftpad, page_size=page_size)
    step.assert_right(*step(causal=True), causal=True)


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("page_size", [None, 4])
def test_a_row_that_is_none_has_no_keys(page_size, new, monkeypatch):
    step = Step([8, 6], new=new, rows=[1, 0], page_size=page_size)
    out, lse = step(cache_batch_idx=step.integers([-1, 0]), causal=True)
    assert (out[0] == 0).all()
    assert (lse[0] == torch.inf).all()  # as flash-attn has it
    assert out[1].isfinite().all()
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    with pytest.raises(InvalidInputError, match=r"batch_index \[2, 0\] is not all in a cache of 2 rows"):
        step(cache_batch_idx=step.integers([2, 0]), causal=True)


@pytest.mark.parametrize("page_size", [None, 4])
def test_nothing_is_seen_behind_a_negative_length(page_size):
    """Where nothing is written either."""
    step = Step([4, 6], new=3, page_size=page_size)
    out, lse = step(cache_seqlens=step.integers([-2, 6]), causal=True)
    assert (out[0] == 0).all()
    assert (lse[0] == torch.inf).all()  # as flash-attn has it
    assert out[1].isfinite().all()


def test_traces_leave_nothing_behind():
    """What is kept for later calls is no fake of a trace's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    capacity = 29  # of no other test
    k_cache, v_cache = torch.randn(2, 3, capacity, 2, HEAD_DIM)
    q, lengths = torch.randn(3, 1, 4, HEAD_DIM), torch.tensor([3, 5, 7], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (q, k_cache, v_cache)]
        flash_attn_with_kvcache(*fakes, cache_seqlens=mode.from_tensor(lengths))
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths)
    assert type(out) is torch.Tensor


def test_out_under_autocast():
    step = Step([4, 7])
    out = torch.empty(step.q.shape, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = flash_attn_with_kvcache(
            step.q, step.k_cache, step.v_cache, cache_seqlens=step.integers(step.lengths), out=out
        )
    assert result.data_ptr() == out.data_ptr()
    assert out.isfinite().all()


def test_what_says_nothing_alone_is_refused():
    step = Step([4, 7], page_size=4)
    with pytest.raises(InvalidInputError, match="rotary_seqlens needs rotary_cos"):
        step(rotary_seqlens=step.integers([1, 2]))
    offsets = step.integers([0, 1, 2])
    with pytest.raises(InvalidInputError, match="Pass seqused_k"):
        flash_attn_varlen_func(
            step.q.flatten(0, 1), step.k_cache, step.v_cache, offsets, None, 1, CAPACITY, block_table=step.table
        )


def test_the_switch_finds_lengths_beyond_the_table(monkeypatch):
    step = Step([4, 7], page_size=4)
    arguments = step.q.flatten(0, 1), step.k_cache, step.v_cache, step.integers([0, 1, 2]), None, 1, 200
    options = {"block_table": step.table, "seqused_k": step.integers([4, 100])}
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    with pytest.raises(InvalidInputError, match="flash_attn_varlen_func: lengths"):
        flash_attn_varlen_func(*arguments, **options)


@pytest.mark.parametrize("page_size", [1, 4, 8])
def test_pages_beyond_the_lengths_are_not_read(page_size):
    """Nor an error: the table of a sequence that has just begun names none."""
    step = Step([0, 0, 5], page_size=page_size)
    assert (step.table[:2] < 0).any()
    step.assert_right(*step())


def test_the_switch_finds_what_is_no_page(monkeypatch):
    step = Step([4, 7], page_size=4)
    step.table[1, 1] = 99
    step()
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    with pytest.raises(InvalidInputError, match=r"flash_attn_with_kvcache: the table names \[99\], .* cache of 15,"):
        step()
    step(cache_seqlens=step.integers([4, 4]))
    with pytest.raises(InvalidInputError, match=r"flash_attn_with_kvcache: the table names \[99\]"):
        step(cache_seqlens=step.integers([4, 5]))
    with pytest.raises(InvalidInputError, match=r"append: the table names \[99\]"):
        step(k=torch.zeros(2, 1, 2, HEAD_DIM), v=torch.zeros(2, 1, 2, HEAD_DIM), cache_seqlens=step.integers([2, 4]))
    step(cache_batch_idx=step.integers([0, 0]), cache_seqlens=step.integers([4, 4]))
    with pytest.raises(InvalidInputError, match=r"flash_attn_with_kvcache: the table names \[99\]"):
        step(cache_batch_idx=step.integers([1, 0]), cache_seqlens=step.integers([7, 4]))


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


def test_a_cache_is_copied_where_its_rows_have_no_numbers():
    """Those of keys and values: pages of few rows, or padding on the left, and each in an order of its own."""
    for page_size, leftpad, layout, copied in (
        (None, [1, 0], "nhd", False), (4, None, "hnd", False), (4, [1, 0], "rows", False), (4, None, "kv", False),
        (4, None, "one_kind_each", True), (16, [1, 0], "one_kind_each", True), (16, None, "one_kind_each", False),
        (1, None, "one_kind_each", False), (8, None, "strided", False),
    ):  # fmt: skip
        kv_cache._warn_of_a_copy.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                step = Step([4, 7], rows=[2, 0], leftpad=leftpad, capacity=32, page_size=page_size, layout=layout)
                step.assert_right(*step())
        warned = [w for w in caught if w.category is FlashCoreWarning]
        assert len(warned) == copied, (page_size, layout)
        assert all("each call copies it first, because keys and values" in str(w.message) for w in warned)


def test_more_rows_than_numbers():
    cache = torch.zeros(1, 1, 1, 1).expand(2**28, 8, 1, 16)
    table = torch.zeros(1, 3, dtype=torch.int32)
    lengths = torch.ones(1, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=r"2147483648 rows in pages of 8, .* more than a table"):
        flash_attn_with_kvcache(torch.zeros(1, 1, 1, 16), cache, cache, cache_seqlens=lengths, block_table=table)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [None, 4, 8])
def test_decoding(page_size, device):
    """Step by step on one cache, lengths counted in place: as one call over all. Pages come when they are needed."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, CAPACITY, heads, HEAD_DIM, device=device) for heads in (4, 2, 2))
    shape, table = (3, CAPACITY), None
    if page_size is not None:
        shape, width = (3 * CAPACITY // page_size, page_size), CAPACITY // page_size
        table, pages = torch.full((3, width), -1, dtype=torch.int32, device=device), torch.randperm(shape[0]).tolist()
    k_cache, v_cache = (torch.full((*shape, 2, HEAD_DIM), torch.nan, device=device) for _ in range(2))
    lengths, outs = torch.zeros(3, dtype=torch.int32, device=device), []
    for at in (slice(0, 5), *(slice(i, i + 1) for i in range(5, CAPACITY))):
        if table is not None:
            for slot in range(-(-at.start // page_size), -(-at.stop // page_size)):
                table[:, slot] = torch.tensor([pages.pop() for _ in range(3)])
        outs.append(
            flash_attn_with_kvcache(
                q[:, at], k_cache, v_cache, k[:, at], v[:, at], cache_seqlens=lengths, causal=True, block_table=table
            )
        )
        lengths += at.stop - at.start
    assert torch.equal(k_cache if table is None else k_cache[table].flatten(1, 2), k)
    assert len(api.runs) == 2  # the prompt, and all the steps
    assert_forward(torch.cat(outs, 1), None, q, k, v, causal=True)


@pytest.mark.filterwarnings("ignore:Dynamo detected")
@pytest.mark.parametrize(("rows", "page_size"), [(None, None), ([2, 0], None), (None, 16), ([2, 0], 4)])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_in_one_graph_of_torch_compile(dynamic, heads_first, rows, page_size):
    torch.compiler.reset()
    angle = torch.randn(32, 4)
    options = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "causal": True, "return_softmax_lse": True}
    compiled = torch.compile(flash_attn_with_kvcache, backend="eager", fullgraph=True, dynamic=dynamic)
    if rows is not None:
        options["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    results = []
    for function in (flash_attn_with_kvcache, compiled):
        step = Step([3, 31], seqlen_q=2, new=2, rows=rows, capacity=32, page_size=page_size)
        caches = step.k_cache, step.v_cache
        if heads_first:
            caches = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in caches)
        options["block_table"] = step.table
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


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [4, 16])
def test_a_captured_step_replays_with_new_tables(page_size):
    step = Step([2, 9, 21], new=1, dtype=torch.bfloat16, device="cuda", capacity=32, page_size=page_size)
    caches = step.k_cache, step.v_cache
    for cache in caches:
        cache.copy_(torch.randn_like(cache))
    table, lengths = step.table.clone(), step.integers(step.lengths)

    def decode():
        return flash_attn_with_kvcache(
            step.q, *caches, step.k, step.v, causal=True, cache_seqlens=lengths, block_table=table,
            return_softmax_lse=True,
        )  # fmt: skip

    decode()  # kernels are compiled
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode()
        with torch.cuda.graph(graph):
            results = decode()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed, now in enumerate(([3, 31, 0], [17, 5, 30], [32, 1, 16])):  # the last time one has no room
        shuffled = torch.randperm(len(caches[0]), generator=torch.Generator().manual_seed(seed))
        table.copy_(shuffled[: table.numel()].view_as(table))
        lengths.copy_(step.integers(now))
        for changed in (step.q, step.k, step.v):
            changed.copy_(torch.randn_like(changed))
        before = [cache.clone() for cache in caches]
        graph.replay()
        replayed = [t.clone() for t in (*results, *caches)]
        for cache, old in zip(caches, before, strict=True):
            cache.copy_(old)
        for mine, theirs in zip(replayed, (*decode(), *caches), strict=True):
            assert torch.equal(mine, theirs)
        assert not torch.equal(caches[0], before[0])


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


def test_wrong_tables_are_named():
    step = Step([4, 7], page_size=4)
    table = step.table
    for wrong, message in (
        ({"page_table": table}, "block_table and page_table name the same argument"),
        ({"block_table": table.long()}, r"flash_attn_with_kvcache: table must be int32 \(batch, max_pages\)"),
        ({"block_table": table[:1]}, r"beside a table \(2, max_pages\), as q has .* table \(1, 6\)"),
        ({"cache_leftpad": torch.tensor([0, 0])}, "flash_attn_with_kvcache: cache_leftpad must be an int32 tensor"),
        ({"cache_batch_idx": [0, 1]}, "flash_attn_with_kvcache: cache_batch_idx must be an int32 tensor"),
        ({"rotary_seqlens": step.integers([1])}, "flash_attn_with_kvcache: rotary_seqlens must be an int32 tensor"),
        ({"cache_seqlens": 25}, r"an int from 0 to 24, .* capacity, 24 \(given 25\)"),
        ({"cu_seqlens_q": step.integers([0, 1, 2])}, "cu_seqlens_q and max_seqlen_q belong together"),
        ({"max_seqlen_q": 1}, "cu_seqlens_q and max_seqlen_q belong together"),
        ({"cu_seqlens_k_new": step.integers([0, 1, 2])}, "cu_seqlens_k_new says where new k and v lie"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            step(**wrong)
    step.assert_right(*step(block_table=None, page_table=table))


# ---- packed queries and new keys ---------------------------------------------------------------------------------


class PackedStep(Step):
    """The queries and new keys of each sequence are the first so many; the others are NaN before, and not passed on."""

    def __init__(self, lengths, queries, news, **options):
        super().__init__(lengths, max(queries), max(news), **options)
        self.queries, self.news = queries, news
        self.offsets_q, self.offsets_k = (
            self.integers([2, *itertools.accumulate(each, initial=2)][1:]) for each in (queries, news)
        )

    def packed(self, tensor, each):
        """With rows of nobody before and after."""
        rows = [one[:n] for one, n in zip(tensor, each, strict=True)]
        around = tensor.new_full((2, *tensor.shape[2:]), torch.nan)
        return torch.cat((around, *rows, around))

    def __call__(self, **options):
        self.whole = self.q, self.k, self.v
        self.q, self.k, self.v = (
            self.packed(t, each)
            for t, each in ((self.q, self.queries), (self.k, self.news), (self.v, self.news))
        )
        try:
            return super().__call__(
                cu_seqlens_q=self.offsets_q, max_seqlen_q=max(self.queries) + 1,
                **({"cu_seqlens_k_new": self.offsets_k} if self.new else {}), **options,
            )  # fmt: skip
        finally:
            self.q, self.k, self.v = self.whole

    def assert_like_one_by_one(self, out, lse, options):
        """Each sequence alone, in a dense cache: what the tests above say is right."""
        assert lse.shape == (self.q.shape[2], len(out))
        for b, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            alone = {key: value[b : b + 1] if key == "rotary_seqlens" else value for key, value in options.items()}
            caches = [before[row : row + 1].clone() for before in self.before]
            if self.new:
                alone |= {"k": self.k[b : b + 1, : self.news[b]], "v": self.v[b : b + 1, : self.news[b]]}
            if self.leftpad[b]:
                alone["cache_leftpad"] = self.integers([self.leftpad[b]])
            right, right_lse = flash_attn_with_kvcache(
                self.q[b : b + 1, : self.queries[b]], *caches, cache_seqlens=self.integers([length]),
                return_softmax_lse=True, **alone,
            )  # fmt: skip
            mine = slice(int(self.offsets_q[b]), int(self.offsets_q[b + 1]))
            torch.testing.assert_close(out[mine], right[0])
            torch.testing.assert_close(lse[:, mine], right_lse[0])
            for cache, alone_cache in zip((self.k_cache, self.v_cache), caches, strict=True):
                torch.testing.assert_close(self.now(cache, row), alone_cache[0], equal_nan=True)
        assert not out[:2].any()
        assert not out[-2:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("rows", [None, [6, 0, 3, 2, 5]])
@pytest.mark.parametrize("new", [False, True])
def test_packed_queries(new, rows, page_size, device):
    """Prompts, chunks of them and single tokens in one call, and one that is not there."""
    lengths, queries = [0, 7, 20, 17, 3], [3, 1, 4, 0, 2]
    news = [3, 1, 4, 0, 2] if new else [0] * 5
    lengths = lengths if new else [n + q for n, q in zip(lengths, queries, strict=True)]
    angle = torch.randn(32, 4, device=device)
    rotary = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    moved = torch.tensor([4, 0, 11, 2, 30], dtype=torch.int32, device=device)
    for options in (
        {"causal": True}, {"window_size": (5, 1), "softcap": 2.0},
        *(({"causal": True, **rotary}, {"rotary_interleaved": False, **rotary},
           {"window_size": (4, 0), "rotary_seqlens": moved, **rotary}) if new else ()),
    ):  # fmt: skip
        step = PackedStep(lengths, queries, news, rows=rows, device=device, **of_pages(page_size))
        step.assert_like_one_by_one(*step(**options), options)


@pytest.mark.parametrize("page_size", [None, 4, 16])
def test_packed_queries_behind_padding(page_size):
    step = PackedStep([7, 20, 3], [1, 4, 2], [1, 2, 0], leftpad=[2, 17, 3], **of_pages(page_size))
    step.assert_like_one_by_one(*step(causal=True), {"causal": True})


def test_new_keys_may_be_packed_alone():
    """And the length be the host's."""
    step = Step([4] * 3, seqlen_q=2, new=2)
    packed = PackedStep([4] * 3, [2] * 3, [2, 0, 1])
    step.k, step.v = (packed.packed(t, packed.news) for t in (packed.k, packed.v))
    step.q = packed.q
    out, _ = step(cu_seqlens_k_new=packed.offsets_k, cache_seqlens=4, causal=True)
    right, _ = packed(causal=True)
    torch.testing.assert_close(out.flatten(0, 1), right[2:-2])
    torch.testing.assert_close(step.k_cache, packed.k_cache, equal_nan=True)
