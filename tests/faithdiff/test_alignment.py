import pytest
import torch

from faithdiff.alignment import NUM_HEADS, AlignmentModule
from faithdiff.errors import InputError


def test_value_mode_gives_the_released_inference(golden, golden_models, rel_error):
    case = golden("case02a_alignment")
    alignment = golden_models[0].alignment
    with torch.no_grad():
        assert rel_error(alignment.embed(case["lq_feat"]), case["f_m"]) < 5e-5
        aligned = alignment(case["f_x"][:1], case["lq_feat"][:1])
        pair = alignment(case["f_x"][:1].repeat(2, 1, 1, 1), case["lq_feat"][:1].repeat(2, 1, 1, 1))
    assert rel_error(aligned, case["aligned_single_0"]) < 5e-5
    assert rel_error(pair, case["aligned_duplicated_0"]) < 5e-5


def test_tokens_mode_is_multi_head_attention_over_the_tokens_of_one_picture(golden, golden_models, rel_error):
    """Against torch's own MultiheadAttention with batch_first, block by block."""
    case = golden("case02a_alignment")
    alignment = golden_models[0].alignment
    module = AlignmentModule(320, 512, attention="tokens")
    module.load_state_dict(alignment.state_dict())
    with torch.no_grad():
        tokens = torch.cat([case["f_x"], case["f_m"]], dim=1).flatten(2).transpose(1, 2)
        for block in module.blocks:
            reference = torch.nn.MultiheadAttention(640, NUM_HEADS, batch_first=True)
            reference.load_state_dict(block.attn.state_dict())
            normed = block.ln_1(tokens)
            tokens = tokens + reference(normed, normed, normed, need_weights=False)[0]
            tokens = tokens + block.mlp(block.ln_2(tokens))
        expected = case["f_x"] + module.proj(tokens).transpose(1, 2).unflatten(2, case["f_x"].shape[2:])
        actual = module(case["f_x"], case["lq_feat"])
    assert rel_error(actual, expected) < 5e-5


@pytest.mark.parametrize("attention", ["value", "tokens"])
def test_a_picture_does_not_depend_on_its_batch_mates_or_their_order(attention, golden, golden_models, rel_error):
    case = golden("case02a_alignment")
    module = AlignmentModule(320, 512, attention=attention)
    module.load_state_dict(golden_models[0].alignment.state_dict())
    with torch.no_grad():
        batch = module(case["f_x"], case["lq_feat"])
        swapped = module(case["f_x"].flip(0), case["lq_feat"].flip(0))
        alone = module(case["f_x"][1:], case["lq_feat"][1:])
    assert rel_error(swapped.flip(0), batch) < 2e-6
    assert rel_error(alone, batch[1:]) < 2e-6


def test_value_mode_lets_no_pixel_of_the_latents_see_another(golden, golden_models):
    case = golden("case02a_alignment")
    alignment = golden_models[0].alignment
    changed = case["f_x"].clone()
    changed[:, :, 0, 0] += 1
    with torch.no_grad():
        difference = alignment.align(changed, case["f_m"]) - alignment.align(case["f_x"], case["f_m"])
    assert difference[:, :, 0, 0].abs().max() > 0
    difference[:, :, 0, 0] = 0
    assert difference.abs().max() < 1e-5


def test_an_untrained_module_passes_the_latent_features_through():
    module = AlignmentModule(32, 64)
    latent_features = torch.randn(1, 32, 5, 7)
    assert torch.equal(module(latent_features, torch.randn(1, 64, 5, 7)), latent_features)


def test_an_unknown_attention_mode_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'batch'.*value, tokens"):
        AlignmentModule(32, 64, attention="batch")


def test_the_released_size_has_the_released_number_of_parameters():
    with torch.device("meta"):
        module = AlignmentModule()
    assert sum(p.numel() for p in module.parameters()) == 10_608_512
