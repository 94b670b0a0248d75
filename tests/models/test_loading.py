import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import randomise_, relative_difference
from timm.models import adapt_input_conv

import timm_vitres
from timm_vitres.models import loading, vitresnet
from timm_vitres.weights import files
from timm_vitres.weights.checkpoints import read_checkpoint
from timm_vitres.weights.files import WEIGHTS_NAME, write_safetensors

OPTIONS = [
    {},
    dict(num_classes=7),
    dict(num_classes=0),
    dict(in_chans=1),
    dict(in_chans=5, img_size=(64, 128)),
    dict(features_only=True),
    dict(features_only=True, in_chans=4, out_indices=(1, 3)),
    dict(features_only=True, feature_cls='hook', out_indices=(1, 2)),
    dict(dtype=torch.float64),
    dict(dtype=torch.bfloat16, num_classes=7),
    dict(device='cpu', dtype=torch.float16, in_chans=1),
]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A saved model and its folder."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    return model, timm_vitres.save(model, tmp_path_factory.mktemp('source'))


@pytest.mark.parametrize('by', ['folder', 'file', 'file and size'])
def test_a_table_is_of_the_grid_that_its_folder_tells(by, tmp_path, caplog):
    """64 tokens of strips are not those of a square, nor of the registry's size."""
    strips = randomise_(timm.create_model('vitresnet_nano', num_classes=3, img_size=(32, 128)))
    folder = timm_vitres.save(strips, tmp_path / 'strips')
    file = folder if by == 'folder' else folder / WEIGHTS_NAME
    size = dict(img_size=(32, 192)) if by == 'file and size' else {}
    overlay = dict(file=str(file))
    model = timm.create_model('vitresnet_nano', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **size)
    x = torch.randn(2, 3, 32, 192)
    with torch.inference_mode():
        # the table may be resampled twice; read as 8 x 8 it would be off by more than 1
        torch.testing.assert_close(model.eval()(x), strips.eval()(x), rtol=0, atol=0.01)
    assert 'positions are taken for' not in caplog.text
    bare = tmp_path / 'bare.pth'
    torch.save({**strips.state_dict(), 'pos_embed': strips.pos_embed[:, :36]}, bare)  # 36 are a square of no size told
    timm.create_model('vitresnet_nano', pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file=str(bare)))
    assert caplog.text.count('pos_embed: 36 positions are taken for 6 x 6') == 1


def test_a_norm_in_another_place_is_told_of(source):
    model, folder = source
    with pytest.raises(RuntimeError, match=r"global_pool 'avg' moves the norm behind the pooling; add fc_norm=False"):
        timm.create_model(f'local-dir:{folder}', pretrained=True, global_pool='avg')
    moved = timm.create_model(f'local-dir:{folder}', pretrained=True, global_pool='avg', fc_norm=False)
    assert torch.equal(moved.norm.weight, model.norm.weight)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_what_is_loaded_is_what_copying_gives(options, source):
    """Against the model that is initialised, and then copied into, as timm does."""
    model, folder = source
    torch.manual_seed(0)
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True, **options)
    inner = loaded.model if hasattr(loaded, 'model') and options.get('feature_cls') != 'hook' else loaded
    tensors = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    saved = model.state_dict()
    dtype = options.get('dtype', torch.float32)
    compared = 0
    for name, tensor in tensors.items():
        name = (
            name.removeprefix('body.').replace('patch_embed_', 'patch_embed.').replace('backbone_stem', 'backbone.stem')
        )
        assert tensor.device.type == 'cpu' and tensor.dtype in (dtype, torch.int64), name
        if name in saved and saved[name].shape == tensor.shape:
            assert torch.equal(tensor, saved[name].to(dtype)), name
            compared += 1
    assert compared > len(tensors) / 2
    if not options.get('features_only'):
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in inner.parameters())


def test_a_new_head_is_initialised_as_timm_does(source):
    _, folder = source
    torch.manual_seed(0)
    head = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=1000).head
    assert torch.equal(head.bias, torch.zeros(1000))
    assert abs(head.weight.std().item() - 0.02) < 0.002 and head.weight.abs().max() < 0.2
    nlhb = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=1000, weight_init='jax_nlhb').head
    assert torch.equal(nlhb.weight, torch.zeros(1000, 64)) and torch.all(nlhb.bias == -np.log(1000).astype(np.float32))


