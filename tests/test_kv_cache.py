"""KV caches: what is appended is where it belongs, nothing else changes, and what is wrong is named."""

import pytest
import torch

import flashcore
from flashcore import kv_cache
from flashcore.errors import FlashCoreWarning, InvalidInputError
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
    "lengths: batch": (lambda a: a.update(lengths=integers(1)), r"as k has sequences, .*torch.int32 \(1,\)"),
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
