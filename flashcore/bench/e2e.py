"""What FlashCore gains inside whole models: Llama shapes with random weights, through Hugging Face Transformers.

Everybody computes the same network, built once; only the attention changes. As everywhere in this harness an answer is
compared before it is timed: logits (or gradients) with those of one of SDPA's backends, and FlashCore's may lie at most
``check.FACTOR`` times as far from it as SDPA's other backend does.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from flashcore.bench import check, timing
from flashcore.bench.cases import OURS
from flashcore.bench.models import LAUNCH_BOUND, Model, ModelCase
from flashcore.bench.peers import PEERS
from flashcore.errors import FlashCoreWarning

# Implementations, by the name that Transformers knows them by; PEERS has the context that makes one SDPA another.
ATTENTION = {"flashcore": "fcore", "cudnn": "sdpa", "fa2": "sdpa", "sdpa": "sdpa", "eager": "eager"}
# Whose answer the others are compared with: the first that has one. The next that has one is the measure of distance.
REFERENCES = ("fa2", "cudnn", "sdpa", "eager")
WATCHED = "watched"  # the name, for Transformers, of an attention with a stopwatch around it
# How warnings begin that say that a call came to FlashCore and was computed by something else, or by less than it has.
NOT_OURS = "attn_implementation=|attention: backend"
LEAD_CYCLES = 200_000_000  # about 0.1 s in which the host runs ahead: no gaps on the device while it is watched
CPU_PARAMETERS = 10**8  # larger models take too long there

ABOUT = (
    "transformers {transformers}, random weights, batch 1; wall time of a whole call, the device idle before it and "
    "after; implementations in turns, shuffled (seed {seed}), 2 or 3 rounds (generation: after one of the same "
    "lengths); prefill fills the cache and computes the last logits; generation counts new tokens over all its time, "
    "prompt included; training is forward and backward without an optimizer; attention's share by CUDA events around "
    "each attention call, forward and backward, after a call untimed (but for 32,768 tokens), while the host runs "
    "ahead (generation: in one decoding step); time per token without the first, which is timed alone; what a step "
    "takes the device: the same step; peak memory as torch.cuda.max_memory_allocated, weights included; rel_err of "
    "last logits, of the logits of all steps up to the first other token, or of the gradients of the first layer's "
    "query, key and value weights"
)


def missing() -> str | None:
    """What this installation lacks for the suite."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return f"transformers {transformers.__version__} makes masks where 5 makes none: needs 5"
    return None


def method(seed: int) -> dict:
    import transformers

    about = ABOUT.format(transformers=transformers.__version__, seed=seed)
    return {"mode": "e2e", "about": about, "seed": seed, "transformers": transformers.__version__}


def usable_peers(names: Sequence[str]) -> tuple[list[str], list[dict]]:
    """The named implementations that can run on this machine, and why the others cannot."""
    usable, skipped = [], []
    for name in names:
        known = name in ATTENTION
        reason = PEERS[name].unavailable() if known else "it is no attention of a Transformers model"
        if reason is None:
            usable.append(name)
        else:
            skipped.append({"impl": name, "reason": reason})
    return usable, skipped


def measure(
    cases: Sequence[ModelCase], names: Sequence[str], seed: int, on_case: Callable[[str], None]
) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """Measure ``cases`` for the implementations ``names``: each one's name, rows, and who was left out."""
    import flashcore.integrations.transformers  # noqa: F401  registers its attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for (model, dtype), group in groupby(cases, key=lambda case: (case.model, case.dtype)):
        group = list(group)
        if device.type == "cpu" and model.parameters > CPU_PARAMETERS:
            reason = f"{model.parameters / 1e9:.1f} G parameters need a CUDA GPU"
            for case in group:
                yield case.name, [], [{"case": case.name, "reason": reason}]
            continue
        network = build(model, dtype, device)
        for case in group:
            on_case(case.name)
            rows, skipped = run_case(network, case, names, seed)
            yield case.name, rows, skipped
            network.zero_grad(set_to_none=True)
            _free_memory(device)
        del network
        _free_memory(device)


def build(model: Model, dtype: str, device: torch.device) -> torch.nn.Module:
    """The network, with random weights made on ``device``. It never ends a generation by itself."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=2**16,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )


def run_case(
    network: torch.nn.Module, case: ModelCase, names: Sequence[str], seed: int
) -> tuple[list[dict], list[dict]]:
    """Compare everybody's answers, then time in turns those that were right. Returns rows and who was left out."""
    device = network.device
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(case.model.vocab_size, (1, case.tokens), device=device, generator=generator)
    network.train(case.phase == "train")

    names, skipped = list(names), []
    if "eager" in names and (reason := _too_large(case, device)):
        names.remove("eager")
        skipped.append({"impl": "eager", "case": case.name, "reason": reason})
    rows = {name: {"op": "e2e", "impl": name, **case.fields()} for name in names}
    _compare(network, case, ids, rows)
    _time(network, case, ids, rows, seed)
    for name, row in rows.items():
        if "failed" not in row:
            try:
                row |= _share(network, case, ids, name)
                if case.phase == "generate":
                    row |= _pace(network, case, ids, row)
                if name == "flashcore":
                    row |= _plan(case, device)
            except Exception as error:
                _fail(row, f"while attention was watched: {_one_line(error)}")
    return list(rows.values()), skipped


