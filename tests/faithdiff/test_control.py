"""The control branch: nothing until trained, then a modulation of a UNet that itself stays fixed."""

from __future__ import annotations

import pytest
import torch

from faithdiff.control import ControlBranch, FeatureTransform
from faithdiff.unet import FaithDiffUNet


@pytest.fixture
def controlled(nano):
    """A UNet with a branch like its own blocks, and the same UNet without."""
    unet = FaithDiffUNet.from_config(nano.unet.config, has_control=True)
    unet.load_state_dict(nano.unet.state_dict(), strict=False)
    plain = FaithDiffUNet.from_config(nano.unet.config)
    plain.load_state_dict(nano.unet.state_dict())
    return unet.eval(), plain.eval()


def inputs(height=8, width=8, rows=2):
    seeded = torch.Generator().manual_seed(height * width)
    shapes = {"sample": (rows, 4, height, width), "encoder_hidden_states": (rows, 77, 96)}
    tensors = {name: torch.randn(shape, generator=seeded) for name, shape in shapes.items()}
    added = {"text_embeds": torch.randn(rows, 64, generator=seeded), "time_ids": torch.full((rows, 6), 512.0)}
    lq_features = torch.randn(rows, 64, height, width, generator=seeded)
    return tensors | {"timestep": torch.tensor([501, 17]), "added_cond_kwargs": added}, lq_features


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 6)])
def test_an_untrained_branch_leaves_the_plain_unet_bit_for_bit(controlled, height, width):
    unet, plain = controlled
    given, lq_features = inputs(height, width)
    assert torch.equal(unet(**given, lq_features=lq_features).sample, plain(**given).sample)


@torch.no_grad()
def test_a_trained_branch_passes_the_lq_features_on_and_is_off_without_them(controlled):
    unet, plain = controlled
    for transform in [*unet.control.skip_sft, unet.control.mid_sft]:
        torch.nn.init.normal_(transform.scale.weight, std=0.1)
        torch.nn.init.normal_(transform.shift.weight, std=0.1)
    given, lq_features = inputs()
    first, second = (unet(**given, lq_features=features).sample for features in (lq_features, lq_features.flip(0)))
    assert not torch.allclose(first, second, rtol=1e-3)
    assert torch.equal(unet(**given).sample, plain(**given).sample)


def test_every_skip_and_the_middle_are_modulated_at_their_own_width(controlled):
    control = controlled[0].control
    widths = [transform.scale.in_channels for transform in control.skip_sft]
    assert widths == [32, 32, 32, 64, 64, 96]  # the entrance; resnet and down-sampler of two blocks, resnet of the last
    assert control.mid_sft.scale.in_channels == 96


def test_the_branch_has_weights_of_its_own(nano):
    branch = ControlBranch(nano.unet.down_blocks, nano.unet.mid_block, 32)
    theirs = nano.unet.state_dict()
    copied = {name: tensor for name, tensor in branch.state_dict().items() if not name.split(".")[0].endswith("_sft")}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in copied.items())
    assert all(tensor.data_ptr() != theirs[name].data_ptr() for name, tensor in copied.items())


def test_feature_transform_scales_and_shifts():
    transform = FeatureTransform(1)
    torch.nn.init.ones_(transform.scale.weight)
    torch.nn.init.constant_(transform.shift.bias, 5.0)
    hidden, condition = torch.tensor(3.0).view(1, 1, 1, 1), torch.tensor(2.0).view(1, 1, 1, 1)
    assert transform(hidden, condition).item() == 3 + (3 * 2 + 5)
