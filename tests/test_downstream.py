"""Programs that take timm models as backbones take ours as they are: segmentation, detection, transformers, fastai."""

import json

import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from programs import PROGRAMS, segment, segment_by_dpt

import timm_vitres

NAME = 'vitresnet_small'
SMALL = ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix']
LARGE = [
    'vitresnet_small',
    'vitresnet_tiny',
    'vitresnet',
    'vitresnet_base',
    'vitresnet_dual_tiny',
    'vitresnet_mix_bot26t',
]
NAMES = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
# base's pyramid has four levels, where smp's models have five by default
OPTIONS = {
    ('smp Unet', 'vitresnet_base'): dict(encoder_depth=4, decoder_channels=(64, 32, 16, 8)),
    ('smp FPN', 'vitresnet_base'): dict(encoder_depth=4, upsampling=2),
    ('smp DeepLabV3', 'vitresnet_base'): dict(encoder_depth=4),
}

# DeepLabV3 dilates: the parallel family can't, nor can tokens that are made of patches stand closer
NOT_DILATED = {
    'test_vitresnet_dual': 'output_stride: is no argument of VitResNetDual',
    'vitresnet_dual_tiny': 'output_stride: is no argument of VitResNetDual',
    'vitresnet_tiny': 'output_stride: got 8, but the tokens',
}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('program', PROGRAMS)
def test_programs(program, name):
    size, run = PROGRAMS[program]
    if program == 'smp DeepLabV3' and name in NOT_DILATED:
        with pytest.raises((TypeError, ValueError), match=NOT_DILATED[name]):
            run(name, size)
    else:
        strides = run(name, size, **OPTIONS.get((program, name), {}))
        assert strides == sorted(strides)


@pytest.mark.parametrize('architecture', ['Unet', 'FPN'])
def test_segmentation_with_more_channels(architecture):
    assert segment(NAME, (128, 192), architecture, in_chans=4) == [2, 4, 8, 16, 32]


def test_segmentation_with_dilation():
    assert segment('test_vitresnet', (64, 96), 'DeepLabV3', encoder_output_stride=16) == [2, 4, 8, 16, 16]


def test_segmentation_sees_the_whole_pyramid():
    """What reaches smp's decoder is what features_only gives."""
    import segmentation_models_pytorch as smp

    encoder = smp.Unet(f'tu-{NAME}', encoder_weights=None).encoder.eval()
    model = timm.create_model(NAME, features_only=True).eval()
    model.load_state_dict(encoder.model.state_dict())
    x = torch.randn(1, 3, 96, 160)
    with torch.inference_mode():
        for theirs, ours in zip(encoder(x)[1:], model(x), strict=True):
            torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize('readout', ['add', 'ignore'])  # the default, 'cat', is among the programs
@pytest.mark.parametrize('name', SMALL)
def test_dpt_reads_tokens_in_every_way(name, readout):
    segment_by_dpt(name, (64, 96), decoder_readout=readout)


# 12 blocks, but thin ones
THIN = dict(embed_dim=64, num_heads=2)
BASE = ('vitresnet_base', dict(THIN, layers=(1, 1, 1), channels=(128, 128, 256)))
OF_SMALL = ('vitresnet_small', dict(THIN, layers=(1, 1, 1, 1), channels=(128, 128, 128, 256)))


