import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from faithdiff.errors import InputError
from faithdiff.schedule import EulerSchedule, add_noise, alphas_cumprod

SDXL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def test_twenty_euler_steps_are_those_of_the_released_code(golden):
    expected = golden("case08_tables").about["scheduler"]["euler20"]
    schedule = EulerSchedule.from_scheduler(EulerDiscreteScheduler(**SDXL), 20)
    assert schedule.timesteps.tolist() == expected["timesteps"]
    assert schedule.sigmas.tolist() == pytest.approx(expected["sigmas"], rel=1e-6)
    assert schedule.init_noise_sigma == pytest.approx(expected["init_noise_sigma"], rel=1e-6)


def test_alphas_are_those_of_the_released_code(golden):
    abar = alphas_cumprod(SDXL)
    for step, value in golden("case08_tables").about["scheduler"]["alphas_cumprod"].items():
        assert abar[int(step)].item() == pytest.approx(value, rel=1e-6)


def test_added_noise_is_that_of_ddpm():
    latents, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    expected = DDPMScheduler.from_config(SDXL).add_noise(latents, noise, timesteps)
    assert torch.allclose(add_noise(latents, noise, timesteps, alphas_cumprod(SDXL)), expected, atol=1e-6)


def test_euler_steps_walk_from_noise_to_the_picture_when_the_prediction_is_right():
    """With the true noise predicted at every step, the last latents are x_0 exactly."""
    schedule = EulerSchedule.from_scheduler(EulerDiscreteScheduler(**SDXL), 7)
    x0, noise = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    latents = x0 + schedule.sigmas[0] * noise
    for step in range(schedule.num_steps):
        latents = schedule.euler_step(latents, noise, step)
    assert torch.allclose(latents, x0, atol=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    with pytest.raises(InputError, match="1 to 1000"):
        EulerSchedule.from_scheduler(EulerDiscreteScheduler(**SDXL), steps)


def test_a_scheduler_that_does_not_predict_noise_is_refused():
    with pytest.raises(InputError, match="v_prediction"):
        EulerSchedule.from_scheduler(EulerDiscreteScheduler(**SDXL, prediction_type="v_prediction"), 4)
