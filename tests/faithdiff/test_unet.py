import copy

import pytest
import torch

from faithdiff.errors import InputError
from faithdiff.unet import FaithDiffUNet


def _added(case, rows):
    return {"text_embeds": case["pooled"][rows], "time_ids": case["time_ids"][rows]}


@torch.no_grad()
def test_prediction_equals_the_released_network(golden, golden_models, rel_error):
    case, unet = golden("case02b_unet"), golden_models[0]
    one = slice(0, 1)
    pred = unet(case["latent"][one], 501, case["text"][one], _added(case, one), case["lq_feat"][one]).sample
    assert rel_error(pred, case["pred_single_0_t501"]) < 5e-5


@torch.no_grad()
def test_without_lq_features_it_is_the_plain_sdxl_unet(golden, golden_models, rel_error):
    case, unet = golden("case02b_unet"), golden_models[0]
    both = slice(None)
    pred = unet(case["latent"], torch.tensor([501, 501]), case["text"], _added(case, both)).sample
    assert rel_error(pred, case["pred_uncond_lq_t501"]) < 5e-5


@torch.no_grad()
def test_add_sample_off_leaves_the_residual_out(golden_models, golden):
    case, unet = golden("case02b_unet"), golden_models[0]
    alone = FaithDiffUNet.from_config(unet.config, add_sample=False)
    alone.load_state_dict(unet.state_dict())
    embedding = unet.alignment.embed(case["lq_feat"])
    residual = unet.entrance(case["latent"], embedding) - unet.conv_in(case["latent"])
    assert torch.allclose(alone.entrance(case["latent"], embedding), residual, atol=1e-5)


@torch.no_grad()
def test_rows_at_different_timesteps_share_a_batch_without_meeting(golden, golden_models, rel_error):
    case, unet = golden("case02b_unet"), golden_models[0]
    both, timesteps = slice(None), torch.tensor([501, 999])
    batch = unet(case["latent"], timesteps, case["text"], _added(case, both), case["lq_feat"]).sample
    permuted = {name: case[name].flip(0) for name in ("latent", "text", "pooled", "time_ids", "lq_feat")}
    flipped = unet(
        permuted["latent"], timesteps.flip(0), permuted["text"], _added(permuted, both), permuted["lq_feat"]
    ).sample
    assert rel_error(batch[:1], case["pred_single_0_t501"]) < 5e-5
    assert rel_error(flipped.flip(0), batch) < 2e-6


@torch.no_grad()
def test_prepared_text_and_embedded_features_change_nothing(golden, golden_models, rel_error):
    case, unet = golden("case02b_unet"), golden_models[0]
    added = _added(case, slice(None))
    plain = unet(case["latent"], 251, case["text"], added, case["lq_feat"]).sample
    features = unet.entrance(case["latent"], unet.alignment.embed(case["lq_feat"]))
    prepared = unet.trunk(features, 251, unet.prepare_text(case["text"]), added)
    assert rel_error(prepared, plain) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(15, 18), (9, 16), (1, 3)])
def test_latents_of_odd_size_keep_their_size(height, width, golden, golden_models):
    case, unet = golden("case02b_unet"), golden_models[0]
    sample, lq_features = torch.randn(1, 4, height, width), torch.randn(1, 512, height, width)
    one = slice(0, 1)
    pred = unet(sample, 1, case["text"][one], _added(case, one), lq_features).sample
    assert pred.shape == (1, 4, height, width)
    assert torch.isfinite(pred).all()


@torch.no_grad()
def test_odd_sizes_agree_with_diffusers_own_forward(golden, golden_models, rel_error):
    from diffusers import UNet2DConditionModel

    case, unet = golden("case02b_unet"), golden_models[0]
    plain = UNet2DConditionModel.from_config(case.about["unet_config"]).eval()
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("alignment.")})
    sample, one = torch.randn(1, 4, 15, 18), slice(0, 1)
    expected = plain(sample, 1, case["text"][one], added_cond_kwargs=_added(case, one)).sample
    assert rel_error(unet(sample, 1, case["text"][one], _added(case, one)).sample, expected) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_stays_near_the_released_numbers(dtype, tolerance, golden, golden_models, rel_error):
    case, one = golden("case02b_unet"), slice(0, 1)
    unet = FaithDiffUNet.from_config(golden_models[0].config)
    unet.load_state_dict(golden_models[0].state_dict())
    unet = unet.to(dtype).eval()
    added = {"text_embeds": case["pooled"][one].to(dtype), "time_ids": case["time_ids"][one]}
    pred = unet(case["latent"][one].to(dtype), 501, case["text"][one].to(dtype), added, case["lq_feat"][one].to(dtype))
    in_fp32 = case["pred_single_0_t501"].clone()  # a copy, which the report of golden errors does not count
    assert rel_error(pred.sample.float(), in_fp32) < tolerance


def test_a_saved_unet_loads_with_its_alignment_mode(tmp_path, nano):
    nano.unet.save_pretrained(tmp_path)
    loaded = FaithDiffUNet.from_pretrained(tmp_path)
    assert loaded.config.lq_channels == nano.unet.config.lq_channels
    assert loaded.alignment.attention == nano.unet.alignment.attention == "value"
    for name, tensor in nano.unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_tokens_mode_survives_saving(tmp_path, nano):
    unet = FaithDiffUNet.from_config(nano.unet.config, alignment_attention="tokens")
    unet.save_pretrained(tmp_path)
    assert FaithDiffUNet.from_pretrained(tmp_path).alignment.attention == "tokens"


def test_batch_attention_is_never_recorded_and_saves_as_value(tmp_path, nano):
    unet = FaithDiffUNet.from_config(nano.unet.config, alignment_attention="tokens")
    with pytest.raises(InputError, match=r"'batch'.*value, tokens"):
        unet.set_alignment_attention("batch")
    unet.set_batch_attention(4)
    unet.save_pretrained(tmp_path)
    assert FaithDiffUNet.from_pretrained(tmp_path).config.alignment_attention == "value"


def predict(unet, rows=2):
    seeded = torch.Generator().manual_seed(0)
    shapes = {"sample": (rows, 4, 8, 8), "text": (rows, 77, 96), "pooled": (rows, 64), "lq": (rows, 64, 8, 8)}
    inputs = {name: torch.randn(shape, generator=seeded) for name, shape in shapes.items()}
    added = {"text_embeds": inputs["pooled"], "time_ids": torch.full((rows, 6), 512.0)}
    return unet(inputs["sample"], 501, inputs["text"], added, inputs["lq"]).sample


def gradients(unet):
    unet.zero_grad()
    prediction = predict(unet)
    prediction.square().mean().backward()
    return prediction.detach(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# torch silences this warning of its own by a filter that pytest's comes before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_compiled_blocks_give_the_same_prediction_and_gradients(is_checkpointed, nano, compiler):
    unet = copy.deepcopy(nano.unet).train()
    unet.set_batch_attention(2)
    if is_checkpointed:
        unet.enable_gradient_checkpointing()
    expected, expected_gradients = gradients(unet)
    unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    compiled = [module for module in unet.modules() if module._compiled_call_impl is not None]
    assert {type(module).__name__ for module in compiled} == {"BasicTransformerBlock", "AlignmentBlock"}
    actual, actual_gradients = gradients(unet)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], expected_gradient, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_no_gradient(nano):
    unet = copy.deepcopy(nano.unet).train()
    expected, expected_gradients = gradients(unet)
    unet.enable_gradient_checkpointing()
    actual, actual_gradients = gradients(unet)
    assert torch.equal(actual, expected)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], expected_gradient)
