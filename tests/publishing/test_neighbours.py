import json

import pytest
import timm

import timm_vitres
from timm_vitres.publishing.neighbours import began_with, crop_of, find_beside


def test_weights_and_what_stands_beside_them(tmp_path):
    folder = timm_vitres.save(
        timm.create_model('test_vitresnet', num_classes=2), tmp_path / 'm', label_names=['a', 'b']
    )
    for source in (str(folder), f'local-dir:{folder}'):
        path, config, preprocessor, url = find_beside(source)
        assert path == folder / 'model.safetensors' and config['architecture'] == 'test_vitresnet'
        assert preprocessor == {} and url is None
    with pytest.raises(FileNotFoundError, match='there is no such file or folder'):
        find_beside(str(tmp_path / 'none'))


@pytest.mark.parametrize('form', ['new', 'old'])
def test_what_a_run_began_with(form, tmp_path):
    config = dict(architecture='vitresnet_nano', model_args=dict(depth=2), pretrained_cfg=dict(crop_pct=0.9))
    if form == 'old':  # timm wrote the pretrained cfg at the top
        config = dict(architecture='vitresnet_nano', model_args=dict(depth=2), crop_pct=0.9)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    found = began_with(f'local-dir:{tmp_path}')
    assert (found['architecture'], found['model_args']) == ('vitresnet_nano', dict(depth=2))
    assert found['pretrained_cfg']['crop_pct'] == 0.9


@pytest.mark.parametrize('text', ['', '[1]', '{}'])
def test_what_a_run_began_with_is_gone(text, tmp_path, caplog):
    (tmp_path / 'config.json').write_text(text)
    assert began_with(f'local-dir:{tmp_path}') == began_with(f'local-dir:{tmp_path / "none"}') == {}
    assert caplog.text.count('the model is found by its tensors') == 2


def test_timms_own_repositories_are_known_without_the_hub(monkeypatch):
    def hub_file(*args):
        raise OSError('no network')

    monkeypatch.setattr('timm_vitres.publishing.neighbours.hub_file', hub_file)
    found = began_with('hf-hub:timm/vit_small_r26_s32_224.augreg_in21k')
    assert found == dict(architecture='vit_small_r26_s32_224')
    assert began_with('hf-hub:timm/resnet50@main') == dict(architecture='resnet50')
    assert began_with('hf-hub:me/vit_small_r26_s32_224') == began_with('local-dir:timm/resnet50') == {}


def test_a_crop_in_timms_words():
    assert crop_of(dict(size=256, crop_size=224, do_center_crop=True)) == dict(crop_pct=224 / 256)
    assert crop_of(dict(size=dict(height=384, width=384))) == dict(crop_pct=1.0, crop_mode='squash')
