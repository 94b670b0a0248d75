"""The plan of an interleaved hybrid: what timm's own configs of BoTNets say, derived from ours."""

import pytest
import timm
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import expand_blocks_cfg

from timm_vitres import VitResNetMixCfg
from timm_vitres.models.interleaving import attn_sizes, byob_cfg, input_stride, stage_strides

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
