"""The plan of an interleaved hybrid: what timm's own configs of BoTNets say, derived from ours."""

import pytest
import timm
import torch
from conftest import randomise_
from safetensors.torch import save_file
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import expand_blocks_cfg

from timm_vitres import VitResNetMixCfg
from timm_vitres.models.interleaving import TABLES, attn_sizes, byob_cfg, input_stride, stage_strides

BOTNETS = {
    'bot26t': 'botnet26t',
    'eca_bot26ts': 'eca_botnext26ts',
    'se_bot33ts': 'sebotnet33ts',
    'bot50ts': 'botnet50ts',
}


@pytest.mark.parametrize('name', BOTNETS)
def test_blocks_are_timms(name):
    ours = byob_cfg(timm.create_model(f'vitresnet_mix_{name}', device='meta').cfg, (256, 256))
    theirs = model_cfgs[BOTNETS[name]]
    for stage, other in zip(ours.blocks, theirs.blocks, strict=True):
        blocks = [(isinstance(b.type, str), b.c, b.s, b.br, b.gs if isinstance(b.type, str) else None) for b in stage]
        expected = [
            (b.type != 'self_attn', b.c, b.s, b.br, b.gs if b.type != 'self_attn' else None)
            for b in expand_blocks_cfg(other)
        ]
        assert blocks == expected
    for field in ('downsample', 'stem_type', 'stem_chs', 'num_features', 'act_layer', 'attn_layer'):
        assert getattr(ours, field) == getattr(theirs, field), field


def test_maps_that_are_attended_to():
    cfg = VitResNetMixCfg(attn_blocks=(0, 1, (0, 1), (0, 1)))
    assert stage_strides(cfg) == [(4, 4), (4, 8), (8, 16), (16, 32)]
    sizes = attn_sizes(cfg, (100, 257))  # a stage's first block attends before its stride; edges are rounded up
    assert sizes == {(1, 1): (13, 33), (2, 0): (13, 33), (2, 1): (7, 17), (3, 0): (7, 17), (3, 1): (4, 9)}
    dilated = VitResNetMixCfg(output_stride=8, stem_stride=2)
    assert stage_strides(dilated) == [(2, 2), (2, 4), (4, 8), (8, 8)] and input_stride(dilated, 3, 0) == 8


@pytest.mark.parametrize('name', ['vitresnet_mix_nano', 'vitresnet_mix_se_bot33ts'])
def test_a_stem_of_one_convolution_gains_and_loses_its_pooling(name, tmp_path):
    """Its weights are the same; a stem of several convolutions is called the same either way."""
    plain = randomise_(timm.create_model(name, num_classes=5, stem_pool=''))
    pooled = timm.create_model(name, num_classes=5, stem_pool='max')
    for source, target in ((plain, pooled), (pooled, plain)):
        save_file(source.state_dict(), tmp_path / 'model.safetensors')
        kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))
        kwargs['pretrained_cfg_overlay'].update(num_classes=5, input_size=(3, 224, 224))
        loaded = timm.create_model(name, num_classes=5, stem_pool=target.cfg.stem_pool, **kwargs)
        assert list(loaded.state_dict()) == list(target.state_dict())
        for (key, one), other in zip(loaded.state_dict().items(), source.state_dict().values(), strict=True):
            assert key.endswith(TABLES) or torch.equal(one, other), key  # of other maps, tables are of other sizes
    with pytest.raises(RuntimeError, match=r'stem\.conv1\.conv\.weight'):  # in a model that is there, it is a mistake
        timm.create_model('vitresnet_mix_nano', stem_pool='max').load_state_dict(
            timm.create_model('vitresnet_mix_nano').state_dict()
        )