# --- what is done with a network


def _prefill(network: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(ids, use_cache=True, logits_to_keep=1).logits


def _generate(network: torch.nn.Module, case: ModelCase, ids: torch.Tensor, **options):
    mask = torch.ones_like(ids)  # as tokenizers give it
    return network.generate(
        ids, attention_mask=mask, max_new_tokens=case.new_tokens, do_sample=False, use_cache=True, **options
    )


def _train(network: torch.nn.Module, ids: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    network(ids, labels=ids, use_cache=False).loss.backward()


def _call(network: torch.nn.Module, case: ModelCase, ids: torch.Tensor) -> Callable[[], object]:
    """What is timed."""
    return {
        "prefill": lambda: _prefill(network, ids),
        "generate": lambda: _generate(network, case, ids),
        "train": lambda: _train(network, ids),
    }[case.phase]


@contextmanager
def _attending(network: torch.nn.Module, name: str, attention: str | None = None) -> Iterator[None]:
    """The network attends by implementation ``name``."""
    network.set_attn_implementation(attention or ATTENTION[name])
    with PEERS[name].context():
        yield


# --- is it right?


@dataclass(frozen=True)
class Answer:
    values: torch.Tensor  # logits (steps, vocab_size) or gradients (elements,), float32
    tokens: torch.Tensor | None = None  # that were generated, (steps,)

    def compared_with(self, reference: Answer) -> dict:
        """The columns ``rel_err`` and, for generated tokens, how many there are before the first other one."""
        values, expected, found = self.values, reference.values, {}
        if self.tokens is not None:
            differs = (self.tokens != reference.tokens).nonzero()
            equal = int(differs[0]) if len(differs) else len(self.tokens)
            found["tokens_equal"] = equal
            values, expected = values[: equal + 1], expected[: equal + 1]  # after that the inputs are others
        return {"rel_err": ((values - expected).norm() / expected.norm()).item(), **found}


def _ask(network: torch.nn.Module, case: ModelCase, ids: torch.Tensor) -> Answer:
    if case.phase == "prefill":
        return Answer(_prefill(network, ids)[0].float())
    if case.phase == "generate":
        said = _generate(network, case, ids, return_dict_in_generate=True, output_logits=True)
        return Answer(torch.cat(said.logits).float(), said.sequences[0, case.tokens :])
    _train(network, ids)
    first = network.model.layers[0].self_attn
    weights = (first.q_proj.weight, first.k_proj.weight, first.v_proj.weight)
    return Answer(torch.cat([weight.grad.flatten().float() for weight in weights]))


def _compare(network: torch.nn.Module, case: ModelCase, ids: torch.Tensor, rows: dict[str, dict]) -> None:
    """Fill in the errors, the peak memory, and who failed."""
    reference, measure = None, None  # an answer, and another one's distance from it
    for name in sorted(
        rows, key=lambda name: REFERENCES.index(name) if name in REFERENCES else len(REFERENCES)
    ):
        row = rows[name]
        _free_memory(ids.device)
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            with _attending(network, name), warnings.catch_warnings():
                warnings.filterwarnings("error", NOT_OURS, FlashCoreWarning)
                answer = _ask(network, case, ids)
        except Exception as error:  # one that breaks must not end the run of the others
            row |= {"failed": _one_line(error)}
            continue
        if ids.is_cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if bad := int((~torch.isfinite(answer.values)).sum()):
            row |= {"failed": f"{bad} values are NaN or Inf"}
        elif reference is not None:
            row |= answer.compared_with(reference)
            if name not in OURS:
                measure = row["rel_err"] if measure is None else measure
            elif measure is not None:
                rounding = torch.finfo(getattr(torch, case.dtype)).eps
                limit = check.FACTOR * max(measure, rounding)
                if row["rel_err"] > limit:
                    row |= {"failed": f"rel_err {row['rel_err']:.3g}, allowed {limit:.3g}"}
        elif name in REFERENCES:
            reference = answer
            row["reference"] = True


# --- how fast is it?


def _time(network: torch.nn.Module, case: ModelCase, ids: torch.Tensor, rows: dict[str, dict], seed: int) -> None:
    """Fill in the times of those that were right, in turns."""
    call = _call(network, case, ids)
    names = [name for name, row in rows.items() if "failed" not in row]
    rounds: dict[str, list[list[float]]] = {name: [] for name in names}
    for order in timing.orders(names, case.turns, seed, case.name):
        for name in order:
            if "failed" in rows[name]:
                continue
            try:
                with _attending(network, name):
                    for _ in range(case.lead_ins):
                        call()
                    rounds[name].append([_milliseconds(call, ids.device) for _ in range(case.calls)])
            except Exception as error:
                _fail(rows[name], f"while it was timed: {_one_line(error)}")
    for name in names:
        if "failed" not in rows[name]:
            rows[name] |= timing.summarize(rounds[name])
            rows[name]["tokens_per_s"] = 1e3 * case.counted / rows[name]["ms_p50"]


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start)


class Stopwatch:
    """Marks on the device's time line, in pairs: the start and the end of something."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Between the marks of each pair, all together. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(a.elapsed_time(b) if self._on_gpu else 1e3 * (b - a) for a, b in pairs)


class _Enter(torch.autograd.Function):
    """q, k, v as they are. Attention starts here, and ends here on the way back."""

    @staticmethod
    def forward(ctx, watch, *tensors):
        ctx.watch = watch
        watch.mark()
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.watch.mark()
        return None, *grads


class _Leave(torch.autograd.Function):
    """out as it is. Attention ends here, and starts here on the way back."""

    @staticmethod
    def forward(ctx, watch, out):
        ctx.watch = watch
        watch.mark()
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        ctx.watch.mark()
        return None, grad


@contextmanager
def watched(network: torch.nn.Module, name: str) -> Iterator[Stopwatch]:
    """The network attends by implementation ``name``, and the stopwatch runs whenever it does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    attention = ATTENTION[name]
    attend = AttentionInterface().get_interface(attention, eager_attention_forward)
    watch = Stopwatch(network.device)

    def forward(module, query, key, value, *args, **kwargs):
        query, key, value = _Enter.apply(watch, query, key, value)
        out, weights = attend(module, query, key, value, *args, **kwargs)
        return _Leave.apply(watch, out), weights

    AttentionInterface.register(WATCHED, forward)
    AttentionMaskInterface.register(WATCHED, AttentionMaskInterface()[attention])
    with _attending(network, name, WATCHED):
        yield watch


def _share(network: torch.nn.Module, case: ModelCase, ids: torch.Tensor, name: str) -> dict:
    """Attention's milliseconds of the device's time, and its share: of a whole call, or of one decoding step."""
    call = _call(network, case, ids)
    if case.phase == "generate":
        with _attending(network, name):
            call = _decoding_step(network, ids)
    total = Stopwatch(ids.device)
    with watched(network, name) as attention:
        for _ in range(case.lead_ins):  # where cuDNN plans for the strides that gradients have here
            call()
        attention.marks.clear()
        _synchronize(ids.device)
        if ids.is_cuda:
            torch.cuda._sleep(LEAD_CYCLES)
        total.mark()
        call()
        total.mark()
        attention_ms, total_ms = attention.milliseconds(), total.milliseconds()
    return {
        "attention_ms": attention_ms,
        "attention_pct": 100 * attention_ms / total_ms,
        **({"step_device_ms": total_ms} if case.phase == "generate" else {}),
    }


def _pace(network: torch.nn.Module, case: ModelCase, ids: torch.Tensor, row: dict) -> dict:
    """Of a generation that took ``ms_p50``: the time to its first token, then per token, and who sets that pace."""
    first = replace(case, new_tokens=1)
    with _attending(network, row["impl"]):
        first_ms = _milliseconds(lambda: _generate(network, first, ids), ids.device)
    token_ms = (row["ms_p50"] - first_ms) / (case.new_tokens - 1)
    launch_bound = row["step_device_ms"] < LAUNCH_BOUND * token_ms
    return {"first_token_ms": first_ms, "token_ms": token_ms, "launch_bound": launch_bound}


@torch.no_grad()
def _decoding_step(network: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """A step behind the prompt and two steps more."""
    cache = network(ids, use_cache=True, logits_to_keep=1).past_key_values
    step = torch.no_grad()(lambda: network(ids[:, -1:], past_key_values=cache, use_cache=True))
    step()
    step()
    return step


def _plan(case: ModelCase, device: torch.device) -> dict:
    """What FlashCore's plan chose for a layer: in generation, for a step."""
    import flashcore

    model, train = case.model, case.phase == "train"
    step = case.phase == "generate"

    def empty(seqlen: int, heads: int) -> torch.Tensor:
        shape = (1, seqlen, heads, model.head_dim)
        return torch.empty(shape, dtype=getattr(torch, case.dtype), device=device, requires_grad=train)

    keys = case.tokens + step
    q, k, v = (
        empty(1 if step else keys, model.heads),
        empty(keys, model.kv_heads),
        empty(keys, model.kv_heads),
    )
    plan = flashcore.explain(q, k, v, causal=not step)
    found = {"backend": plan.backend}
    if plan.config is not None:
        found["config"] = str(plan.config)
    return found | ({"backward": plan.backward.backend} if train else {})


def _too_large(case: ModelCase, device: torch.device) -> str | None:
    """Why attention that keeps its scores does not fit."""
    memory = _memory(device)
    if memory is None or case.eager_bytes <= 0.9 * memory:
        return None
    return f"it keeps its scores: about {case.eager_bytes / 2**30:.0f} GiB of {memory / 2**30:.0f}"


def _memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _fail(row: dict, reason: str) -> None:
    """A row that failed has no number that could be taken for a result."""
    for key in ("ms_p50", "ms_p10", "ms_p90", "std_pct", "samples", "tokens_per_s"):
        row.pop(key, None)
    row["failed"] = reason


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free_memory(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
