"""The suites of packed and paged sequences, on the CPU: their arithmetic, what is right of them, their tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore.bench import check, packed, record, shapes, suites, tables, timing
from flashcore.bench.cases import LENGTHS, SUITES, Case, PackedCase, of_lengths
from flashcore.bench.documents import NOTHING, Documents
from flashcore.bench.peers import PEERS, Peer
from flashcore.bench.timing import Effort

FAST = Effort(rounds=2, round_ms=1, warmup_ms=0, lead_in_ms=0, rest_ms=0)
ALONE = ((5, 5), (70, 70), (2, 2), (33, 33))  # one query on one key has no gradient but rounding
MIXED = ((1, 100), (20, 20), (7, 50), (1, 3))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setitem(LENGTHS, "alone", ALONE)
    monkeypatch.setitem(LENGTHS, "uneven", MIXED)


@pytest.fixture
def add_peer(monkeypatch):
    def add(name, prepare, features=("packed", "paged")):
        monkeypatch.setitem(PEERS, name, Peer(name, "for a test", prepare, features=frozenset(features)))

    return add


def varlen(lengths="alone", causal=True, **more):
    return of_lengths(lengths, 4, 2, 32, causal, **more)


def paged(lengths="uneven", page_size=16):
    return of_lengths(lengths, 4, 2, 32, True, page_size=page_size)


EQUAL_PAGED = PackedCase(3, 4, 40, 4, 2, 32, True, page_size=16)


def run(case, names=("flashcore", "reference")):
    """On the wall clock: CUDA graphs need a GPU."""
    suite = "paged" if case.page_size else "varlen"
    return suites.run(replace(SUITES[suite], mode="events"), [case], names, FAST)


# --- cases


def test_the_shapes_that_are_measured():
    found = SUITES["varlen"].cases
    assert {(c.head_dim, c.heads * c.head_dim, c.kv_heads) for c in found} == {
        (d, 2048, 2048 // d) for d in (64, 128, 256)
    }
    for backward in (False, True):
        of_pass = [c for c in found if c.backward == backward]
        assert {c.causal for c in of_pass} == {False, True}
        assert {c.rows for c in of_pass} == {((tokens,), (tokens,)) for tokens in (16384, 65536)}
        assert {c.head_dim for c in of_pass if c.lengths == "equal"} == {64, 128, 256}
    assert {c.lengths for c in found} == {"equal", "mix 16k", "log-uniform 16k", "log-uniform 64k"}
    assert {(c.batch, c.seqlen_q) for c in found if c.lengths == "equal"} == {(32, 512), (8, 2048), (8, 8192)}
    drawn = [keys for _, keys in (*LENGTHS["log-uniform 16k"], *LENGTHS["log-uniform 64k"])]
    assert min(drawn) >= 64
    assert max(drawn) <= 16384

    found = SUITES["paged"].cases
    fields = "batch", "seqlen_k", "heads", "kv_heads", "head_dim"
    equal = {tuple(getattr(c, field) for field in fields) for c in found if c.lengths == "equal"}
    assert equal == {tuple(getattr(c, field) for field in fields) for c in SUITES["decode"].cases}
    for lengths in ("equal", "mixed"):
        assert {c.page_size for c in found if c.lengths == lengths} == {16, 64, 256}
    assert {c.seqlen_q for c in found if c.lengths == "equal"} == {1, 4, 16}
    kinds = {"prompt" if q == k else "token" if q == 1 else "chunk" for q, k in LENGTHS["mixed"]}
    assert kinds == {"prompt", "chunk", "token"}


@pytest.mark.parametrize("name", ["varlen", "paged"])
def test_a_case_comes_back_from_its_row(name):
    for case in SUITES[name].cases:
        op = "attention_bwd" if case.backward else SUITES[name].op
        row = json.loads(json.dumps({"op": op, "impl": "x", **case.fields()}))
        assert shapes.case_of(row) == case
    assert len({shapes.key({"op": "x", **case.fields()}) for case in SUITES["paged"].cases}) == len(
        SUITES["paged"].cases
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sequences", [ALONE, MIXED])
def test_operations_and_bytes_are_those_of_the_sequences(causal, sequences):
    """Counted one by one."""
    case = varlen("alone" if sequences is ALONE else "uneven", causal)
    pairs = sum(not causal or j <= i + keys - queries for queries, keys in sequences for i in range(queries)
                for j in range(keys))  # fmt: skip
    assert case.flops == 4 * 4 * 32 * pairs
    assert replace(case, backward=True).flops == 10 * 4 * 32 * pairs
    assert case.kv_bytes == 2 * 2 * 32 * 2 * sum(keys for _, keys in sequences)
    assert case.speed(0.5) == {"tflops": case.flops * 2e-9}
    assert replace(case, page_size=16).speed(0.5)["tbps"] == pytest.approx(case.kv_bytes * 2e-9)


def test_equal_lengths_have_the_operations_of_the_dense_windows():
    dense = Case(8, 64, 64, 4, 2, 32, True, window=(63, 0))  # everything that a causal mask shows
    assert varlen("8 x 64").flops == dense.flops
    assert varlen("8 x 64").kv_bytes == dense.kv_bytes


def test_the_parts_of_a_case_are_its_sequences():
    case = varlen("uneven")
    q, k, v = check.make_inputs(case, "cpu")
    assert q.shape == (29, 4, 32)
    assert k.shape == v.shape == (173, 2, 32)
    found = [(one.seqlen_q, one.seqlen_k, *(x.shape[:2] for x in own)) for one, own in check.parts(case, q, k, v, q)]
    assert found == [(a, b, (1, a), (1, b), (1, b), (1, a)) for a, b in MIXED]
    assert torch.equal(check.joined(case, case.split(q)), q)
    assert torch.equal(check.joined(case, case.split(k, of_keys=True)), k)
    assert not any(one.features for one in case.parts)
    assert case.features == {"packed"}
    assert paged().features == {"paged"}


def test_keys_lie_in_shuffled_pages():
    case = paged(page_size=16)
    _, k, v = check.make_inputs(case, "cpu")
    k_cache, v_cache = packed.stored(case, k, v)
    table = packed.table(case, torch.device("cpu"))
    counts = [-(-keys // 16) for _, keys in MIXED]
    assert k_cache.shape == v_cache.shape == (sum(counts), 16, 2, 32)
    named = [row[:count] for row, count in zip(table, counts, strict=True)]
    assert sorted(torch.cat(named).tolist()) == list(range(sum(counts)))
    assert torch.cat(named).tolist() != list(range(sum(counts)))
    assert all((row[count:] == 0).all() for row, count in zip(table, counts, strict=True))
    for cache, x in ((k_cache, k), (v_cache, v)):
        for own, pages in zip(case.split(x, of_keys=True), named, strict=True):
            rows = cache[pages.long()].flatten(0, 1)
            assert torch.equal(rows[: own.shape[1]], own[0])
            assert not rows[own.shape[1] :].any()
    assert packed.stored(varlen(), k, v) == (k, v)


# --- running


@pytest.mark.parametrize("lengths", ["alone", "3 x 40"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_packed_sequences_are_checked_and_timed(lengths, causal, backward):
    case = varlen(lengths, causal, backward=backward)
    data = run(case, ("flashcore", "reference", "flashcore-dense", "sdpa"))
    dense = ["flashcore-dense"] if case.lengths == "equal" else []
    assert [row["impl"] for row in data["rows"]] == ["flashcore", "reference", *dense]
    passes = ("attention_bwd", "backward") if backward else ("attention_fwd", "forward")
    for row in data["rows"]:
        assert "failed" not in row, row
        assert (row["op"], row["phase"]) == passes
        assert row["tflops"] == pytest.approx(case.flops / row["ms_p50"] * 1e-9)
        assert 0 < row["rel_err"] < 1e-2
        assert ("rel_err_dk" in row) == backward
    assert ("backward" in data["rows"][0]) == backward
    reasons = {entry["impl"]: entry["reason"] for entry in data["skipped"]}
    assert reasons.pop("sdpa") == "it has no packed"
    assert reasons == ({} if dense else {"flashcore-dense": "the sequences are not of one length"})
    assert "(total, heads, head_dim)" in data["meta"]["method"]["inputs"]


CASES = {
    "uneven": lambda: paged(),
    "prompts": lambda: paged("3 x 40", 64),
    "few queries": lambda: EQUAL_PAGED,
    "one query": lambda: replace(EQUAL_PAGED, seqlen_q=1),
}


@pytest.mark.parametrize("name", CASES)
def test_paged_sequences_are_checked_and_timed(name):
    case = CASES[name]()
    data = run(case, ("flashcore", "reference", "flashcore-dense"))
    dense = ["flashcore-dense"] if case.lengths == "equal" else []
    assert [row["impl"] for row in data["rows"]] == ["flashcore", "reference", *dense]
    for row in data["rows"]:
        assert "failed" not in row, row
        assert row["op"] == "attention_decode"
        assert row["tbps"] == pytest.approx(case.kv_bytes / row["ms_p50"] * 1e-9)


def test_calls_take_turns_on_copies_of_the_pages(add_peer, monkeypatch):
    case = paged()
    monkeypatch.setattr(timing, "FLUSH_BYTES", 3 * case.kv_bytes - 1)
    seen = []

    def prepare(case, q, k, v):
        right = PEERS["reference"].prepare(case, q, k, v)

        def call():
            seen.append(right.args[1].data_ptr())
            return right()

        return call

    add_peer("counted", prepare)
    (row,) = run(case, ["counted"])["rows"]
    assert "failed" not in row
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:6]


def as_one_sequence(case, q, k, v):
    return lambda: flashcore.attention(q[None], k[None], v[None], causal=case.causal)[0]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_an_answer_that_sees_a_neighbour_is_wrong(add_peer, causal, backward):
    add_peer("as one", as_one_sequence)
    (row,) = run(varlen(causal=causal, backward=backward), ["as one"])["rows"]
    assert "against float64" in row["failed"]


def test_wrong_gradients_of_one_short_sequence_are_found(add_peer):
    """Beside long ones, in whose norm they would not show."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, k):
            return k.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[:5] *= 1.02
            return grad

    def prepare(case, q, k, v):
        return PEERS["reference"].prepare(case, q, Spoil.apply(k), v)

    add_peer("spoils", prepare)
    (row,) = run(varlen(backward=True), ["spoils"])["rows"]
    assert row["failed"].startswith("dk: a head differs from PyTorch's")


