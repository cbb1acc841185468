"""Every architecture of the ablations restores, trains, saves and loads; an untrained one changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from faithdiff.bundle import check_folder
from faithdiff.denoiser import advance
from faithdiff.errors import InputError
from faithdiff.loss import FaithDiffForTraining, noise_for, trained_parameters
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.request import RestorationRequest
from faithdiff.schedule import alphas_cumprod
from faithdiff.variants import with_architecture

ARCHITECTURES = [
    {"alignment": "sum", "features": "penultimate", "control": False},
    {"alignment": "transformer", "features": "last", "control": False},
    {"alignment": "transformer", "features": "penultimate", "control": True},
    {"alignment": "sum", "features": "last", "control": True},
]
MODELS = ("unet", "lq_encoder")


def name_of(architecture):
    return "-".join(str(value) for value in architecture.values())


@pytest.fixture(params=ARCHITECTURES, ids=name_of)
def architecture(request):
    return request.param


@pytest.fixture
def untrained(architecture):
    return with_architecture(FaithDiffPipeline.from_pretrained("nano"), **architecture)


@pytest.fixture
def variant(untrained):
    """As after training: what starts at zero has weights."""
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in untrained.unet.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=seeded))
    return untrained


def states(pipe):
    return {name: getattr(pipe, name).state_dict() for name in MODELS}


def assert_same_weights(first, second):
    for name in MODELS:
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in first[name].items()), name


@torch.no_grad()
def test_an_untrained_variant_predicts_as_the_plain_unet(untrained):
    plain = FaithDiffPipeline.from_pretrained("nano").unet
    seeded = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(shape, generator=seeded) for shape in ((2, 4, 8, 8), (2, 77, 96)))
    added = {"text_embeds": torch.randn(2, 64, generator=seeded), "time_ids": torch.full((2, 6), 512.0)}
    lq_features = untrained.lq_encoder(torch.rand(2, 3, 64, 64, generator=seeded))
    assert torch.equal(untrained.unet(sample, 9, text, added, lq_features).sample, plain(sample, 9, text, added).sample)


def test_a_saved_variant_loads_bit_equal_and_passes_the_check(variant, tmp_path, photograph):
    variant.save_pretrained(tmp_path / "model")
    check_folder(tmp_path / "model")
    loaded = FaithDiffPipeline.from_pretrained(tmp_path / "model")
    assert_same_weights(states(variant), states(loaded))
    rgb = photograph(40, 32)
    pictures = [np.asarray(pipe(rgb, 1, "a photo", num_inference_steps=2).image) for pipe in (variant, loaded)]
    assert np.array_equal(*pictures)


def canvas(pipe, rgb, **settings):
    request = RestorationRequest(scale=1, num_inference_steps=2, tile_px=64, tile_stride_px=32, **settings)
    return pipe.prepare(rgb, request).canvas


def run(pipe, *canvases, tiles_per_batch=4):
    while not all(one.is_done for one in canvases):
        advance(pipe.unet, canvases, tiles_per_batch=tiles_per_batch)
    return [one.latents for one in canvases]


def test_a_tiled_picture_of_a_variant_does_not_depend_on_its_company(variant, photograph, rel_error):
    crowd = [(photograph(96, 64), {"prompt": "a face"}), (photograph(64, 72), {"seed": 2, "guidance_scale": 1.0})]
    together = run(variant, *(canvas(variant, rgb, **settings) for rgb, settings in crowd))
    for (rgb, settings), latents in zip(crowd, together, strict=True):
        assert rel_error(latents, run(variant, canvas(variant, rgb, **settings), tiles_per_batch=1)[0]) < 2e-5


def test_lq_features_steer_a_trained_variant(variant, photograph):
    ours, other = (
        run(variant, canvas(variant, rgb, start_from="noise"))[0]
        for rgb in (photograph(64, 64), 0 * photograph(64, 64))
    )
    assert not torch.allclose(ours, other, rtol=1e-3)


def losses_of(model):
    seeded = torch.Generator().manual_seed(0)
    shapes = {"lq": (2, 3, 64, 64), "prompt_embeds": (2, 77, 96), "pooled_prompt_embeds": (2, 64)}
    conditions = {name: torch.randn(shape, generator=seeded).clamp(-1, 1) for name, shape in shapes.items()}
    conditions["time_ids"] = torch.full((2, 6), 512.0)
    return model(torch.randn(2, 4, 8, 8, generator=seeded), noise_for(0, [0, 1], (4, 8, 8)), conditions)


def module_for_training(pipe):
    return FaithDiffForTraining(pipe.unet, pipe.lq_encoder, alphas_cumprod(pipe.scheduler.config))


def test_gradients_reach_every_part_of_a_variant_within_four_updates(untrained, architecture):
    """Zero layers in a row open one by one: the branch's transforms, the alignment's projection, the embedding."""
    model = module_for_training(untrained)
    parts = ("alignment", "lq_encoder", "control") if architecture["control"] else ("alignment", "lq_encoder", "unet")
    names = trained_parameters(model, parts)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        losses_of(model).mean().backward()
        optimizer.step()
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == set(names)
    assert all(parameters[name].grad.isfinite().all() for name in names)
    # A key's bias moves all logits of a query alike: softmax knows no difference.
    without = [name for name in names if not parameters[name].grad.any() and not name.endswith("to_k.bias")]
    assert without == []


def test_gradient_checkpointing_changes_no_gradient_of_a_variant(variant, architecture):
    model = module_for_training(variant)
    parts = ("alignment", "lq_encoder", *(["control"] if architecture["control"] else ["unet"]))
    names, found = trained_parameters(model, parts), []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            variant.unet.enable_gradient_checkpointing()
            variant.lq_encoder.enable_gradient_checkpointing()
        model.zero_grad()
        losses_of(model).mean().backward()
        found.append({name: model.get_parameter(name).grad.clone() for name in names})
    for name in names:
        torch.testing.assert_close(*(gradients[name] for gradients in found))


def test_the_standard_architecture_is_the_pipelines_own_models(nano):
    same = with_architecture(nano)
    assert (same.unet, same.lq_encoder) == (nano.unet, nano.lq_encoder)


def test_what_changes_starts_anew_and_the_rest_keeps_its_weights(nano, architecture):
    """`nano` has a trained alignment module."""
    before = copy.deepcopy(states(nano))
    torch.manual_seed(1)
    first = with_architecture(nano, **architecture)
    torch.manual_seed(2)
    assert_same_weights(states(first), states(with_architecture(nano, **architecture)))
    assert_same_weights(states(nano), before)
    has_new_alignment = architecture["alignment"] == "sum" or architecture["features"] == "last"
    for name, tensor in first.unet.state_dict().items():
        if name.startswith("alignment."):
            assert name in before["unet"]
            kept = tensor.shape == before["unet"][name].shape and torch.equal(tensor, before["unet"][name])
            assert kept or has_new_alignment, name
        elif not name.startswith("control."):
            assert torch.equal(tensor, before["unet"][name]), name
    assert first.unet.alignment.condition.conv_out.weight.any().item() is not has_new_alignment
    assert (first.model_version, first.tiles_per_batch) == (nano.model_version, nano.tiles_per_batch)


def test_another_seed_initialises_a_new_alignment_module_otherwise(nano):
    weights = [
        with_architecture(nano, features="last", seed=seed).unet.alignment.condition.conv_in.weight for seed in (0, 1)
    ]
    assert not torch.equal(*weights)


def test_a_branch_can_be_taken_off_again(nano):
    off = with_architecture(with_architecture(nano, control=True), control=False)
    assert_same_weights(states(off), states(nano))


def test_a_variant_in_half_precision_stays_so(nano):
    half = copy.deepcopy(nano.unet)
    torch.nn.Module.to(half, torch.bfloat16)
    pipe = FaithDiffPipeline(**nano.components | {"unet": half})
    unet = with_architecture(pipe, features="last", control=True).unet
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def test_unknown_architectures_are_refused(nano):
    with pytest.raises(InputError, match="kind is 'product'"):
        with_architecture(nano, alignment="product")
    with pytest.raises(InputError, match="features is 'first'"):
        with_architecture(nano, features="first")
