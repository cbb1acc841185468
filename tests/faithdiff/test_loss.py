"""The training objective against one executed step of the released script, and the promises of its random draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from faithdiff.checkpoint import load_released, save_released
from faithdiff.encoder import LQEncoder
from faithdiff.loss import FaithDiffForTraining, NoiseDraws, denoising_loss, noise_for, trained_parameters
from faithdiff.schedule import add_noise, alphas_cumprod
from faithdiff.unet import FaithDiffUNet

SDXL_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def step(golden, golden_weight):
    """One forward and backward pass of the golden step: (case, model, noisy latents, prediction, loss)."""
    case = golden("case07_training_loss")
    unet = FaithDiffUNet.from_config(case.about["unet_config"], lq_channels=512, alignment_attention="value")
    lq_encoder = LQEncoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in save_released(unet, lq_encoder).items()}
    load_released(unet, lq_encoder, {name: golden_weight(name, shape) for name, shape in shapes.items()})
    model = FaithDiffForTraining(unet, lq_encoder, alphas_cumprod(SDXL_SCHEDULE)).train()
    trained_parameters(model, "unified")
    draws = NoiseDraws(case["s0_timesteps"], case["s0_noise"], torch.zeros_like(case["s0_noise"]))
    conditions = {
        "lq": case["batch_lq_images"][:1],
        "prompt_embeds": case["s0_text_embeds"],
        "pooled_prompt_embeds": case["s0_pooled_text_embeds"],
        "time_ids": case["s0_add_time_ids"],
    }
    noisy_latents = add_noise(case["s0_latents"], draws.noise, draws.timesteps, alphas_cumprod(SDXL_SCHEDULE))
    with torch.no_grad():
        noise_pred = model.predict_noise(noisy_latents, draws.timesteps, **conditions)
    loss = model(case["s0_latents"], draws, conditions)
    loss.backward()
    return case, model, noisy_latents, noise_pred, loss


def test_noisy_latents_and_prediction_equal_the_released_ones(step, rel_error) -> None:
    case, _, noisy_latents, noise_pred, _ = step
    assert rel_error(noisy_latents, case["s0_noisy_latents"]) < TOLERANCE
    assert rel_error(noise_pred, case["s0_noise_pred"]) < TOLERANCE


def test_the_loss_is_the_mean_absolute_error_on_the_noise_with_its_offset(step) -> None:
    case, *_, loss = step
    assert loss.item() == pytest.approx(case.about["scalars"]["s0"]["loss"], rel=TOLERANCE)


def test_gradients_equal_the_released_ones(step, rel_error) -> None:
    case, model, *_ = step
    # `save_released` names tensors; run on the gradients it names those.
    parameters = {p.data_ptr(): p for p in model.parameters()}
    named = {name: parameters[t.data_ptr()] for name, t in save_released(model.unet, model.lq_encoder).items()}
    golden_names = [key.removeprefix("s0_grad:") for key in case if key.startswith("s0_grad:")]
    errors = {name: rel_error(named[name].grad, case[f"s0_grad:{name}"]) for name in golden_names}
    assert len(errors) == 8
    assert max(errors.values()) < TOLERANCE, errors


def test_gradient_norms_of_every_part_equal_the_released_ones(step) -> None:
    case, model, *_ = step
    squares: dict[str, float] = {"encoder": 0.0, "alignment": 0.0, "unet": 0.0}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        part = "encoder" if name.startswith("lq_encoder.") else "unet"
        part = "alignment" if name.startswith("unet.alignment.") else part
        squares[part] += parameter.grad.double().square().sum().item()
    norms = {part: square**0.5 for part, square in squares.items()} | {"total": sum(squares.values()) ** 0.5}
    assert norms == pytest.approx(case.about["scalars"]["s0"]["grad_norms"], rel=TOLERANCE)


def test_stage_one_trains_the_alignment_module_alone(step) -> None:
    _, model, *_ = step
    names = trained_parameters(model, "align")
    assert names
    assert all(name.startswith("unet.alignment.") for name in names)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 10_608_512
    unified = trained_parameters(model, "unified")
    assert unified == [name for name, _ in model.named_parameters()]


def test_draws_of_a_sample_do_not_depend_on_its_batch() -> None:
    together = noise_for(7, [40, 41, 42], (4, 8, 8))
    alone = noise_for(7, [41], (4, 8, 8))
    for name in ("timesteps", "noise", "posterior_noise"):
        torch.testing.assert_close(getattr(together, name)[1:2], getattr(alone, name), rtol=0, atol=0)
    other_seed = noise_for(8, [41], (4, 8, 8))
    assert not torch.equal(other_seed.noise, alone.noise)


def test_noise_is_standard_normal_plus_an_offset_per_channel() -> None:
    samples, shape = list(range(400)), (4, 16, 16)
    without = noise_for(0, samples, shape, noise_offset=0.0).noise
    offset = noise_for(0, samples, shape, noise_offset=0.02).noise - without
    assert without.std().item() == pytest.approx(1.0, abs=0.005)
    assert without.mean().item() == pytest.approx(0.0, abs=0.005)
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)


def test_timesteps_are_uniform_over_the_whole_schedule() -> None:
    timesteps = noise_for(1, list(range(20_000)), (4, 1, 1)).timesteps.numpy()
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts, _ = np.histogram(timesteps, bins=10, range=(0, 1000))
    assert counts.min() > 1800
    assert counts.max() < 2200


def test_the_loss_is_computed_in_fp32_for_half_precision_predictions() -> None:
    noise = torch.linspace(-3, 3, 4096)
    loss = denoising_loss(noise.bfloat16(), noise)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((noise.bfloat16().float() - noise).abs().mean().item(), rel=1e-6)