def test_an_answer_that_reads_pages_in_order_is_wrong(add_peer):
    def prepare(case, q, k, v):
        places = packed.places(case, q.device)
        table = places["keys"].table
        ordered = torch.arange(table.numel(), dtype=torch.int32).view(table.shape) % int(table.max() + 1)
        places["keys"] = replace(places["keys"], table=ordered)
        return lambda: flashcore.attention(q, *packed.stored(case, k, v), causal=True, **places)

    add_peer("in order", prepare)
    (row,) = run(paged(), ["in order"])["rows"]
    assert "against float64" in row["failed"]


def test_a_mask_that_is_aligned_to_the_top_left_is_wrong(add_peer):
    def prepare(case, q, k, v):
        own = [x for _, x in check.parts(case, q, k, v)]
        return lambda: torch.cat([
            torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in one), is_causal=True, enable_gqa=True
            ).transpose(1, 2)[0] for one in own
        ])  # fmt: skip

    add_peer("top left", prepare)
    (row,) = run(paged(), ["top left"])["rows"]
    assert "against float64" in row["failed"]
    (row,) = run(paged("alone"), ["top left"])["rows"]  # where both are one
    assert "failed" not in row


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_pages_are_measured_in_graphs():
    assert "needs a CUDA GPU" in suites.run(SUITES["paged"], effort=FAST)["skipped"][0]["reason"]


