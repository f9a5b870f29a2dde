"""KV caches: what is appended is where it belongs, nothing else changes, and what is wrong is named."""

import random

import pytest
import torch

import flashcore
from flashcore import kv_cache
from flashcore.errors import FlashCoreWarning, InvalidInputError
from tests.paged import LAYOUTS, NO_PAGES
from tests.tolerance import assert_forward

CAPACITY, NEW, HEADS, HEAD_DIM, HEAD_DIM_V = 9, 3, 2, 16, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    monkeypatch.delenv("FLASHCORE_CHECK_LENGTHS", raising=False)
    kv_cache._warn_of_a_copy.cache_clear()


def integers(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def caches(batch, dtype=torch.float32):
    shape = batch, CAPACITY, HEADS
    return torch.randn(*shape, HEAD_DIM, dtype=dtype), torch.randn(*shape, HEAD_DIM_V, dtype=dtype)


def news(batch, new=NEW, dtype=torch.float32):
    return torch.randn(batch, new, HEADS, HEAD_DIM, dtype=dtype), torch.randn(
        batch, new, HEADS, HEAD_DIM_V, dtype=dtype
    )


def rotary(width, positions=CAPACITY, dtype=torch.float32):
    angle = 3 * torch.randn(positions, width)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x, cos, sin, position, interleaved):
    """One key (heads, head_dim) at a position, in float64: complex numbers times complex numbers."""
    x, half = x.double().clone(), cos.shape[1]
    factor = torch.complex(cos[position].double(), sin[position].double())
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        number = torch.complex(x[:, a], x[:, b]) * factor[j]
        x[:, a], x[:, b] = number.real, number.imag
    return x


def appended(cache, new, lengths, rows, table=None, interleaved=False):
    """What the cache is afterwards, one number after the other."""
    cache = cache.clone()
    for b, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        for i in range(new.shape[1]):
            if 0 <= row < len(cache) and length >= 0 and length + i < cache.shape[1]:
                one = new[b, i]
                if table is not None:
                    one = turned(one, *table, length + i, interleaved).to(cache.dtype)
                cache[row, length + i] = one
    return cache


ALL = CAPACITY - NEW  # then the cache is exactly full
LENGTHS = {
    "empty": [0, 0, 0],
    "some": [0, 1, 4],
    "exactly_full": [ALL, ALL, 2],
    "over_by_one": [ALL + 1, 2, ALL],
    "over": [CAPACITY - 1, CAPACITY, CAPACITY + 1],
    "far_over": [2**31 - 1, 2**31 - NEW, 5],
    "negative": [-1, -NEW, -(2**31)],
}


@pytest.mark.parametrize("new", [1, NEW, CAPACITY, 0])
@pytest.mark.parametrize("name", LENGTHS)
def test_append(name, new):
    lengths = LENGTHS[name]
    (k_cache, v_cache), (k, v) = caches(3), news(3, new)
    expected = appended(k_cache, k, lengths, range(3)), appended(v_cache, v, lengths, range(3))
    given = integers(*lengths)
    assert flashcore.append(k_cache, v_cache, k, v, given) is None
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])
    assert given.tolist() == lengths


