"""Without a GPU these tests run the kernels in Triton's interpreter; with one, they run them compiled.

Triton decides when it is first imported. So it is imported here, while tests are collected, with TRITON_INTERPRET set.
The backend agrees to that for the tests of this folder only, so that for all others it stays unavailable.
"""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch

import flashcore.backends.triton

INTERPRET = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(flashcore.backends.triton, "INTERPRETER_IS_MENDED", True)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRET else "cuda"


def mend(interpreter, tl) -> None:
    """Five things about the interpreter of Triton 3.6 that would keep these tests from being true, or short."""
    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot
    convert_float = interpreter._convert_float
    known = set()

    def patch_tensor_and_index(tensor, scope):
        """Under NumPy 2.4 a scalar, which the interpreter holds as an array of one element, is no loop bound."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def create_float_dot(self, a, b, *args):
        """It takes the bits of bfloat16 matrices for integers; and NumPy is slow unless matrices are float32."""
        a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return create_dot(self, a, b, *args)

    def create_fused_multiply_add(self, x, y, z):
        """It rounds the product."""
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def round_to_nearest(values, source, target, rounding):
        """It truncates to bfloat16, where GPUs round to the nearest, ties to even."""
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
        return convert_float(values, source, target, rounding)

    def call(self, *args, **kwargs):
        """It patches the whole language again at each call of a device function: most of its time."""
        if self.fn not in known:
            interpreter._patch_lang(self.fn)
            known.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = create_float_dot
    interpreter.InterpreterBuilder.create_fma = create_fused_multiply_add
    interpreter._convert_float = round_to_nearest
    interpreter.InterpretedFunction.__call__ = call


if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language
        import triton.runtime.interpreter

        importlib.import_module("flashcore.backends.triton.attention")
    finally:
        del os.environ["TRITON_INTERPRET"]
    mend(triton.runtime.interpreter, triton.language)
