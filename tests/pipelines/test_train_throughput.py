from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from faithdiff.loss import FaithDiffForTraining, trained_parameters
from faithdiff.nano import NANO_PATH
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.schedule import alphas_cumprod
from pipelines.training.memory_probe import random_inputs
from pipelines.training.throughput import flops_per_sample, measured_peak_flops


class Net(nn.Module):
    """A convolution and a linear layer, with the losses of their samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, pictures: Tensor) -> Tensor:
        losses: Tensor = self.linear(self.conv(pictures).mean(dim=(2, 3))).sum(dim=1)
        return losses


CONV, LINEAR = 2 * 16 * 16 * 8 * 3 * 9, 2 * 8 * 5


def test_operations_are_those_of_the_formulas() -> None:
    net, pictures = Net(), torch.zeros(4, 3, 16, 16)
    # Backward: gradients of both weights and of the linear layer's input; nobody wants those of the pictures.
    assert flops_per_sample(net, (pictures,)) == 2 * CONV + 3 * LINEAR
    net.conv.requires_grad_(False)
    assert flops_per_sample(net, (pictures,)) == CONV + 2 * LINEAR
    assert net.linear.weight.grad is None
    assert net.linear.weight.device.type == "cpu"


def test_stage_align_costs_less_than_unified_and_more_than_its_forward_pass() -> None:
    pipeline = FaithDiffPipeline.from_pretrained(NANO_PATH)
    module = FaithDiffForTraining(pipeline.unet, pipeline.lq_encoder, alphas_cumprod(pipeline.scheduler.config))
    inputs = random_inputs(module, 1, size_px=64, device=torch.device("cpu"))
    trained_parameters(module, ("alignment",))
    align = flops_per_sample(module, inputs)
    trained_parameters(module, ("alignment", "lq_encoder", "unet"))
    unified = flops_per_sample(module, inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pipeline.lq_encoder(inputs[2]["lq"])
    encoder = counter.get_total_flops()
    # The frozen encoder runs forward only; of the UNet's three passes the one for its weights is left out.
    assert encoder < align < (unified - 3 * encoder) * 0.7 + encoder
    # Recomputing is no progress.
    pipeline.unet.enable_gradient_checkpointing()
    assert flops_per_sample(module, inputs) == unified
    assert pipeline.unet.is_gradient_checkpointing


def test_the_measured_peak_is_above_what_one_product_reaches() -> None:
    peak = measured_peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < peak < 1e14
    assert measured_peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(peak, rel=0.9)