# -1 and 5 are nobody's, and next to 0 and 4, which are another sequence's.
@pytest.mark.parametrize("index", [[3, 0, 4], [-1, 0, 2], [0, -1, 2], [4, 1, 5], [5, 4, -1], [-1, -1, 5]])
@pytest.mark.parametrize("name", LENGTHS)
def test_append_to_rows_of_a_larger_cache(name, index):
    lengths = LENGTHS[name]
    (k_cache, v_cache), (k, v) = caches(5), news(3)
    expected = appended(k_cache, k, lengths, index), appended(v_cache, v, lengths, index)
    flashcore.append(k_cache, v_cache, k, v, integers(*lengths), batch_index=integers(*index))
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [HEAD_DIM // 2, 4, 1])
def test_rotary(width, interleaved, dtype):
    lengths, index, table = [2, ALL + 1, 0], [1, 0, 2], rotary(width, CAPACITY + 2, dtype)
    (k_cache, v_cache), (k, v) = caches(3, dtype), news(3, dtype=dtype)
    expected = appended(k_cache, k, lengths, index, table, interleaved), appended(v_cache, v, lengths, index)
    flashcore.append(
        k_cache, v_cache, k, v, integers(*lengths),
        rotary=table, interleaved=interleaved, batch_index=integers(*index),
    )  # fmt: skip
    by_ulps = {"rtol": torch.finfo(dtype).eps, "atol": 4 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(k_cache, expected[0], **by_ulps)
    assert torch.equal(v_cache, expected[1])


def test_append_to_a_view():
    """Of a larger cache, with heads before positions: what is around it stays."""
    whole = torch.full((2, HEADS, CAPACITY + 4, HEAD_DIM), torch.nan)
    k_cache = whole.transpose(1, 2)[:, 2:-2]
    k_cache.zero_()
    k, _ = news(2)
    flashcore.append(k_cache, k_cache.clone(), k, k, integers(ALL, ALL + 1))
    assert torch.equal(k_cache, appended(torch.zeros_like(k_cache), k, [ALL, ALL + 1], range(2)))
    assert whole.isnan().sum() == 2 * HEADS * 4 * HEAD_DIM


def test_no_gradient_goes_into_a_cache():
    (k_cache, v_cache), (k, v) = caches(2), news(2)
    flashcore.append(k_cache, v_cache, k.requires_grad_(), v, integers(0, 1))
    assert not k_cache.requires_grad
    assert torch.equal(k_cache[0, :NEW], k[0])


def test_append_in_one_graph():
    compiled = torch.compile(flashcore.append, backend="eager", fullgraph=True)
    (k_cache, v_cache), (k, v) = caches(3), news(3)
    expected = appended(k_cache, k, [0, ALL, ALL + 1], range(3))
    compiled(k_cache, v_cache, k, v, integers(0, ALL, ALL + 1))
    assert torch.equal(k_cache, expected)


def test_the_switch_raises_before_anything_is_written(monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    (k_cache, v_cache), (k, v) = caches(2), news(2)
    before = k_cache.clone()
    with pytest.raises(InvalidInputError, match=rf"append: lengths \[2, {ALL + 1}\] are not all {ALL} or less"):
        flashcore.append(k_cache, v_cache, k, v, integers(2, ALL + 1))
    for index in ([0, 2], [-1, 0]):
        with pytest.raises(InvalidInputError, match=r"batch_index \[.*\] is not all in a cache of 2 rows"):
            flashcore.append(k_cache, v_cache, k, v, integers(0, 1), batch_index=integers(*index))
    assert torch.equal(k_cache, before)
    flashcore.append(k_cache, v_cache, k, v, integers(-1, ALL))
    assert torch.equal(k_cache, appended(before, k, [-1, ALL], range(2)))


INVALID = {
    "too many": (lambda a: a.update(zip("kv", news(2, CAPACITY + 1), strict=True)), r"10 new positions .*capacity, 9"),
    "no tensor": (lambda a: a.update(k=None), r"k must be a tensor .*\(given NoneType\)"),
    "dimensions": (lambda a: a.update(v=a["v"][0]), r"v must be a tensor \(batch, positions, heads, head_dim\)"),
    "caches": (lambda a: a.update(v_cache=a["v_cache"][:, 1:]), r"caches must be alike .*v_cache \(2, 8, 2, 8\)"),
    "heads": (lambda a: a.update(k=a["k"][:, :, 1:], v=a["v"][:, :, 1:]), r"these have the caches' heads"),
    "head_dim": (lambda a: a.update(v=a["k"]), r"these have the caches' heads and head_dim"),
    "dtype": (lambda a: a.update(k=a["k"].double()), r"dtype and device .*k torch.float64 on cpu"),
    "batch": (lambda a: a.update(zip("kv", news(1), strict=True), lengths=integers(0)), r"1 sequences and the cache 2"),
    "lengths": (lambda a: a.update(lengths=a["lengths"].long()), r"lengths must be an int32 tensor \(2,\).*int64"),
    "lengths: int": (lambda a: a.update(lengths=3), r"lengths must be an int32 tensor .*\(given int\)"),
    "lengths: batch": (lambda a: a.update(lengths=integers(1)), r"a number for each sequence, .*torch.int32 \(1,\)"),
    "batch_index": (lambda a: a.update(batch_index=[0, 1]), r"batch_index must be an int32 tensor .*\(given list\)"),
    "rotary": (lambda a: a.update(rotary=torch.ones(9, 4)), r"rotary must be \(cos, sin\), two tensors \(given Tensor"),
    "rotary: short": (lambda a: a.update(rotary=rotary(4, 8)), r"with 9 positions or more"),
    "rotary: wide": (lambda a: a.update(rotary=rotary(9)), r"rotary_dim / 2 up to 8 \(given \(9, 9\)"),
    "rotary: differ": (lambda a: a.update(rotary=(rotary(4)[0], rotary(3)[0])), r"\(9, 4\) and \(9, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_what_is_wrong_is_named_before_anything_is_written(name):
    change, message = INVALID[name]
    (k_cache, v_cache), (k, v) = caches(2), news(2)
    before = k_cache.clone(), v_cache.clone()
    arguments = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "lengths": integers(0, 1)}
    change(arguments)
    with pytest.raises(InvalidInputError, match=message):
        flashcore.append(**arguments)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


# ---- pages and packed rows ---------------------------------------------------------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OFFSETS = 2, 5, 5, 9, 10  # of four sequences: 3, 0, 4 and 1 rows, and nobody's around them


def paged_caches(layout, pages, size, device="cpu", dtype=torch.float32):
    """K's and V's, NaN."""
    return LAYOUTS[layout](
        pages, size, *(torch.empty(0, HEADS, dim, dtype=dtype, device=device) for dim in (HEAD_DIM, HEAD_DIM_V))
    )


def written(cache, new, lengths, rows, table, offsets=None, rotary=None, interleaved=False):
    """What the cache is afterwards, one number after the other; and which of its rows were written."""
    cache, there = cache.clone(), torch.zeros(cache.shape[:2], dtype=torch.bool, device=cache.device)
    pages, size = cache.shape[:2]
    for b, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        mine = new[b] if offsets is None else new[offsets[b] : offsets[b + 1]]
        for i, one in enumerate(mine):
            slot, place = divmod(length + i, size)
            if not (0 <= row < len(table) and length >= 0 and slot < len(table[row])):
                continue
            page = int(table[row][slot])
            if 0 <= page < pages:
                assert not there[page, place]
                turned_one = one if rotary is None else turned(one, *rotary, length + i, interleaved).to(cache.dtype)
                cache[page, place], there[page, place] = turned_one, True
    return cache, there


def dealt(counts, pages, width, device="cpu", seed=0):
    """A table whose rows name so many pages, no page twice, and then numbers that are none."""
    shuffle = random.Random(seed)
    unused = shuffle.sample(range(pages), pages)
    rows = [[*(unused.pop() for _ in range(n)), *shuffle.choices(NO_PAGES, k=width - n)] for n in counts]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "kv"])  # which has no other head_dim_v
@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("index", [None, [2, 0, 3, 1], [-1, 3, 7, 0]])
def test_append_to_pages(index, size, layout, device):
    """Full to the last row, over it, over a border of pages, and where the table names no page."""
    width = 5
    ends = [width * size - NEW, 0, width * size - 1, max(0, size - 1)]
    ends = ends if size > 1 else [2, 0, 4, 1]
    counts = [width, 2, width, 2] if size > 1 else [width, 2, width, 4]  # the second has none for its last new row
    table = dealt(counts, 24, width, device)
    k_cache, v_cache = paged_caches(layout, 24, size, device)
    k, v = (t.to(device) for t in news(4))
    rows = index or range(4)
    lengths = [ends[row % 4] for row in rows]
    expected = [written(cache, new, lengths, rows, table) for cache, new in ((k_cache, k), (v_cache, v))]
    given = None if index is None else integers(*index).to(device)
    base = k_cache if k_cache._base is None else k_cache._base
    flashcore.append(k_cache, v_cache, k, v, integers(*lengths).to(device), batch_index=given, table=table)
    for cache, (right, there) in zip((k_cache, v_cache), expected, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), right.nan_to_num(7.0))
        assert torch.equal(~cache.isnan().flatten(2).any(2), there)
    shared = v_cache._base is base and base is not k_cache
    numbers = expected[0][1].sum() * HEADS * (HEAD_DIM + (HEAD_DIM_V if shared else 0))
    assert (~base.isnan()).sum() == numbers  # nothing around the pages
    assert expected[0][1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_names_no_page_takes_nothing_from_others(device):
    """Its neighbour writes the very row that a number clamped into the cache would be."""
    for number in NO_PAGES:
        for order in (slice(None), slice(None, None, -1)):
            table = torch.tensor([[number], [0], [2]][order], dtype=torch.int32, device=device)
            k_cache, v_cache = paged_caches("nhd", 3, 4, device)
            k, v = (t.to(device) for t in news(3, 4))
            flashcore.append(k_cache, v_cache, k, v, integers(0, 0, 0).to(device), table=table)
            for cache, new in ((k_cache, k), (v_cache, v)):
                right, _ = written(torch.full_like(cache, torch.nan), new, [0] * 3, range(3), table)
                assert torch.equal(cache.nan_to_num(7.0), right.nan_to_num(7.0))


def test_where_no_sequence_has_room_nothing_is_written():
    k_cache, v_cache = paged_caches("nhd", 3, 4)
    k_cache[0, 0], v_cache[0, 0] = 1.0, 2.0
    before = k_cache.clone(), v_cache.clone()
    for table, length in (([[-1, 3]], 0), ([[0, 1]], 8), ([[0, 1]], -5)):
        numbers = torch.tensor(table, dtype=torch.int32)
        flashcore.append(k_cache, v_cache, *news(1, 2), integers(length), table=numbers)
    flashcore.append(k_cache[:0], v_cache[:0], *news(1, 2), integers(0), table=numbers)
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [None, OFFSETS])
def test_rotary_in_pages(offsets, interleaved, dtype, device):
    """By the position in the sequence, not by that in the page."""
    table, angles = dealt([5, 5, 5, 5], 24, 5, device), rotary(HEAD_DIM // 4, 22, dtype)
    angles, lengths = tuple(t.to(device) for t in angles), [0, 3, 15, 19]
    k_cache, v_cache = paged_caches("hnd", 24, 4, device, dtype)
    k, v = (t.to(device) for t in news(4, dtype=dtype))
    given = None
    if offsets is not None:
        k, v = (t.flatten(0, 1)[:12] for t in (k, v))
        given = integers(*offsets).to(device)
    expected, there = written(k_cache, k, lengths, range(4), table, offsets, angles, interleaved)
    flashcore.append(
        k_cache, v_cache, k, v, integers(*lengths).to(device), rotary=angles, interleaved=interleaved, table=table,
        offsets=given,
    )  # fmt: skip
    by_ulps = {"rtol": torch.finfo(dtype).eps, "atol": 4 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(k_cache, expected, equal_nan=True, **by_ulps)
    assert there.sum() == (10 if offsets is None else 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [None, 4])  # None: a dense cache
@pytest.mark.parametrize("index", [None, [2, 0, 3, 1], [1, -1, 9, 0]])
def test_append_packed_rows(index, size, device):
    k, v = (torch.randn(12, HEADS, dim, device=device) for dim in (HEAD_DIM, HEAD_DIM_V))
    lengths, rows = [1, 0, 2**31 - 1 if index else 9, 11], index or range(4)
    if size is None:
        k_cache, v_cache = paged_caches("nhd", 4, 12, device)
        table, given = torch.arange(4)[:, None], None  # a row of the cache is a page
    else:
        k_cache, v_cache = paged_caches("rows", 16, size, device)
        table = given = dealt([3] * 4, 16, 3, device)
    expected = [written(cache, new, lengths, rows, table, OFFSETS) for cache, new in ((k_cache, k), (v_cache, v))]
    flashcore.append(
        k_cache, v_cache, k, v, integers(*lengths).to(device), table=given, offsets=integers(*OFFSETS).to(device),
        batch_index=None if index is None else integers(*index).to(device),
    )  # fmt: skip
    for cache, (right, there) in zip((k_cache, v_cache), expected, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), right.nan_to_num(7.0))
        assert 0 < there.sum() < 12


def test_rows_of_no_sequence_are_not_appended():
    for offsets in ((0, 0, 0), (3, 3, 3), (2, 2, 2)):
        k_cache, v_cache = paged_caches("nhd", 2, 4)
        k, v = (torch.randn(3, HEADS, dim) for dim in (HEAD_DIM, HEAD_DIM_V))
        flashcore.append(k_cache, v_cache, k, v, integers(0, 0), offsets=integers(*offsets))
        assert k_cache.isnan().all()
    flashcore.append(k_cache[:0], v_cache[:0], k, v, integers(), offsets=integers(0))


@pytest.mark.parametrize("offsets", [None, OFFSETS])
def test_append_to_pages_in_one_graph(offsets):
    compiled = torch.compile(flashcore.append, backend="eager", fullgraph=True)
    k, v = news(4)
    given = None
    if offsets is not None:
        k, v, given = *(t.flatten(0, 1) for t in (k, v)), integers(*offsets)
    for seed, lengths in enumerate(([0, 3, 13, 17], [9, 18, 1, 4])):
        table = dealt([5, 5, 5, 5], 24, 5, seed=seed)
        k_cache, v_cache = paged_caches("hnd", 24, 4)
        expected, _ = written(k_cache, k, lengths, range(4), table, offsets)
        compiled(k_cache, v_cache, k, v, integers(*lengths), table=table, offsets=given)
        assert torch.equal(k_cache.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_the_switch_raises_before_pages_are_written(monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    k_cache, v_cache = paged_caches("nhd", 6, 4)
    k, v = news(2)
    for table, lengths, message in (
        ([[0, 1], [2, 3]], [0, 6], r"append: lengths \[0, 6\] are not all 5 or less"),
        ([[0, 1], [2, 6]], [0, 2], r"append: the table names \[6\], which are no pages of a cache of 6"),
        ([[0, -3], [9, 6]], [3, 2], r"append: the table names \[-3, 6, 9\]"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            flashcore.append(k_cache, v_cache, k, v, integers(*lengths), table=torch.tensor(table, dtype=torch.int32))
    packed = k.flatten(0, 1), v.flatten(0, 1)
    with pytest.raises(InvalidInputError, match=r"append: lengths \[3, 9\] are not all 8 or less"):
        flashcore.append(
            k_cache, v_cache, *packed, integers(2, 4), table=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
            offsets=integers(0, 1, 6),
        )  # fmt: skip
    assert k_cache.isnan().all()
    table = torch.tensor([[0, -1], [9, 2]], dtype=torch.int32)  # what is not needed may be no page
    flashcore.append(k_cache, v_cache, k, v, integers(0, 4), table=table)
    assert torch.equal(k_cache[[0, 2], :NEW], k)


INVALID_PAGES = {
    "table: dtype": ({"table": torch.zeros(2, 3)}, r"append: table must be int32 \(batch, max_pages\).*float32"),
    "table: list": ({"table": [[0], [1]]}, r"append: table must be a torch.Tensor \(given list\)"),
    "table: dimensions": ({"table": integers(0, 1)}, r"table must be int32 \(batch, max_pages\)"),
    "table: device": (
        {"table": torch.zeros(2, 3, dtype=torch.int32, device="meta")}, r"the table is on meta, the cache on cpu"
    ),
    "table: batch": ({"table": torch.zeros(3, 3, dtype=torch.int32)}, r"k has 2 sequences and the table 3"),
    "table: columns": (
        {"table": torch.zeros(3, 2, dtype=torch.int32).t()}, r"its rows contiguous \(given int32 \(2, 3\), strides \(1"
    ),
    "too many": (
        {"table": torch.zeros(2, 1, dtype=torch.int32)}, r"3 new positions are more than the cache's capacity, 2"
    ),
    "rotary: short": ({"rotary": rotary(4, 5)}, r"with 6 positions or more"),
    "offsets: dense": ({"offsets": integers(0, 1, 2)}, r"append: k must be a tensor \(total, heads, head_dim\)"),
}  # fmt: skip
INVALID_OFFSETS = {
    "dense": ({"offsets": None}, r"append: k must be a tensor \(batch, positions, heads, head_dim\)"),
    "list": ({"offsets": [0, 1, 2]}, r"offsets must be a torch.Tensor \(given list\)"),
    "dtype": ({"offsets": torch.tensor([0, 1, 2])}, r"offsets must be int32 \(batch \+ 1,\)"),
    "none": ({"offsets": integers()}, r"offsets must be \(batch \+ 1,\): at least one number"),
    "batch": ({"offsets": integers(0, 1, 2, 3)}, r"lengths must be an int32 tensor \(3,\)"),
    "device": (
        {"offsets": torch.zeros(3, dtype=torch.int32, device="meta")}, r"append: offsets are on meta, k on cpu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID_PAGES)
def test_wrong_pages_are_named_before_anything_is_written(name):
    change, message = INVALID_PAGES[name]
    k_cache, v_cache = paged_caches("nhd", 6, 2)
    given = {"table": torch.zeros(2, 3, dtype=torch.int32)} | change
    with pytest.raises(InvalidInputError, match=message):
        flashcore.append(k_cache, v_cache, *news(2), integers(0, 1), **given)
    assert k_cache.isnan().all()


@pytest.mark.parametrize("name", INVALID_OFFSETS)
def test_wrong_offsets_are_named_before_anything_is_written(name):
    change, message = INVALID_OFFSETS[name]
    k_cache, v_cache = paged_caches("nhd", 2, 6)
    k, v = (t.flatten(0, 1) for t in news(2))
    with pytest.raises(InvalidInputError, match=message):
        flashcore.append(k_cache, v_cache, k, v, integers(0, 1), **change)
    assert k_cache.isnan().all()


@pytest.mark.gpu
def test_a_captured_append_reads_tables_and_lengths_when_it_replays():
    k_cache, v_cache = paged_caches("hnd", 24, 4, "cuda", torch.bfloat16)
    k, v = (t.to("cuda") for t in news(4, dtype=torch.bfloat16))
    table, lengths = dealt([5] * 4, 24, 5, "cuda"), integers(0, 3, 13, 17).to("cuda")
    flashcore.append(k_cache, v_cache, k, v, lengths, table=table)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashcore.append(k_cache, v_cache, k, v, lengths, table=table)
        with torch.cuda.graph(graph):
            flashcore.append(k_cache, v_cache, k, v, lengths, table=table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed, now in enumerate(([1, 18, 8, 2], [0, 0, 16, 19], [20, -1, 3, 7])):
        table.copy_(dealt([5, 4, 5, 5], 24, 5, seed=seed))
        lengths.copy_(integers(*now))
        k_cache.fill_(torch.nan)
        k.normal_()
        expected, _ = written(k_cache, k, now, range(4), table)
        graph.replay()
        assert torch.equal(k_cache.nan_to_num(7.0), expected.nan_to_num(7.0))


# ---- attention over a cache --------------------------------------------------------------------------------------


def strided(layout, batch=3):
    """A cache and, where there is one, the tensor that it is a view of, NaN around it."""
    shape = {
        "bshd": (batch, CAPACITY, HEADS, HEAD_DIM),
        "bhsd": (batch, HEADS, CAPACITY, HEAD_DIM),
        "longer": (batch, CAPACITY + 5, HEADS, HEAD_DIM),
        "kv": (batch, CAPACITY, 2, HEADS, HEAD_DIM),
        "ragged": (batch, CAPACITY * HEADS * HEAD_DIM + 1),
    }[layout]
    whole = torch.full(shape, torch.nan)
    view = {
        "bshd": lambda: whole,
        "bhsd": lambda: whole.transpose(1, 2),
        "longer": lambda: whole[:, 2:-3],
        "kv": lambda: whole[:, :, 1],
        "ragged": lambda: whole[:, 1:].unflatten(1, (CAPACITY, HEADS, HEAD_DIM)),
    }[layout]()
    return view.copy_(torch.randn(view.shape))


COPIED = {("ragged", "ragged"), ("bshd", "bhsd")}  # these have no place as rows of one tensor


@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize(
    "layouts", [(one, one) for one in ("bshd", "bhsd", "longer", "kv", "ragged")] + [("bshd", "kv"), ("bshd", "bhsd")]
)
def test_a_cache_is_read_where_it_is(layouts, batch, recwarn):
    k_cache, v_cache = (strided(layout, batch) for layout in layouts)
    q = torch.randn(batch, 2, 4, HEAD_DIM)
    flat, k, v, packed = kv_cache.as_packed(q, k_cache, v_cache, integers(*range(3, 3 + batch)))
    keys = packed["keys"]
    assert keys.longest == CAPACITY
    assert keys.offsets[-1] == len(k) == len(v)
    for b in range(batch):
        rows = slice(int(keys.offsets[b]), int(keys.offsets[b]) + CAPACITY)
        assert torch.equal(k[rows], k_cache[b])
        assert torch.equal(v[rows], v_cache[b])
        assert int(keys.length(b)) == 3 + b
    assert torch.equal(flat[packed["queries"].offsets[-2] :], q[-1])
    warned = [w for w in recwarn if w.category is FlashCoreWarning and "copies it first" in str(w.message)]
    assert len(warned) == (layouts in COPIED and batch > 1)
    if not warned:
        assert k.data_ptr() == k_cache.data_ptr()
        assert v.data_ptr() == v_cache.data_ptr()


def test_new_lengths_are_the_same_plan():
    """Offsets are made once; a call with other lengths finds how to run in the dictionary."""
    q = torch.randn(3, 1, 4, HEAD_DIM)
    cache, lengths = strided("bshd"), integers(1, 4, CAPACITY)
    flat, k, v, packed = kv_cache.as_packed(q, cache, cache, lengths)
    first = flashcore.attention(flat, k, v, **packed)
    known = len(flashcore.api.runs)
    lengths.copy_(integers(5, 0, 2))
    for given in (lengths, integers(5, 0, 2)):
        flat, k, v, again = kv_cache.as_packed(q, cache, cache, given)
        assert again["keys"].offsets is packed["keys"].offsets
        assert again["queries"].offsets is packed["queries"].offsets
        second = flashcore.attention(flat, k, v, **again)
        for b, n in enumerate((5, 0, 2)):
            of_one = second[b : b + 1, None], None, q[b : b + 1], cache[b : b + 1, :n], cache[b : b + 1, :n]
            assert_forward(*of_one)
    assert len(flashcore.api.runs) == known == 1
    assert not torch.equal(first, second)