@pytest.mark.parametrize(
    'name, options, indices, strides, modules',
    [
        # by default four entries of feature_info at even distances
        (*BASE, None, [8, 16, 16, 16], ['stages.1', 'blocks.3', 'blocks.7', 'blocks.11']),
        (*OF_SMALL, None, [16, 32, 32, 32], ['stages.2', 'blocks.3', 'blocks.7', 'blocks.11']),
        # those of DPT-Hybrid (Ranftl et al. 2021): two stages of the ResNet, blocks 9 and 12
        (*BASE, [1, 2, -4, -1], [4, 8, 16, 16], ['stages.0', 'stages.1', 'blocks.8', 'blocks.11']),
        # a pyramid without tokens, at the strides that the decoder is made for
        (
            'test_vitresnet_dual',
            {},
            [1, 2, 3, 4],
            [4, 8, 16, 32],
            [f'units.{i}.fusion_block.act3' for i in (1, 3, 4, 5)],
        ),
        ('test_vitresnet_mix', {}, [1, 2, 3, 4], [4, 8, 16, 32], None),
    ],
)
def test_dpt_reads_what_it_should(name, options, indices, strides, modules):
    import segmentation_models_pytorch as smp

    model = smp.DPT(f'tu-{name}', encoder_weights=None, encoder_output_indices=indices, **options)
    encoder, net = model.encoder, randomise_(model.encoder.model)
    assert encoder.output_strides == strides
    modules = modules or [net.feature_info[i]['module'] for i in indices]
    outputs = {}
    for module in modules:
        prefix = 'patch_embed.backbone.' if module.startswith('stages') and hasattr(net, 'patch_embed') else ''
        net.get_submodule(prefix + module).register_forward_hook(
            lambda module, args, output, key=module: outputs.update({key: output})
        )
    x = torch.randn(2, 3, 96, 160)
    with torch.inference_mode():
        maps, prefixes = encoder(x)
    for level, prefix, module, stride in zip(maps, prefixes, modules, strides, strict=True):
        expected = outputs[module]
        if expected.ndim == 3:  # tokens, the class token first
            assert torch.equal(prefix, expected[:, :1])
            expected = expected[:, 1:].transpose(1, 2).unflatten(2, (96 // stride, 160 // stride))
        elif encoder.has_prefix_tokens:
            assert relative_difference(prefix, expected.mean((2, 3))[:, None]) < 1e-6
        else:
            assert prefix is None
        assert torch.equal(level, expected)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a model saved with class names."""
    model = randomise_(timm.create_model(NAME, num_classes=3, drop_path_rate=0.1))
    path = timm_vitres.save(model, tmp_path_factory.mktemp('saved') / 'model', label_names=['cat', 'dog', 'owl'])
    return path, model


def test_transformers_classifies(folder):
    """TimmWrapper gives the logits, the class names and the preprocessing of the saved model."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    path, model = folder
    wrapped = AutoModelForImageClassification.from_pretrained(path).eval()
    assert wrapped.config.id2label == {0: 'cat', 1: 'dog', 2: 'owl'}
    image = Image.new('RGB', (300, 260), (90, 30, 200))
    pixels = AutoImageProcessor.from_pretrained(path)(image, return_tensors='pt')['pixel_values']
    torch.testing.assert_close(pixels, timm_vitres.preprocess(image, model))
    with torch.inference_mode():
        assert relative_difference(wrapped(pixels).logits, model(pixels)) < 1e-6
        hidden = wrapped(pixels, output_hidden_states=True).hidden_states
        assert len(hidden) == len(model.feature_info)
        features = AutoModel.from_pretrained(path).eval()(pixels)
        assert relative_difference(features.last_hidden_state, model.forward_features(pixels)) < 1e-6
        assert (
            relative_difference(
                features.pooler_output, model.forward_head(model.forward_features(pixels), pre_logits=True)
            )
            < 1e-6
        )


def test_transformers_backbone(folder):
    """TimmBackbone gives the pyramid of the saved model, from `timm.create_model`'s own names."""
    from transformers import TimmBackbone

    path, model = folder
    backbone = TimmBackbone.from_pretrained(f'local-dir:{path}', out_indices=(0, 1, 2, 3, 4)).eval()
    assert backbone.channels == [64, 256, 512, 1024, 384]
    x = torch.randn(1, 3, 97, 160)
    with torch.inference_mode():
        ours = model.forward_intermediates(x, indices=[0, 1, 2, 3, 4], intermediates_only=True)
        for theirs, feature in zip(backbone(x).feature_maps, ours, strict=True):
            assert relative_difference(theirs, feature) < 1e-6


@pytest.mark.parametrize('name', ['vitresnet_tiny', 'vitresnet_nano', 'test_vitresnet', 'test_vitresnet_dual'])
def test_transformers_backbone_of_the_others(name):
    """Every entry of feature_info has a name of its own, which transformers insists on."""
    from transformers import TimmBackbone, TimmBackboneConfig

    model = timm.create_model(name)
    every = tuple(range(len(model.feature_info)))
    backbone = TimmBackbone(TimmBackboneConfig(backbone=name, out_indices=every)).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 64, 64)).feature_maps
    assert [feature.shape[1] for feature in maps] == [level['num_chs'] for level in model.feature_info]


def test_a_saved_config_names_its_classes_once(folder):
    path, _ = folder
    assert 'num_classes' not in json.loads((path / 'config.json').read_text())['model_args']