def test_nothing_is_initialised_that_the_file_gives(source, monkeypatch):
    """Of a pretrained model no real tensor is ever drawn but those of a new head."""
    _, folder = source
    drawn = []
    for name in ('normal_', 'uniform_'):
        original = getattr(torch.Tensor, name)

        def spy(tensor, *args, original=original, **kwargs):
            if not tensor.is_meta:
                drawn.append(tuple(tensor.shape))
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert drawn == []
    timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=9)
    assert set(drawn) == {(9, 64)}


def test_non_persistent_buffers_are_filled(tmp_path):
    """Anti-aliasing filters are in no checkpoint."""
    options = dict(backbone='resnetblur18', stage=2, embed_dim=32, num_heads=2, depth=1, img_size=64, num_classes=2)
    model = randomise_(timm.create_model('vitresnet', **options))
    loaded = timm.create_model(f'local-dir:{timm_vitres.save(model, tmp_path)}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_saving_over_the_file_that_a_live_model_is_mapped_from(tmp_path):
    first = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    timm_vitres.save(first, tmp_path)
    live = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert is_mapped(tmp_path / 'model.safetensors')
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        before = live(x)
    other = randomise_(timm.create_model('test_vitresnet', num_classes=3), seed=1)
    timm_vitres.save(other, tmp_path)
    with torch.inference_mode():
        assert torch.equal(live(x), before)
    with torch.no_grad():
        live.blocks[0].attn.qkv.weight.mul_(2)
    timm_vitres.save(live, tmp_path)  # itself, changed, over the file
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(again(x), live(x)) and not torch.equal(again(x), before)


def is_mapped(path):
    with open('/proc/self/maps') as maps:
        return str(path) in maps.read()


def test_training_a_mapped_model_leaves_the_file_alone(tmp_path):
    timm_vitres.save(randomise_(timm.create_model('test_vitresnet', num_classes=3)), tmp_path)
    file = tmp_path / 'model.safetensors'
    before, modified = file.read_bytes(), file.stat().st_mtime_ns
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).train()
    assert is_mapped(file)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 96, 96)).square().mean().backward()
    optimizer.step()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])]
    assert 'blocks.0.attn.qkv.weight' in changed and len(changed) > len(weights) // 2
    assert file.read_bytes() == before and file.stat().st_mtime_ns == modified


def test_weights_of_a_state_dict_are_not_shared():
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    overlay = dict(state_dict=model.state_dict(), num_classes=3)
    loaded = timm.create_model('test_vitresnet', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    with torch.no_grad():
        loaded.norm.weight.zero_()
    assert model.norm.weight.abs().min() > 0


def test_where_files_can_not_be_replaced_they_are_read(tmp_path, monkeypatch):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    path = timm_vitres.save(model, tmp_path) / 'model.safetensors'
    monkeypatch.setattr('timm_vitres.weights.checkpoints.os.name', 'nt')
    tensors, _ = read_checkpoint(path)
    monkeypatch.undo()
    assert not is_mapped(path)
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())


def refill(path):
    """Overwrite a file in place, as `cp` does, with bytes that are numbers, too."""
    size, inode = path.stat().st_size, path.stat().st_ino
    with path.open('r+b') as file:
        file.write(b'\x3e' * size)
    assert path.stat().st_ino == inode and path.stat().st_size == size


@pytest.mark.parametrize('way', ['argument', 'variable', 'features'])
def test_weights_that_are_not_mapped(way, tmp_path, monkeypatch):
    """Whatever another program does to the file, the model stays what it was, where a mapped one does not."""
    path = timm_vitres.save(randomise_(timm.create_model('test_vitresnet', num_classes=3)), tmp_path / 'model')
    file = path / 'model.safetensors'
    options = dict(features_only=True) if way == 'features' else {}
    if way == 'variable':
        monkeypatch.setenv('TIMM_VITRES_MMAP', '0')
    else:
        options['mmap'] = False
    model = timm.create_model(f'local-dir:{path}', pretrained=True, **options).eval()
    assert not is_mapped(file)
    monkeypatch.setenv('TIMM_VITRES_MMAP', '')
    mapped = timm.create_model(f'local-dir:{path}', pretrained=True, **{**options, 'mmap': True}).eval()
    assert is_mapped(file)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        before, same = outputs(model, x), outputs(mapped, x)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, same))
        refill(file)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(model, x), before))
        assert not all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(mapped, x), before))


