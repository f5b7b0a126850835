"""Protects: the Triton kernels of experts compute the mixture that each token asks for, whatever is beside it."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import torch
from torch.nn.functional import silu
from engine.kernels.grouped import kernel
from engine.kernels.grouped.gating import Gating
from engine.kernels.grouped.matrices import Matrices
from engine.kernels.grouped.stack import Stack

def few(numbers, at_once):
    # As codes are expanded: what was taken before is gone.
    scratch = torch.empty_like(numbers[:at_once])
    def take(first, end):
        return scratch.fill_(torch.nan)[: end - first].copy_(numbers[first:end])
    return Stack(numbers.shape, numbers.dtype, at_once, take)

torch.manual_seed(0)
count, width, inner, choices, tokens = 5, 70, 40, 2, 20
halves = lambda x: silu(x[:, :inner].clamp(max=1.5)) * x[:, inner:].clamp(-1.5, 1.5)
pairs = lambda x: x[:, ::2] * torch.sigmoid(1.7 * x[:, ::2]) * (x[:, 1::2] + 1)
others = lambda x: x[:, ::2].relu() * x[:, 1::2]
cases = (halves, Gating(False, 1.5), True), (pairs, Gating(True, alpha=1.7), True), (others, None, False)
for activation, gating, has_bias in cases:
    first, second = torch.randn(count, 2 * inner, width).half() / 8, torch.randn(count, inner, width).half() / 8
    biases = (torch.randn(count, 2 * inner).half(), torch.randn(count, width).half()) if has_bias else (None, None)
    matrices = Matrices(few(first, 2).mT, few(second, 1 if has_bias else count), *biases, activation, gating)
    hidden = torch.randn(tokens, width).half()
    # The last token chose one expert that there is not, as some families say "none"; nobody chose expert 3.
    index = torch.stack([torch.randperm(4)[:choices] for _ in range(tokens)])
    index[index == 3] = 4
    index[-1, 1] = count
    weights = torch.rand(tokens, choices).to(torch.float32 if has_bias else torch.float16)
    expected = torch.zeros(tokens, width, dtype=torch.double)
    for token in range(tokens):
        for choice, weight in zip(index[token].tolist(), weights[token].double()):
            if choice < count:
                between = hidden[token].double() @ first[choice].double().T
                between = activation((between + (biases[0][choice] if has_bias else 0))[None])
                out = (between @ second[choice].double())[0] + (biases[1][choice] if has_bias else 0)
                expected[token] += weight * out
    whole = slice(0, tokens)
    for taken, tiles in ((whole, kernel._TILES), (slice(7, 19), kernel._TILES), (slice(0, 1), ())):
        kernel._TILES = tiles
        kernel._sizes.cache_clear()
        found = kernel.mixture(matrices, hidden[taken], index[taken], weights[taken])
        torch.testing.assert_close(found.double(), expected[taken], rtol=5e-3, atol=5e-3)
    counts = index[:1].flatten().bincount(minlength=count).tolist()  # groups without rows are left out
    assert kernel.mixture(matrices, hidden[:1], index[:1], weights[:1], counts).equal(found)
    kernel._TILES = ((16, 16, 64, 4, 5),)
    print("right")
"""


def test_the_kernels_mix_experts_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["right"] * 3
