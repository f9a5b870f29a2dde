"""The whole models that FlashCore is measured inside of, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass

LAUNCH_BOUND = 0.8  # of a token's time: a device that works for less of it waits for the host


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama kind, by its shapes."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return 2 * self.vocab_size * self.hidden_size + self.layers * layer + self.hidden_size


@dataclass(frozen=True)
class ModelCase:
    """One thing done with a model; batch 1.

    ``prefill``: logits of the last of `tokens`, the cache filled. ``generate``: `new_tokens` greedily after a prompt of
    `tokens`. ``train``: loss and gradients of all parameters over `tokens`.
    """

    model: Model
    phase: str
    tokens: int
    new_tokens: int = 0
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.model.name}-{self.phase}-{self.tokens}"

    @property
    def counted(self) -> int:
        """Tokens that count for tokens/s."""
        return self.new_tokens if self.phase == "generate" else self.tokens

    @property
    def turns(self) -> int:
        """Rounds in which implementations take turns."""
        return 3 if self.tokens <= 4096 else 2

    @property
    def calls(self) -> int:
        """Timed calls in a turn."""
        return 1 if self.phase == "generate" else max(1, 6144 // self.tokens)

    @property
    def lead_ins(self) -> int:
        """Untimed calls at the start of a turn; a generation or a call of 32,768 tokens is long enough without."""
        return int(self.phase != "generate" and self.tokens <= 8192)

    @property
    def eager_bytes(self) -> int:
        """About what the case needs where attention keeps its scores.

        A score takes up to 8 bytes in the layer at work (half precision before and after an fp32 softmax). Training
        keeps 6 of every layer, and the other activations; and a gradient beside each weight.
        """
        model, weights = self.model, 2 * self.model.parameters
        scores = model.heads * self.tokens**2
        if self.phase != "train":
            return weights + 8 * scores
        activations = self.tokens * (8 * model.intermediate_size + 40 * model.hidden_size)
        return 2 * weights + 8 * scores + model.layers * (6 * scores + activations)

    def fields(self) -> dict:
        """The columns that identify this case in a recorded row."""
        return {
            "model": self.model.name,
            "phase": self.phase,
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "dtype": self.dtype,
        }


MODELS = (
    Model("llama2-7b", 32000, 4096, 11008, 32, 32, 32),
    Model("llama3-8b", 128256, 4096, 14336, 32, 32, 8),
)
E2E = tuple(
    ModelCase(model, phase, tokens, new_tokens)
    for model in MODELS
    for phase, tokens, new_tokens in (
        ("prefill", 2048, 0),
        ("prefill", 8192, 0),
        ("prefill", 32768, 0),
        ("generate", 2048, 128),
        ("train", 4096, 0),
    )
)