def outputs(model, x):
    found = model(x)
    return found if isinstance(found, (list, tuple)) else [found]


def test_a_mapped_file_that_safetensors_replaces(tmp_path):
    """What the floor of safetensors is for: its versions before 0.8 write into the file itself."""
    path = timm_vitres.save(randomise_(timm.create_model('test_vitresnet', num_classes=3)), tmp_path) / WEIGHTS_NAME
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert is_mapped(path)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        before = model(x)
        other = {key: value + 1 for key, value in model.state_dict().items()}
        safetensors.torch.save_file(other, path)
        assert torch.equal(model(x), before)


def test_unmapped_weights_begin_where_torchs_do(tmp_path):
    """Files of other programs put tensors anywhere, and a matrix product may round by where its operands begin."""
    weights = {f'{index}': torch.randn(3 + index) for index in range(20)}
    safetensors.torch.save_file(weights, tmp_path / 'a.safetensors')
    found, _ = read_checkpoint(tmp_path / 'a.safetensors', mmap=False)
    assert found.keys() == weights.keys() and not is_mapped(tmp_path / 'a.safetensors')
    for key, value in weights.items():
        assert torch.equal(found[key], value) and found[key].data_ptr() % files.ALIGNMENT == 0, key


def test_what_is_no_way_to_read_weights(source, monkeypatch):
    for mmap in ('no', 0, 1, [False]):
        for pretrained in (True, False):
            with pytest.raises(ValueError, match=rf'mmap: got {re.escape(repr(mmap))}, expected True or False'):
                timm.create_model(f'local-dir:{source[1]}', pretrained=pretrained, mmap=mmap)
    monkeypatch.setenv('TIMM_VITRES_MMAP', 'off')
    with pytest.raises(ValueError, match="TIMM_VITRES_MMAP: got 'off', expected 0"):
        timm.create_model(f'local-dir:{source[1]}', pretrained=True)


def test_another_number_of_classes_has_no_old_names(tmp_path):
    folder = timm_vitres.save(timm.create_model('test_vitresnet', num_classes=2), tmp_path, label_names=['cat', 'dog'])
    for classes, expected in ((2, ['cat', 'dog']), (3, None), (0, None)):
        model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=classes)
        assert model.pretrained_cfg.get('label_names') == expected
    # timm's train.py --pretrained-path: as many classes, and a new head
    overlay = dict(num_classes=-1)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay)
    assert 'label_names' not in model.pretrained_cfg


def test_meta_is_refused(source):
    with pytest.raises(ValueError, match="device: got 'meta'"):
        timm.create_model(f'local-dir:{source[1]}', pretrained=True, device='meta')


