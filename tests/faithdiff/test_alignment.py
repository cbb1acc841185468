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


def released_training(alignment, latent_features, lq_features):
    """The released blocks: sequence-first attention fed with [B, N, C], hence over the batch (specification 0.1)."""
    tokens = torch.cat([latent_features, alignment.embed(lq_features)], dim=1).flatten(2).transpose(1, 2)
    for block in alignment.blocks:
        reference = torch.nn.MultiheadAttention(tokens.shape[-1], NUM_HEADS)
        reference.load_state_dict(block.attn.state_dict())
        normed = block.ln_1(tokens)
        tokens = tokens + reference(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + block.mlp(block.ln_2(tokens))
    return latent_features + alignment.proj(tokens).transpose(1, 2).unflatten(2, latent_features.shape[2:])


@pytest.fixture
def batch_mode(golden_models):
    module = AlignmentModule(320, 512)
    module.load_state_dict(golden_models[0].alignment.state_dict())
    module.set_batch_attention(2)
    return module.train()


@torch.no_grad()
def test_batch_attention_is_that_of_released_training(golden, batch_mode, rel_error):
    case = golden("case02a_alignment")
    expected = released_training(batch_mode, case["f_x"], case["lq_feat"])
    actual = batch_mode(case["f_x"], case["lq_feat"])
    assert rel_error(actual, expected) < 5e-5
    assert rel_error(actual[:1], case["aligned_single_0"].clone()) > 0.1  # the other picture matters
    # Two equal rows are what the released network sees at inference.
    pair = batch_mode(case["f_x"][:1].repeat(2, 1, 1, 1), case["lq_feat"][:1].repeat(2, 1, 1, 1))
    assert rel_error(pair, case["aligned_duplicated_0"]) < 5e-5


@torch.no_grad()
def test_batch_attention_stays_within_groups_of_consecutive_rows(golden, batch_mode, rel_error):
    case = golden("case02a_alignment")
    latent_features, lq_features = (
        torch.cat([case[name], 0.5 * case[name].flip(0, 3), case[name] + 1]) for name in ("f_x", "lq_feat")
    )
    whole = batch_mode(latent_features, lq_features)
    groups = [batch_mode(latent_features[i : i + 2], lq_features[i : i + 2]) for i in (0, 2, 4)]
    assert rel_error(whole, torch.cat(groups)) < 2e-6
    batch_mode.set_batch_attention(3)
    assert rel_error(batch_mode(latent_features, lq_features), whole) > 0.1


@torch.no_grad()
def test_batch_attention_is_the_value_path_outside_training(golden, batch_mode, rel_error):
    case = golden("case02a_alignment")
    assert rel_error(batch_mode.eval()(case["f_x"][:1], case["lq_feat"][:1]), case["aligned_single_0"]) < 5e-5
    assert batch_mode.attention == "value"


def test_rows_that_are_no_whole_groups_are_refused(batch_mode):
    with pytest.raises(InputError, match="3 rows are no whole number of groups of 2"):
        batch_mode(torch.zeros(3, 320, 2, 2), torch.zeros(3, 512, 2, 2))
    with pytest.raises(InputError, match="a group of 0 rows"):
        batch_mode.set_batch_attention(0)


def test_sum_adds_the_embedded_features_and_has_no_transformer():
    module = AlignmentModule(32, 4, kind="sum")
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"condition"}
    latent_features, lq_features = torch.randn(2, 32, 5, 7), torch.randn(2, 4, 5, 7)
    assert torch.equal(module(latent_features, lq_features), latent_features)
    torch.nn.init.normal_(module.condition.conv_out.weight)
    assert torch.equal(module(latent_features, lq_features), latent_features + module.embed(lq_features))
    with pytest.raises(InputError, match="'sum' has no attention"):
        module.set_batch_attention()


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'product'.*transformer, sum"):
        AlignmentModule(32, 64, kind="product")


def test_the_released_size_has_the_released_number_of_parameters():
    with torch.device("meta"):
        module = AlignmentModule()
    assert sum(p.numel() for p in module.parameters()) == 10_608_512
