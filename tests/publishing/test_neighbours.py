import json

import pytest
import timm

import timm_vitres
from timm_vitres.publishing.neighbours import began_with, crop_of, find_beside, normalisation_of


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
    assert found['architecture'] == 'vit_small_r26_s32_224'
    published = timm.get_pretrained_cfg('vit_small_r26_s32_224.augreg_in21k')
    assert found['pretrained_cfg']['crop_pct'] == published.crop_pct and published.mean == (0.5, 0.5, 0.5)
    assert tuple(found['pretrained_cfg']['mean']) == published.mean  # what timm knows of the tag
    assert began_with('hf-hub:timm/resnet50@main') == dict(architecture='resnet50')
    assert began_with('hf-hub:me/vit_small_r26_s32_224') == began_with('local-dir:timm/resnet50') == {}


def test_a_normalisation_in_timms_words():
    told = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3, rescale_factor=1 / 255, do_normalize=True)
    assert normalisation_of(told) == dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    assert normalisation_of(dict(image_mean=0.0, image_std=0.5)) == dict(mean=(0.0,), std=(0.5,))
    assert normalisation_of({}) == {}
    assert normalisation_of({**told, 'do_normalize': False}) == dict(mean=(0.0,), std=(1.0,))
    for wrong in (dict(rescale_factor=0), dict(rescale_factor='1/255'), dict(image_std=[0.0]), dict(image_mean='0.5')):
        with pytest.raises(
            ValueError, match=r'^preprocessor_config\.json: (rescale_factor|mean|std): got .+, expected'
        ):
            normalisation_of(wrong)
    # pixels from 0 to 2, as (x / 127.5 - 1) is what (x / 255 - 0.5) / 0.5 is
    other = normalisation_of(dict(image_mean=[1.0], image_std=[1.0], rescale_factor=1 / 127.5))
    assert other['mean'] == pytest.approx((0.5,)) and other['std'] == pytest.approx((0.5,))


def test_a_config_of_other_weights_beside_a_file_is_left_alone(tmp_path, caplog):
    """This package writes of which weights a config.json is."""
    timm_vitres.save(timm.create_model('test_vitresnet', num_classes=2), tmp_path)
    # a run's checkpoint, and what was made of it by other programs, are of the run; Google's files never are
    for name, is_its in (('last.pth.tar', True), ('averaged.pth', True), ('R26_S_32.npz', False)):
        (tmp_path / name).write_bytes(b'')
        caplog.clear()
        _, config, _, _ = find_beside(str(tmp_path / name))
        assert (config.get('architecture') == 'test_vitresnet') is is_its
        assert ('is of another model than R26_S_32.npz' in caplog.text) is not is_its


def test_a_crop_in_timms_words():
    assert crop_of(dict(size=256, crop_size=224, do_center_crop=True)) == dict(crop_pct=224 / 256)
    assert crop_of(dict(size=dict(height=384, width=384))) == dict(crop_pct=1.0, crop_mode='squash')
    # one number was both sides to all but ViTHybrid
    assert crop_of(dict(size=384, feature_extractor_type='DPTFeatureExtractor')) == dict(
        crop_pct=1.0, crop_mode='squash'
    )
    assert crop_of(dict(size=384, image_processor_type='ViTHybridImageProcessor')) == dict(crop_pct=1.0)