def test_a_head_that_fits_is_kept(source):
    """A user's checkpoint of ten classes, by a name whose cfg says a thousand; timm would throw its head away."""
    model, folder = source
    overlay = dict(file=str(folder / 'model.safetensors'))
    loaded = timm.create_model('test_vitresnet', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.head.weight, model.head.weight)
    with pytest.raises(RuntimeError, match=r'wrong shapes: head\.weight \(3, 64\) for \(1000, 64\), head\.bias'):
        timm.create_model('test_vitresnet', pretrained=True, pretrained_cfg_overlay=overlay)
    overlay.update(num_classes=-1)  # timm's train.py --pretrained-path
    loaded = timm.create_model('test_vitresnet', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert not torch.equal(loaded.head.weight, model.head.weight)
    assert torch.equal(loaded.norm.weight, model.norm.weight)


@pytest.mark.parametrize(
    'name, lost',
    [('test_vitresnet', 'head.bias'), ('test_vitresnet_dual', 'head_vit.'), ('test_vitresnet_mix', 'head.fc.bias')],
)
def test_a_head_that_lost_a_part_is_an_error(name, lost, tmp_path):
    """A new one is for other classes than the file's, or for a file that has none."""
    model = randomise_(timm.create_model(name, num_classes=4))
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(lost)}
    heads = [key for key in model.head_keys() if key.endswith('weight')]
    thin = {**model.state_dict(), heads[0]: torch.zeros(4, 8)}
    for content, message in ((weights, f'missing keys: {lost}'), (thin, f'wrong shapes: {heads[0]}')):
        torch.save(content, tmp_path / 'mine.pth')
        overlay = dict(file=str(tmp_path / 'mine.pth'))
        with pytest.raises(RuntimeError, match=re.escape(message)):
            timm.create_model(name, pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
    bare = {key: value for key, value in model.state_dict().items() if key not in model.head_keys()}
    for content in (bare, weights, thin, model.state_dict()):  # whose head goes anyway
        torch.save(content, tmp_path / 'mine.pth')
        other = timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in bare.items())


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(features_only=True, feature_cls='nope'),
            "feature_cls: got 'nope', expected one of 'getter', 'hook', 'fx', 'list'",
        ),
        (dict(pretrained=True, pretrained_cfg_overlay='x'), "pretrained_cfg_overlay: got 'x', expected a dict"),
        (dict(pruned=True), 'pruned: is no argument of VitResNetMix'),
    ],
)
def test_what_timms_builder_takes_is_checked(options, message):
    with pytest.raises((ValueError, TypeError), match=f'^{message}'):
        timm.create_model('test_vitresnet_mix', **options)
    with pytest.raises(ValueError, match=r"^feature_cls: got 'list', expected"):
        timm.create_model('test_vitresnet', features_only=True, feature_cls='list')


