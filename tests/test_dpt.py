"""transformers' DPT-Hybrid against its backbone here, of the same file. tests/midas_reference.py does so for MiDaS."""

import json

import pytest
import timm
import torch
from conftest import randomise_, relative_difference

from timm_vitres.publishing.conversion import convert

BASE = 'vitresnet_base.dpt_hybrid_midas'
# An architecture, what makes it DPT-Hybrid's in small, its image size, and the blocks whose tokens DPT takes
SMALL = ('test_vitresnet', dict(layers=(1, 1, 1), channels=(128, 128, 256)), 96, (0, 1))
WHOLE = pytest.param((BASE, {}, 384, (8, 11)), marks=pytest.mark.slow)


def write_dpt(name, kwargs, size, blocks, folder):
    """Write transformers' model of an architecture's measures, with random weights; return it."""
    from transformers import BitConfig, DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    like = timm.create_model(name, num_classes=0, device='meta', **kwargs)
    backbone_config = BitConfig(
        global_padding='same',
        layer_type='bottleneck',
        depths=like.cfg.layers,
        hidden_sizes=kwargs.get('channels', (256, 512, 1024)),
        embedding_size=like.patch_embed.backbone.stem.conv.out_channels,
        out_features=['stage1', 'stage2', 'stage3'],
        embedding_dynamic_padding=True,
    )
    width, grid = like.embed_dim, size // 16
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone_config,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(like.blocks),
        num_attention_heads=width // 64 if name == BASE else 2,
        image_size=size,
        backbone_featmap_shape=[1, backbone_config.hidden_sizes[2], grid, grid],
        backbone_out_indices=[0, 1, *blocks],  # the first two stand for the ResNet's stages
        neck_hidden_sizes=[*backbone_config.hidden_sizes[:2], width, width],
        fusion_hidden_size=32,
        reassemble_factors=[1, 1, 1, 0.5],
    )
    torch.manual_seed(0)
    model = randomise_(DPTForDepthEstimation(config))
    model.save_pretrained(folder)
    DPTImageProcessor(size={'height': size, 'width': size}).save_pretrained(folder)
    return model


def with_eps(model, eps):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return model


@pytest.mark.recent
@pytest.mark.parametrize('form', [SMALL, WHOLE])
def test_maps_are_those_of_transformers(form, tmp_path, caplog):
    name, kwargs, size, blocks = form
    theirs = write_dpt(*form, tmp_path)
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **kwargs).eval()
    decoder = {part: sum(1 for _ in getattr(theirs, part).state_dict()) for part in ('head', 'neck')}
    told = f'transformers DPT-Hybrid: {sum(decoder.values())} tensors of other parts are left out: '
    assert told + f'head ({decoder["head"]}), neck ({decoder["neck"]}).' in caplog.text

    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = theirs.dpt(x, output_hidden_states=True)
        compare(ours, x, expected, blocks, 1e-4)
        compare(with_eps(ours, 1e-12), x, expected, blocks, 1e-6)  # what is left is the eps of the LayerNorms

    out = convert(tmp_path, tmp_path / 'out', *(['test_vitresnet'] if kwargs else []), model_kwargs=kwargs)
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert (model.num_classes, model.pretrained_cfg['input_size']) == (0, (3, size, size))
    assert (*model.pretrained_cfg['mean'], model.pretrained_cfg['crop_pct']) == (0.5, 0.5, 0.5, 1.0)
    assert 'label_names' not in json.loads((out / 'config.json').read_text())
    with torch.inference_mode():
        compare(model, x, expected, blocks, 1e-4)


def compare(ours, x, expected, blocks, limit):
    """Compare all that DPT's decoder takes: two maps of the ResNet, tokens of two blocks; and the final norm."""
    strides = [info['reduction'] for info in ours.feature_info]
    maps = ours.forward_intermediates(x, [strides.index(4), strides.index(8)], intermediates_only=True)
    for own, their in zip(maps, expected.intermediate_activations):
        assert relative_difference(own, their) < 1e-6
    tokens = ours.get_intermediate_layers(x, blocks, return_prefix_tokens=True)
    for (patches, prefix), block in zip(tokens, blocks):
        assert relative_difference(torch.cat([prefix, patches], 1), expected.hidden_states[block + 1]) < limit
    assert relative_difference(ours.forward_features(x), expected.last_hidden_state) < limit
