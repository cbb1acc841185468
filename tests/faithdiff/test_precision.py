import pytest
import torch

from faithdiff.precision import as_float32, finite_or_float32


def test_a_module_is_fp32_inside_the_block_and_its_bits_return_after_it():
    module = torch.nn.Linear(3, 3).half()
    before = module.weight.clone()
    with as_float32(module):
        assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, before)


def test_a_module_converted_during_inference_can_still_be_trained():
    module = torch.nn.Linear(3, 3).to(torch.bfloat16)
    with torch.inference_mode(), as_float32(module):
        pass
    module(torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert module.weight.grad is not None


def test_what_overflows_half_precision_is_computed_in_fp32():
    module = torch.nn.Linear(4, 1, bias=False).half()
    torch.nn.init.constant_(module.weight, 6e4)
    picture = torch.full((1, 4), 2.0)
    result = finite_or_float32(module, lambda dtype: module(picture.to(dtype)), what="test")
    assert result.item() == pytest.approx(4 * 2 * module.weight[0, 0].item())
    assert module.weight.dtype == torch.float16


def test_a_finite_result_is_not_computed_twice():
    module, calls = torch.nn.Linear(2, 2).half(), []

    def compute(dtype):
        calls.append(dtype)
        return module(torch.ones(1, 2, dtype=dtype))

    finite_or_float32(module, compute, what="test")
    assert calls == [torch.float16]


def test_what_is_not_finite_in_fp32_either_is_an_error_and_never_a_black_picture():
    module = torch.nn.Linear(1, 1).half()
    with pytest.raises(FloatingPointError, match="vae decoder: the result is not finite"):
        finite_or_float32(module, lambda dtype: torch.full((1,), float("nan")), what="vae decoder")