def test_a_truncated_file_is_refused(tmp_path):
    model = timm.create_model('test_vitresnet', num_classes=3)
    path = timm_vitres.save(model, tmp_path) / 'model.safetensors'
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    np.savez(tmp_path / 'weights.npz', **{'embedding/kernel': np.zeros((100, 100))})
    for file in (path, tmp_path / 'weights.pth', tmp_path / 'weights.npz'):
        data = file.read_bytes()
        for size in (len(data) // 2, len(data) - 1, 20):
            file.write_bytes(data[:size])
            with pytest.raises(OSError, match='is damaged or incomplete'):
                read_checkpoint(file)
        file.write_bytes(b'')
        with pytest.raises(ValueError, match='is no safetensors, torch or npz file'):
            read_checkpoint(file)
    path.write_bytes(data := b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    with pytest.raises(ValueError, match='git lfs pull'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert data


def test_assigning_keeps_the_models_dtype():
    model = timm.create_model('test_vitresnet', num_classes=3, device='meta', dtype=torch.float32)
    weights = {
        key: value.half() for key, value in timm.create_model('test_vitresnet', num_classes=3).state_dict().items()
    }
    loading.assign_(model, weights)
    loading.fill_buffers_(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert relative_difference(model.norm.weight, weights['norm.weight'].float()) == 0


def test_a_file_of_halves_is_adapted_in_the_models_dtype(tmp_path):
    """Other channels and another grid are computed of the file's numbers, and are not rounded to its dtype again."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3, in_chans=1))
    halves = {key: value.half() if value.ndim > 1 else value for key, value in model.state_dict().items()}
    paths = [tmp_path / name for name in ('halves.safetensors', 'floats.safetensors')]
    write_safetensors(halves, paths[0])
    write_safetensors({key: value.to(model.state_dict()[key].dtype) for key, value in halves.items()}, paths[1])
    options = dict(pretrained=True, num_classes=3, in_chans=3, img_size=64)
    states = [
        timm.create_model(
            'test_vitresnet', pretrained_cfg_overlay=dict(file=str(path), num_classes=3), **options
        ).state_dict()
        for path in paths
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) and value.dtype == states[1][key].dtype, key
    assert not torch.equal(states[0]['pos_embed'], states[0]['pos_embed'].half().float())
    halved = timm.create_model(
        'test_vitresnet', pretrained_cfg_overlay=dict(file=str(paths[1]), num_classes=3), dtype=torch.half, **options
    )
    assert torch.equal(halved.pos_embed, states[0]['pos_embed'].half())


def test_tags_name_whole_hub_ids():
    for name, default_cfg in vitresnet.default_cfgs.items():
        for tag, cfg in default_cfg.cfgs.items():
            if cfg.has_weights and not cfg.file:
                assert cfg.hf_hub_id.count('/') == 1 and not cfg.hf_hub_id.endswith('/'), (name, tag)
            assert not cfg.fixed_input_size


def test_weights_that_were_pooled_give_features_without_pooling(tmp_path):
    """The norm behind the mean is that of all tokens where there is no mean."""
    model = randomise_(timm.create_model('test_vitresnet', class_token=False, global_pool='avg', num_classes=3)).eval()
    timm_vitres.save(model, tmp_path / 'model')
    name = f'local-dir:{tmp_path / "model"}'
    features = timm.create_model(name, pretrained=True, num_classes=0, global_pool='').eval()
    x = torch.randn(1, 3, 64, 96)
    model.reset_classifier(0, '')
    assert torch.equal(features(x), model(x))


def test_what_timm_does_with_keys_is_no_argument():
    for name, value in (('pretrained_filter_fn', lambda *args: args[0]), ('pretrained_strict', False)):
        with pytest.raises(TypeError, match=f'^{name}: is no argument of VitResNet'):
            timm.create_model('vitresnet_nano.openclipart', pretrained=True, **{name: value})


@pytest.mark.parametrize('channels', [1, 6])
def test_other_channels_are_adapted_only_where_they_are_asked_for(channels, tmp_path):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3, in_chans=channels))
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    options = dict(pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pth')))
    with pytest.raises(RuntimeError, match=f'is of images of {channels} channels, the model of 3; give in_chans='):
        timm.create_model('test_vitresnet', **options)
    loaded = timm.create_model('test_vitresnet', in_chans=channels, **options)
    assert torch.equal(
        loaded.get_parameter(f'{loaded.first_conv}.weight'), model.state_dict()[f'{model.first_conv}.weight']
    )
    adapted = timm.create_model('test_vitresnet', in_chans=3, **options)
    expected = adapt_input_conv(3, model.state_dict()[f'{model.first_conv}.weight'], base_chans=channels)
    assert torch.equal(adapted.get_parameter(f'{adapted.first_conv}.weight'), expected)


@pytest.mark.parametrize('in_chans', [2, 4, 7])
def test_what_is_adapted_can_be_saved_by_timm(in_chans, tmp_path):
    torch.save(timm.create_model('test_vitresnet', num_classes=3).state_dict(), tmp_path / 'w.pth')
    overlay = dict(file=str(tmp_path / 'w.pth'))
    model = timm.create_model(
        'test_vitresnet', pretrained=True, num_classes=3, in_chans=in_chans, pretrained_cfg_overlay=overlay
    )
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    timm.models.save_for_hf(model, tmp_path / 'hub', safe_serialization=True)


def test_names_of_classes_are_of_the_weights_that_know_them(tmp_path):
    """As many classes as those of weights in the registry are not those classes."""
    name = 'vitresnet_mix_nano.fmnist'
    known = timm.create_model(name, pretrained=True)
    assert known.pretrained_cfg['label_names'][0] == 'T-shirt/top'
    assert 'label_names' not in timm.create_model(name).pretrained_cfg
    torch.save(known.state_dict(), tmp_path / 'mine.pth')
    own = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.pth')))
    assert 'label_names' not in own.pretrained_cfg
    told = dict(file=str(tmp_path / 'mine.pth'), label_names=list('abcdefghij'))
    assert timm.create_model(name, pretrained_cfg_overlay=told).pretrained_cfg['label_names'] == list('abcdefghij')
    folder = timm_vitres.save(known, tmp_path / 'saved')
    assert timm.create_model(f'local-dir:{folder}').pretrained_cfg['label_names'][0] == 'T-shirt/top'