# --- peers


@pytest.fixture
def fa3(monkeypatch):
    class Ops:
        def fwd(self, *arguments):
            return arguments

    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", Ops(), raising=False)

    def arguments(case):
        given = PEERS["fa3-varlen"].prepare(case, *check.make_inputs(case, "cpu"))()
        assert len(given) == 37
        return given

    return arguments


def test_the_op_of_vllm_gets_packed_sequences(fa3):
    given = fa3(varlen("uneven"))
    assert [x.shape for x in given[:3]] == [(29, 4, 32), (173, 2, 32), (173, 2, 32)]
    assert given[7].tolist() == [0, 1, 21, 28, 29]
    assert given[8].tolist() == [0, 100, 120, 170, 173]
    assert given[9:12] == (None, None, None)
    assert given[12:14] == (20, 100)
    assert given[14] is None


def test_the_op_of_vllm_gets_pages(fa3):
    case = paged()
    given = fa3(case)
    assert [x.shape for x in given[1:3]] == [(14, 16, 2, 32)] * 2
    assert given[7].tolist() == [0, 1, 21, 28, 29]
    assert given[8] is None  # FlashAttention-3 takes lengths instead
    assert given[11].tolist() == [100, 20, 50, 3]
    assert torch.equal(given[14], packed.table(case, torch.device("cpu")))


