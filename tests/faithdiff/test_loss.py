"""The training objective against one executed step of the released script, and the promises of its random draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from faithdiff.checkpoint import load_released, save_released
from faithdiff.encoder import LQEncoder
from faithdiff.errors import InputError
from faithdiff.loss import FaithDiffForTraining, NoiseDraws, denoising_losses, noise_for, trained_parameters
from faithdiff.pipeline import FaithDiffPipeline
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
    model = FaithDiffForTraining(unet, lq_encoder, alphas_cumprod(SDXL_SCHEDULE))
    trained_parameters(model, ("alignment", "lq_encoder", "unet"))
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
    loss = model(case["s0_latents"], draws, conditions).mean()
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
    names = trained_parameters(model, ("alignment",))
    assert names
    assert all(name.startswith("unet.alignment.") for name in names)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 10_608_512
    unified = trained_parameters(model, ("alignment", "lq_encoder", "unet"))
    assert unified == [name for name, _ in model.named_parameters()]


@pytest.fixture
def tiny() -> FaithDiffForTraining:
    pipe = FaithDiffPipeline.from_pretrained("nano")
    return FaithDiffForTraining(pipe.unet, pipe.lq_encoder, alphas_cumprod(pipe.scheduler.config))


def losses_of(model: FaithDiffForTraining, samples: list[int]) -> torch.Tensor:
    """Losses of samples whose latents, pictures and text all follow from their numbers."""
    seeded = [torch.Generator().manual_seed(sample) for sample in samples]
    draw = lambda *shape: torch.stack([torch.randn(shape, generator=g) for g in seeded])  # noqa: E731
    latents = draw(4, 8, 8)
    conditions = {"lq": draw(3, 64, 64).clamp(-1, 1), "prompt_embeds": draw(77, 96), "pooled_prompt_embeds": draw(64)}
    conditions["time_ids"] = torch.full((len(samples), 6), 512.0)
    return model(latents, noise_for(0, samples, (4, 8, 8)), conditions)


@torch.no_grad()
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(tiny) -> None:
    together, alone = losses_of(tiny, [3, 4, 5]), [losses_of(tiny, [sample]).item() for sample in (3, 4, 5)]
    assert together.shape == (3,)
    assert together.tolist() == pytest.approx(alone, rel=1e-6)


def test_frozen_parts_get_no_gradients_and_cost_no_weight_gradients(tiny) -> None:
    """Gradients reach the alignment module through the UNet at the price of a forward pass, weights would double it."""

    def flops(*parts: str) -> tuple[int, int, set[str]]:
        names = trained_parameters(tiny, parts)
        tiny.zero_grad()
        with FlopCounterMode(display=False) as forward:
            loss = losses_of(tiny, [0, 1]).mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        assert {name for name, p in tiny.named_parameters() if p.grad is not None} == set(names)
        return forward.get_total_flops(), backward.get_total_flops(), set(names)

    with FlopCounterMode(display=False) as of_encoder:
        tiny.lq_encoder(torch.zeros(2, 3, 64, 64))
    forward, backward, names = flops("alignment")
    forward_unet = forward - of_encoder.get_total_flops()
    assert all(name.startswith("unet.alignment.") for name in names)
    assert backward < forward_unet
    assert flops("alignment", "unet")[1] > 1.5 * forward_unet


def test_a_frozen_lq_encoder_builds_no_graph_and_a_trained_one_does(tiny) -> None:
    seen = []
    tiny.lq_encoder.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    tiny.lq_encoder.enable_gradient_checkpointing()
    for parts in (("alignment", "unet"), ("lq_encoder",)):
        trained_parameters(tiny, parts)
        losses_of(tiny, [0]).mean().backward()
    assert seen == [False, True]


def test_parts_are_split_by_owner_and_absent_ones_are_refused(tiny) -> None:
    names = {part: set(trained_parameters(tiny, (part,))) for part in ("alignment", "lq_encoder", "unet")}
    assert sum(len(part) for part in names.values()) == len(set().union(*names.values()))
    assert set().union(*names.values()) == {name for name, _ in tiny.named_parameters()}
    for part in ("control", "vae"):
        with pytest.raises(InputError, match=f"no {part}; its parts are alignment, lq_encoder, unet"):
            trained_parameters(tiny, (part,))


def test_a_module_for_training_is_in_train_mode(tiny) -> None:
    assert all(module.training for module in tiny.modules())


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


def test_losses_are_the_mean_of_each_sample_in_fp32_for_half_precision_predictions() -> None:
    noise = torch.linspace(-3, 3, 4096).reshape(2, 4, 32, 16)
    losses = denoising_losses(noise.bfloat16(), noise)
    assert (losses.dtype, losses.shape) == (torch.float32, (2,))
    expected = [(one.bfloat16().float() - one).abs().mean().item() for one in noise]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
