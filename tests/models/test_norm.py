from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp_cls.models.norm import (
    LocalResponseNorm,
    across_channels,
    make_norm,
    mean_in_window,
    sum_over_channels,
    within_channel,
)

KINDS = [within_channel, across_channels]
Kind = Callable[[], LocalResponseNorm]


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Maps as large as those of pixels 0–255, where the norm acts."""
    return 200 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def reference(kind: Kind, x: Tensor) -> Tensor:
    """The plain formula, in the precision of `x`."""
    if kind is within_channel:  # Caffe: x / (1 + α · mean over 3 × 3)^β, the zeros outside counted
        return x / (1 + 5e-5 * F.avg_pool2d(x * x, 3, 1, 1)) ** 0.75
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)(x)  # torch divides alpha by size


def test_within_channel_by_hand() -> None:
    norm = LocalResponseNorm(mean_in_window, 3, alpha=9.0, beta=1.0, k=1.0, halo=1)
    x = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]])  # the sum of squares in every window is 14, its mean 14/9
    torch.testing.assert_close(norm(x), x / 15)


def test_across_channels_by_hand() -> None:
    norm = LocalResponseNorm(sum_over_channels, 3, alpha=1.0, beta=1.0, k=2.0, halo=0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    expected = torch.tensor([1 / (2 + 5), 2 / (2 + 14), 3 / (2 + 29), 4 / (2 + 25)]).view(1, 4, 1, 1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_formula_forward_and_backward(kind: Kind) -> None:
    x = pixels(2, 9, 7, 5, dtype=torch.float64).requires_grad_()
    grad = torch.randn(2, 9, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, expected = kind()(x), reference(kind, x)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    (ours,) = torch.autograd.grad(out, x, grad)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float(((value.double() - exact) / exact).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_exact_as_the_plain_formula(kind: Kind) -> None:
    x = pixels(2, 32, 20, 20)
    exact = reference(kind, x.double())
    ours, theirs = relative_error(kind()(x), exact), relative_error(reference(kind, x), exact)
    assert ours <= 2 * theirs
    assert ours < 1e-6


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
@pytest.mark.parametrize(("neighbours", "size"), [(mean_in_window, 3), (sum_over_channels, 5), (sum_over_channels, 1)])
def test_gradcheck(neighbours: Callable[[Tensor, int], Tensor], size: int, beta: float) -> None:
    norm = LocalResponseNorm(neighbours, size, alpha=0.3, beta=beta, k=1.5, halo=size // 2)
    x = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_fewer_channels_than_neighbours(channels: int) -> None:
    x = pixels(1, channels, 2, 2)
    for size in (3, 5, 7, 9):
        norm = LocalResponseNorm(sum_over_channels, size, alpha=1e-4, beta=0.75, k=2.0, halo=0)
        expected = nn.LocalResponseNorm(size, alpha=size * 1e-4, beta=0.75, k=2)(x)
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_the_float32_result_rounded(kind: Kind) -> None:
    x = pixels(2, 16, 9, 9).bfloat16().requires_grad_()
    full = x.detach().float().requires_grad_()
    out, expected = kind()(x), kind()(full)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    grad = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(grad)
    expected.backward(grad.float())
    assert x.grad is not None and full.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, full.grad.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(kind: Kind, dtype: torch.dtype) -> None:
    x = pixels(2, 16, 9, 9).to(dtype).requires_grad_()
    expected = kind()(x)
    (gradient,) = torch.autograd.grad(expected.float().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        out = kind()(x)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    (under_autocast,) = torch.autograd.grad(out.float().sum(), x)
    assert torch.equal(under_autocast, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_stays(kind: Kind) -> None:
    x = pixels(2, 16, 9, 7)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    out = kind()(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, kind()(x), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(out, last, torch.ones_like(out))
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_left_alone_and_an_exporter_sees_the_same(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels(1, 8, 5, 5)
    before, out = x.clone(), kind()(x)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(kind()(x), out)
    assert torch.equal(x, before)


def test_an_even_size_is_refused() -> None:
    with pytest.raises(ValueError, match="^size=4: .*use an odd number$"):
        LocalResponseNorm(sum_over_channels, 4, alpha=1e-4, beta=0.75, k=2.0, halo=0)


def test_repr_says_the_numbers() -> None:
    assert repr(within_channel()) == "LocalResponseNorm(mean_in_window, size=3, alpha=5e-05, beta=0.75, k=1.0)"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_however_large_a_block_is_the_bits_are_the_same(
    kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = pixels(3, 8, 11, 6).to(dtype).requires_grad_()
    grad = pixels(3, 8, 11, 6).flip(0).to(dtype)
    found = []
    for block in (10**9, 2 * 8 * 11 * 6, 8 * 6 * 4, 1):  # all images, two of them, four rows, one row
        monkeypatch.setattr("spp_cls.models.norm.BLOCK", block)
        out = kind()(x)
        found.append((out, *torch.autograd.grad(out, x, grad)))
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiler_sees_the_same(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels(2, 8, 11, 6).requires_grad_()
    grad = pixels(2, 8, 11, 6).flip(0)
    out = kind()(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = kind()(x)
    torch.testing.assert_close(compiled, out, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(compiled, x, grad)[0], dx, rtol=1e-5, atol=1e-5)


def test_nothing_but_the_input_is_kept_for_the_backward() -> None:
    x = pixels(1, 8, 5, 5).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        within_channel()(x)
    assert kept == [x.data_ptr()]


@pytest.mark.parametrize("constants", [None, {}, {"size": 3, "alpha": 5e-5, "beta": 0.75, "k": 1.0}])
def test_no_constants_are_the_kinds_own(constants: dict[str, float] | None) -> None:
    x = pixels(2, 9, 7, 5)
    assert torch.equal(make_norm("within_channel", constants)(x), within_channel()(x))
    assert isinstance(make_norm("none", None), nn.Identity)


def test_constants_of_caffe_across_channels() -> None:
    x = pixels(2, 9, 7, 5, dtype=torch.float64)
    caffe = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1)  # alpha over size, as Caffe
    torch.testing.assert_close(make_norm("across_channels", {"alpha": 2e-5, "k": 1.0})(x), caffe(x))
    torch.testing.assert_close(
        make_norm("across_channels", {"size": 9})(x), nn.LocalResponseNorm(9, alpha=9e-4, beta=0.75, k=2)(x)
    )


def test_a_wider_window_within_the_channel_has_a_wider_halo(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels(2, 4, 11, 7, dtype=torch.float64).requires_grad_()
    expected = x / (1 + 1e-3 * F.avg_pool2d(x * x, 5, 1, 2)) ** 0.5
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    norm = make_norm("within_channel", {"size": 5, "alpha": 1e-3, "beta": 0.5})
    for block in (10**9, 4 * 7 * 3):  # all at once, and three rows at a time
        monkeypatch.setattr("spp_cls.models.norm.BLOCK", block)
        out = norm(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], gradient)


@pytest.mark.parametrize(
    ("kind", "constants", "message"),
    [
        ("lrn", {}, r"^norm='lrn': use one of within_channel, across_channels, none$"),
        ("none", {"k": 1.0}, r"^norm_constants=.*: norm=none has none; choose a norm, or use null$"),
        ("within_channel", {"alfa": 1.0}, r"^norm_constants has 'alfa': use size, alpha, beta, k$"),
        ("within_channel", {"size": 4}, r"^norm_constants\.size=4: use an odd whole number of at least 1$"),
        ("within_channel", {"size": 3.5}, r"^norm_constants\.size=3\.5: use an odd whole number"),
        ("across_channels", {"alpha": -1.0}, r"^norm_constants\.alpha=-1\.0: use a number of at least 0$"),
        ("across_channels", {"k": 0}, r"^norm_constants\.k=0: use a number of at least 0\.001$"),
        ("across_channels", {"beta": "high"}, r"^norm_constants\.beta='high': use a number of at least 0$"),
    ],
)
def test_constants_that_are_refused(kind: str, constants: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_norm(kind, constants)