def test_the_op_of_vllm_has_no_gradients():
    assert PEERS["fa3-varlen"].rejects(varlen(backward=True)) == "it has no gradients"
    assert PEERS["fa3-varlen"].rejects(varlen()) is None


def test_pytorchs_operator_gets_offsets(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", lambda *arguments: arguments)
    case = varlen("uneven")
    given = PEERS["fa2-varlen"].prepare(case, *check.make_inputs(case, "cpu"))()
    assert [x.tolist() for x in given[3:5]] == [[0, 1, 21, 28, 29], [0, 100, 120, 170, 173]]
    assert given[5:] == (20, 100, 0.0, True, False)


def test_peers_say_what_they_do_not_compute():
    dense = Case(1, 8, 8, 2, 2, 32, True)
    fa2, ours = PEERS["fa2-varlen"], PEERS["flashcore-dense"]
    assert fa2.lacks(varlen()) is fa2.rejects(varlen()) is None
    assert fa2.lacks(paged()) == "it has no paged"
    assert fa2.rejects(replace(varlen(), dtype="float32")) == "float32 inputs"
    assert "dense" in fa2.rejects(dense)
    assert "dense" in ours.rejects(dense)
    assert ours.lacks(replace(varlen(), sink=True)) == "it has no sink"


# --- records and tables


def test_a_record_knows_the_passes_apart():
    forward = next(c for c in SUITES["varlen"].cases if c.lengths == "mix 16k" and c.head_dim == 128)
    backward = next(c for c in SUITES["varlen"].cases if c.lengths == "mix 16k" and c.backward)
    assert forward.plain == replace(backward, backward=False).plain
    rows = [{"op": "attention_bwd", "impl": "flashcore", **backward.fields()}]
    absent = record.missing({"suite": "varlen", "rows": rows, "skipped": []})
    assert forward.name in absent
    assert backward.name not in absent
    assert len(absent) == len(SUITES["varlen"].cases) - 1


def test_a_record_knows_pages_apart():
    first, second = (c for c in SUITES["paged"].cases[:2])
    rows = [{"op": "attention_decode", "impl": "flashcore", **first.fields()}]
    absent = record.missing({"suite": "paged", "rows": rows, "skipped": []})
    assert first.name not in absent
    assert second.name in absent


def recorded(suite, times, forward_record):
    """FlashCore's milliseconds and those of others, by name, at every case that they could compute."""
    rows = [
        {"op": "attention_bwd" if case.backward else SUITES[suite].op, "impl": impl, **case.fields()}
        | {"ms_p50": ms, "std_pct": 1.0, "rel_err": 2e-3, "max_abs_err": 1e-3, **case.speed(ms)}
        | ({"backend": "triton"} | ({"backward": "triton"} if case.backward else {}) if impl == "flashcore" else {})
        for case in SUITES[suite].cases
        for impl, ms in times.items()
        if not PEERS[impl].rejects(case)
    ]
    meta = forward_record["meta"] | {"method": {"mode": "graph" if suite == "paged" else "events", "about": "tests"}}
    return {"suite": suite, "rows": rows, "skipped": [], "meta": meta}


TIMES = {"flashcore": 1.0, "flashcore-dense": 0.95, "fa3-varlen": 1.1}


def test_passes_are_tables_of_their_own(forward_record):
    forward, backward = tables.tables(recorded("varlen", TIMES, forward_record), {})
    assert forward.title.endswith("backward pass alone: forward")
    assert backward.title.endswith("backward pass alone: backward")
    assert forward.headers[:4] == ("head_dim", "mask", "heads", "sequences")
    assert forward.headers[4:9] == (
        "flashcore, TFLOP/s", "fa3-varlen, TFLOP/s", "flashcore-dense, TFLOP/s", "over best peer", "over dense",
    )  # fmt: skip
    uneven, equal = forward.rows[0], forward.rows[3]
    assert uneven[:9] == ("64", "causal", "32", "8 of log-uniform 16k", "313", "285", "", "1.10", "")
    assert equal[3:9] == ("32 of 512", "34", "31", "36", "1.10", "0.95")
    assert any("Speed over FlashCore's dense call, geometric mean: 0.95; lowest 0.95" in n for n in forward.notes)
    assert not any("FlashAttention-3" in note for note in forward.notes)
    assert {row[6] for row in backward.rows} == {""}  # over the best peer: none was measured
    assert backward.notes[-1] == "The backward pass that FlashCore's plan picked: triton (9 shapes)."


def test_a_table_says_where_fa3_was_not_measured(forward_record):
    data = recorded("varlen", {"flashcore": 1.0, "fa2-varlen": 2.0}, forward_record)
    for table in tables.tables(data, {}):
        assert any("FlashAttention-3's packed op was not measured for any shape" in note for note in table.notes)


def test_pages_are_shown_in_bytes_and_microseconds(forward_record):
    (table,) = tables.tables(recorded("paged", {**TIMES, "flashcore": 0.1}, forward_record), {})
    assert table.headers[4:8] == ("page", "flashcore, us", "flashcore, TB/s", "flashcore-dense, TB/s")
    assert table.rows[0][3:7] == ("8 of 1 x 8192", "16", "100.0", "2.68")
    assert table.rows[-1][3] == "36 of mixed"
    assert table.notes[-1] == f"The backend that FlashCore's plan picked: triton ({len(table.rows)} shapes)."


def test_what_was_wrong_is_shown(add_peer, monkeypatch):
    monkeypatch.setitem(PEERS, "flashcore", replace(PEERS["flashcore"], prepare=as_one_sequence))
    data = run(varlen("2 x 40"), ("flashcore", "flashcore-dense"))
    (table,) = tables.tables(data, {})
    assert table.rows[0][4] == "failed"
    assert any(note.startswith("FAILED: flashcore on d32-s40-b2-h4:2-causal-bf16: ") for note in table.notes)


def test_documents_show_what_packing_costs(tmp_path, forward_record):
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    blocks = "roofline", "profile", "packing"
    page.write_text("".join(f"<!-- flashcore report: {b} -->\n<!-- flashcore report end -->\n" for b in blocks))
    documents = Documents(tmp_path)
    assert documents.blocks()[page]["packing"] == NOTHING
    for suite in ("varlen", "paged"):
        data = recorded(suite, TIMES, forward_record)
        record.write(record.with_missing(data), record.path_for(data, tmp_path / "benchmarks" / "results"))
    text = documents.blocks()[page]["packing"]
    assert "| 64 | causal | 32 | 32 of 512 | forward |  | 1000.0 | 950.0 | 0.95 |" in text
    assert "| 128 | causal | 16 | 8 of 2048 | backward |  | 1000.0 | 950.0 | 0.95 |" in text
    assert "| 128 | causal | 32:8 | 8 of 1 x 8192 | forward | 16 | 1000.0 | 950.0 | 0.95 |" in text
    assert "mixed" not in text
    assert "**varlen.** Not recorded on the H100 yet." in text
    (tmp_path / "benchmarks" / "results" / "h200" / "paged.json").unlink()
    text = documents.blocks()[page]["packing"]
    assert "**varlen.** Not recorded on the H100 yet." in text
    assert "**paged.** Not recorded on the H100 and the H200 yet." in text


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("lengths", ["8 x 256", "alone"])
def test_packed_sequences_on_a_gpu(lengths, backward):
    case = of_lengths(lengths, 8, 8, 64, True, backward=backward)
    data = suites.run(SUITES["varlen"], [case], None, FAST)
    rows = {row["impl"]: row for row in data["rows"]}
    assert {impl: row["failed"] for impl, row in rows.items() if "failed" in row} == {}
    assert {"flashcore", "flashcore-triton", "fa2-varlen"} <= rows.keys()
    assert ("flashcore-dense" in rows) == (case.lengths == "equal")
    assert all(row["ms_p50"] > 0 for row in rows.values())
    assert tables.tables(data, {})


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("lengths", ["uneven", "4 x 300"])
def test_paged_sequences_on_a_gpu(lengths, page_size):
    """In CUDA graphs, as the suite runs."""
    case = of_lengths(lengths, 8, 2, 64, True, page_size=page_size)
    data = suites.run(SUITES["paged"], [case], None, FAST)
    rows = {row["impl"]: row for row in data["rows"]}
    assert {impl: row["failed"] for impl, row in rows.items() if "failed" in row} == {}
    assert {"flashcore", "flashcore-triton"} <= rows.keys()
    assert all(0 < row["ms_p50"] < 5 for row in rows.values())
    assert tables.tables(data, {})
