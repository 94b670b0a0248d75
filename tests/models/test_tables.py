"""A checkpoint's table of another size than the model's is resampled from the grid that it was made for."""

import argparse

import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import timm_vitres
from timm_vitres.models.tables import fit_tables, table_size
from timm_vitres.publishing.conversion import convert


def test_patch_projection_is_resampled():
    model = randomise_(timm.create_model('vitresnet', backbone='', patch_size=16, depth=1, img_size=64, num_classes=3))
    overlay = dict(state_dict=model.state_dict(), num_classes=3, input_size=(3, 64, 64))
    options = dict(backbone='', patch_size=32, depth=1, img_size=128, num_classes=3)
    larger = timm.create_model('vitresnet', pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    flat = torch.full((1, 3, 64, 64), 0.7)
    with torch.inference_mode():  # FlexiViT: a plain image looks the same at both patch sizes
        expected = model.patch_embed(flat)
        actual = larger.patch_embed(torch.full((1, 3, 128, 128), 0.7))
    torch.testing.assert_close(actual.mean((1, 2)), expected.mean((1, 2)), rtol=0.1, atol=0.05)


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    """Timm's class for 64 x 256 pixels, whose 2 x 8 tokens could be 4 x 4, too, and a file of its weights."""
    model = randomise_(timm.create_model('vit_tiny_r_s16_p8_224', img_size=(64, 256), num_classes=5))
    path = tmp_path_factory.mktemp('wide') / 'weights.pth'
    torch.save(model.state_dict(), path)
    return model, path


WAYS = {
    'checkpoint_path': lambda path, folder: dict(model_name='vitresnet_tiny', checkpoint_path=str(path)),
    'file': lambda path, folder: dict(
        model_name='vitresnet_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(path))
    ),
    'folder': lambda path, folder: dict(
        model_name=f'local-dir:{convert(path, folder, "vitresnet_tiny", img_size=(64, 256))}', pretrained=True
    ),
}


def test_of_two_grids_of_as_many_tokens_the_models_own_is_taken(tmp_path):
    """18 x 32 tokens of 288 x 512 pixels, or 24 x 24 of 384 x 384: a file says nothing, a name and a cfg do."""
    args = dict(model_name='vitresnet', backbone='', patch_size=16, depth=1, embed_dim=8, num_heads=1, num_classes=3)
    wide = randomise_(timm.create_model(**args, img_size=(288, 512)))
    torch.save(wide.state_dict(), tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=3)
    cfg = dict(args, pretrained=True, pretrained_cfg=dict(input_size=(3, 384, 384), url='https://elsewhere'))
    found = timm.create_model(**cfg, pretrained_cfg_overlay=overlay, img_size=(288, 512))
    assert torch.equal(found.pos_embed, wide.pos_embed)
    told = timm.create_model(
        **cfg, pretrained_cfg_overlay={**overlay, 'input_size': (3, 384, 384)}, img_size=(288, 512)
    )
    expected = resample_abs_pos_embed(wide.pos_embed, [18, 32], [24, 24], num_prefix_tokens=wide.num_prefix_tokens)
    torch.testing.assert_close(told.pos_embed, expected)
    cfg['pretrained_cfg'] = dict(cfg['pretrained_cfg'], url=None, file=str(tmp_path / 'weights.pth'), num_classes=3)
    larger = timm.create_model(**cfg, pretrained_cfg_overlay=dict(input_size=(3, 288, 512)))  # of preprocessing alone
    torch.testing.assert_close(larger.pos_embed, expected)


@pytest.mark.parametrize('way', WAYS)
def test_a_table_that_fits_is_kept(way, wide, tmp_path):
    reference, path = wide
    model = timm.create_model(**WAYS[way](path, tmp_path / 'out'), num_classes=5, img_size=(64, 256)).eval()
    x = torch.randn(1, 3, 64, 256)
    with torch.inference_mode():
        assert relative_difference(model(x), reference(x)) < 1e-6
    assert torch.equal(model.pos_embed, reference.pos_embed)
    again = timm.create_model('vitresnet_tiny', num_classes=5, img_size=(64, 256)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.pos_embed, reference.pos_embed)


@pytest.mark.parametrize('size', [(128, 128), (256, 64), (96, 160)])
def test_a_table_of_another_grid_with_as_many_tokens_is_resampled(size, wide, tmp_path):
    """Where the folder says that the grid was 2 x 8, it is resampled from that, and not from 4 x 4."""
    reference, path = wide
    folder = convert(path, tmp_path, 'vitresnet_tiny', img_size=(64, 256))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, img_size=size)
    expected = timm.layers.resample_abs_pos_embed(
        reference.pos_embed, [size[0] // 32, size[1] // 32], [2, 8], num_prefix_tokens=1
    )
    assert torch.equal(model.pos_embed, expected) and not torch.equal(expected, reference.pos_embed)


def test_the_models_own_size_tells_the_tables_grid(wide, tmp_path):
    """Images of 128 x 128, and a table of 2 x 8 that timm's train.py was given by --model-kwargs."""
    reference, path = wide
    args = argparse.Namespace(img_size=128, model_kwargs=dict(img_size=[64, 256]))
    checkpoint = dict(state_dict=torch.load(path), args=args, arch='vit_tiny_r_s16_p8_224')
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    model = timm.create_model(f'local-dir:{convert(tmp_path / "last.pth.tar", tmp_path / "out")}', pretrained=True)
    assert torch.equal(model.pos_embed, reference.pos_embed) and model.patch_embed.img_size == (64, 256)
    assert tuple(timm.data.resolve_model_data_config(model)['input_size']) == (3, 128, 128)


def embed(*size, **kwargs):
    """Return a ResNet embedding for images of a height and width; its tokens are 32 pixels apart."""
    return timm.create_model('test_vitresnet', img_size=size, device='meta', **kwargs).patch_embed


@pytest.mark.parametrize(
    'tokens, img_size, old',
    [
        (6, None, None),  # the table fits
        (6, (64, 96), None),
        (6, (96, 64), (3, 2)),  # another grid has as many tokens
        (6, (224, 224), None),  # the size that is told is another table's
        (9, None, (3, 3)),
        (16, (64, 256), (2, 8)),  # the grid is not square, but it is told
        (16, None, (4, 4)),
        (16, (64, 64), (4, 4)),
    ],
)
def test_a_table_is_resampled_from_the_grid_that_it_had(tokens, img_size, old):
    """The model's grid is 2 x 3; prefix tokens stay bit for bit."""
    table = torch.randn(1, 2 + tokens, 8)
    state_dict = {'pos_embed': table, 'other': torch.ones(1)}
    found = fit_tables(state_dict, embed(64, 96), 2, img_size)
    if old is None:
        assert found['pos_embed'] is table
    else:
        expected = resample_abs_pos_embed(table, [2, 3], list(old), num_prefix_tokens=2)
        assert torch.equal(found['pos_embed'], expected) and not torch.equal(expected, table)
        assert torch.equal(found['pos_embed'][:, :2], table[:, :2])
    assert found['other'] is state_dict['other'] and state_dict['pos_embed'] is table


@pytest.mark.parametrize(
    'shape, img_size, message',
    [
        ((1, 9, 8), None, 'the checkpoint has 7 position embeddings, which are no square grid, .* say its input_size'),
        ((1, 9, 8), (64, 64), 'the checkpoint has 7 position embeddings, which are no square grid'),
        ((1, 2, 8), None, 'the checkpoint has 0 position embeddings'),
        ((1, 1, 8), None, 'the checkpoint has -1 position embeddings'),
        ((9, 8), None, r'the checkpoint has shape \(9, 8\), expected \(1, tokens, width\)'),
    ],
)
def test_a_table_of_no_grid_is_named(shape, img_size, message):
    with pytest.raises(RuntimeError, match=f'^pos_embed: {message}'):
        fit_tables({'pos_embed': torch.ones(shape)}, embed(64, 96), 2, img_size)


def test_a_model_without_a_table_leaves_the_checkpoints():
    """The table is then an unexpected key, which `check_keys` names."""
    state_dict = {'pos_embed': torch.ones(1, 9, 8)}
    found = fit_tables(state_dict, embed(64, 96), None)
    assert found == state_dict and found is not state_dict
    assert fit_tables({}, embed(64, 96), 2) == {}


def test_patches_are_resampled_to_the_size_of_the_models():
    key, weight = 'patch_embed.proj.weight', torch.randn(8, 3, 2, 2)
    found = fit_tables({key: weight}, embed(128, 128, patch_size=(4, 2)), 1)[key]
    assert found.shape == (8, 3, 4, 2) and torch.equal(found, resample_patch_embed(weight, [4, 2]))
    assert fit_tables({key: weight}, embed(64, 64, patch_size=2), 1)[key] is weight
    flat = torch.randn(8, 3)
    assert fit_tables({key: flat}, embed(64, 64, patch_size=2), 1)[key] is flat


@pytest.mark.parametrize(
    'tokens, candidates, size',
    [
        (16, [(64, 256), (128, 128)], (64, 256)),  # the first size that fits is taken
        (16, [None, (64, 64), [256, 64]], [256, 64]),
        (16, [(64, 64)], 128),
        (16, [], 128),
        (6, [(60, 90)], (60, 90)),  # the tokens reach over the edge
        (9, [96], 96),
    ],
)
def test_the_size_that_a_table_was_made_for(tokens, candidates, size):
    model = timm.create_model('test_vitresnet', img_size=64, reg_tokens=1, device='meta')
    table = torch.ones(1, 2 + tokens, 64)
    assert table_size(table, model.patch_embed, 2, candidates) == size
    assert model.table_size({'pos_embed': table}, candidates) == size
    made = timm.create_model('test_vitresnet', img_size=size, reg_tokens=1, device='meta')
    assert made.pos_embed.shape == table.shape


def test_a_square_table_of_patches_that_are_not():
    model = timm.create_model('test_vitresnet', patch_size=(1, 2), img_size=(96, 192), device='meta')
    size = model.table_size({'pos_embed': model.pos_embed})
    assert timm.create_model('test_vitresnet', patch_size=(1, 2), img_size=size, device='meta').pos_embed.shape == (
        model.pos_embed.shape
    )


def test_a_table_of_no_size_is_named():
    for tokens in (7, 0):
        with pytest.raises(ValueError, match=f'^img_size: tried 64 x 64, and the {tokens} position embeddings of'):
            table_size(torch.ones(1, 1 + tokens, 8), embed(64, 96), 1, [None, (64, 64)])


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_without_a_table_any_size_will_do(name):
    model = timm.create_model(name, device='meta')
    assert model.table_size({'norm.weight': torch.ones(1)}, [(64, 64)]) is None


@pytest.mark.parametrize(
    'name, before, after',
    [
        ('vitresnet_nano', dict(img_size=(32, 128), stem_stride=4), dict(stem_stride=2)),
        ('vitresnet', dict(patch_size=16, img_size=(64, 144)), dict(patch_size=8)),  # 36 tokens are a square, too
        ('vitresnet', dict(patch_size=(8, 16), img_size=(64, 128)), dict(patch_size=(16, 8))),
        ('vitresnet', dict(patch_size=16, img_size=(80, 128)), dict(patch_size=8)),  # 40 are none
        ('vitresnet', dict(patch_size=8, img_size=(32, 128), pos_embed_fit='crop'), dict(patch_size=16)),
    ],
)
def test_tokens_of_another_size_are_those_of_the_model_that_was_saved(name, before, after, tmp_path):
    small = dict(backbone='', embed_dim=64, num_heads=2, depth=1) if name == 'vitresnet' else {}
    model = randomise_(timm.create_model(name, num_classes=4, **small, **before))
    timm_vitres.save(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **after)
    old, new = list(model.patch_embed.grid_size), list(loaded.patch_embed.grid_size)
    table, prefix = model.pos_embed.detach(), 0 if model.no_embed_class else model.num_prefix_tokens
    expected = resample_abs_pos_embed(table, new_size=new, old_size=old, num_prefix_tokens=prefix)
    if 'pos_embed_fit' in before:
        rows = table[:, prefix:].unflatten(1, old)[:, : new[0], : new[1]].flatten(1, 2)
        expected = torch.cat([table[:, :prefix], rows], 1)
    assert old != new
    torch.testing.assert_close(loaded.pos_embed, torch.nn.Parameter(expected))


def test_a_grid_that_nobody_tells_is_told_of(caplog):
    """A square one is what images of other sizes have as a rule; 2 x 8 tokens are as many."""
    source, other = (timm.create_model('vitresnet_tiny', img_size=size) for size in ((64, 256), (128, 256)))
    other.load_state_dict(source.state_dict())
    assert caplog.messages[0].startswith('pos_embed: 16 positions are taken for 4 x 4; if they are of another grid')
    source.load_state_dict(source.state_dict())
    assert len(caplog.messages) == 1
