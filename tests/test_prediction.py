import os

import numpy as np
import pytest
import timm
import torch
from conftest import draw, randomise_, rename_, stripes
from PIL import Image
from timm.utils import ModelEmaV3

from timm_vitres.data import preprocess
from timm_vitres.labels import label_names
from timm_vitres.prediction import predict, predict_each


def test_each_image_fails_for_itself(model, tmp_path):
    """Whatever stands among the images, the others are predicted, and every failure is one sentence with its path."""
    picture = stripes(40, True, np.random.default_rng(0))
    picture.save(tmp_path / 'good.png')
    (tmp_path / 'dangling.png').symlink_to(tmp_path / 'gone.png')
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'empty.png').write_text('')
    Image.new('RGB', (10000, 1)).save(tmp_path / 'line.png')
    bad = ['dangling.png', 'folder', 'pipe.png', 'empty.png', 'line.png', 'none.png']
    paths = [tmp_path / name for name in ('good.png', *bad, 'good.png')]
    predictions, failed = predict(model, paths)
    assert [prediction.image for prediction in predictions] == [str(tmp_path / 'good.png')] * 2
    assert predictions[0] == predictions[1]
    assert len(failed) == len(bad)
    for name, sentence in zip(bad, failed):
        assert f'{tmp_path / name} ' in f'{sentence} '.replace('. ', ' ') and len(sentence.splitlines()) == 1
    assert 'is a link to nothing' in failed[0] and 'is a folder' in failed[1]


def test_mistyped_exif_does_not_end_the_command(model, tmp_path):
    # orientation 6, and an ImageWidth that is text
    tags = b'\x02\0' + b'\x00\x01\x02\x00\x04\0\0\0wide' + b'\x12\x01\x03\x00\x01\0\0\0\x06\0\0\0' + bytes(4)
    picture = stripes(40, True, np.random.default_rng(0)).resize((60, 40))
    picture.save(tmp_path / 'tags.jpg', exif=b'Exif\0\0II*\0\x08\0\0\0' + tags)
    with Image.open(tmp_path / 'tags.jpg') as opened:
        opened.transpose(Image.Transpose.ROTATE_270).save(tmp_path / 'turned.png')
    predictions, failed = predict(model, [tmp_path / 'tags.jpg', tmp_path / 'turned.png'])
    assert not failed and predictions[0].probabilities == predictions[1].probabilities


def test_what_is_not_finite_is_no_prediction(model, tmp_path):
    stripes(40, True, np.random.default_rng(0)).save(tmp_path / 'good.png')
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    predictions, failed = predict(model, [tmp_path / 'good.png'])
    assert predictions == []
    assert len(failed) == 1 and 'good.png the model gives no finite numbers' in failed[0]


@pytest.mark.parametrize('tta', ['flip', 'shift'])
def test_a_prediction_may_be_of_several_views(tta, model, tmp_path):
    paths = [draw(tmp_path / f'{index}.png', index) for index in range(2)]
    found, _ = predict(model, paths, tta=tta)
    plain, _ = predict(model, paths)
    for path, prediction, alone in zip(paths, found, plain):
        x = preprocess(path, model)
        views = [x] if tta == 'flip' else [x, x, *moved(x)]
        logits = torch.stack([model(view) for one in views for view in (one, one.flip(-1))]).mean(0)[0]
        expected = dict(zip(label_names(model), logits.softmax(-1).tolist()))
        assert dict(zip(prediction.labels, prediction.probabilities)) == pytest.approx(expected, rel=1e-5)
        assert dict(zip(alone.labels, alone.probabilities)) != pytest.approx(expected, rel=1e-4)


def moved(x):
    """Return a batch moved by a pixel up and left, and down and right."""
    rows = torch.arange(32)
    for after in (torch.cat([rows[1:], rows[30:31]]), torch.cat([rows[1:2], rows[:-1]])):  # the edge is reflected
        yield x[..., after, :][..., after]


def test_mistakes_in_calls(model):
    with pytest.raises(TypeError, match=r'images: got the one path x\.png, expected a list'):
        predict(model, 'x.png')
    with pytest.raises(ValueError, match='topk: got 0'):
        predict(model, [], topk=0)
    with pytest.raises(ValueError, match="tta: got 'turn', expected one of '', 'flip', 'shift'"):
        predict(model, [], tta='turn')
    for topk in ('3', 2.5):
        with pytest.raises(ValueError, match=f'topk: got {topk!r}, expected a whole number from 1'):
            predict(model, [], topk=topk)
    with pytest.raises(ValueError, match='batch_size: got 0, expected a whole number from 1'):
        predict(model, [], batch_size=0)
    with pytest.raises(ValueError, match='workers: got -1, expected a whole number from 0'):
        predict_each(model, [], workers=-1)  # at once, not when its first result is asked for
    assert predict(model, set()) == predict(model, {}.keys()) == ([], [])
    for images, kind in ((5, 'int'), (['x.png', Image.new('L', (4, 4))], 'Image'), ([3], 'int')):
        with pytest.raises(TypeError, match=f'images: got {kind}, expected a list of paths'):
            predict(model, images)
    with pytest.raises(TypeError, match=r'model: got str, expected a torch\.nn\.Module'):
        predict('test_vitresnet', [])
    for name, options in (
        ('test_vitresnet', dict(num_classes=0)),
        ('test_vitresnet', dict(features_only=True)),
        ('test_vitresnet', dict(num_classes=3, global_pool='')),
        ('test_vitresnet_dual', dict(num_classes=3, global_pool='')),
    ):
        with pytest.raises(ValueError, match='model: it has no classes, or does not pool'):
            predict(timm.create_model(name, **options), [])
    # a mistake of the model is no image's
    with pytest.raises(ValueError, match='in_chans: the model takes 2'):
        predict(timm.create_model('test_vitresnet', in_chans=2), ['x.png', 'y.png'])


def test_a_compiled_model_and_averaged_weights_predict(model, tmp_path):
    path = draw(tmp_path / 'x.png')
    expected = predict(model, [path])
    assert not expected[1]
    for wrapped in (torch.compile(model, backend='eager'), ModelEmaV3(model)):
        assert predict(wrapped, [path]) == expected


@pytest.mark.parametrize('dictionary', [{'0': 'cat', '1': 'dog', '2': 'owl'}, {2: 'owl', 0: 'cat', 1: 'dog'}])
def test_names_in_a_dict(model, dictionary):
    assert label_names(rename_(model, dictionary)) == ['cat', 'dog', 'owl']


@pytest.mark.parametrize('names', [{'0': 'cat', '1': 'dog'}, {'1': 'cat', '2': 'dog', '3': 'owl'}, {'cat': 0}, ['cat']])
def test_names_that_are_not_of_these_classes(model, names):
    assert label_names(rename_(model, names)) == ['class 0', 'class 1', 'class 2']


def test_a_model_in_training_mode_predicts_as_it_does_in_evaluation_and_learns_nothing(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / 'a.png')
    model = randomise_(timm.create_model('test_vitresnet_mix', num_classes=3, drop_rate=0.5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = predict(model.eval(), [tmp_path / 'a.png'])
    model.train().head.eval()
    assert predict(model, [tmp_path / 'a.png']) == expected
    assert model.training and model.stages[0].training and not model.head.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_that_keeps_what_it_computed_in_evaluation_drops_it(tmp_path):
    """timm's LeViT and TinyViT keep their attention's biases until their mode changes."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / 'a.png')
    model = randomise_(timm.create_model('levit_128s', num_classes=3))
    predict(model.train(), [tmp_path / 'a.png'])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'attention_biases' in name:
                parameter.normal_(std=20)
    told = predict(model, [tmp_path / 'a.png'])
    assert told == predict(model.train().eval(), [tmp_path / 'a.png'])


@pytest.mark.parametrize(('batch_size', 'workers'), [(1, 0), (3, 0), (4, 2)])
def test_images_in_batches_are_what_they_are_alone(batch_size, workers, model, tmp_path):
    paths = [draw(tmp_path / f'{index}.png', index) for index in range(7)]
    (tmp_path / 'bad.png').write_text('no picture')
    paths[3:3] = paths[5:5] = [tmp_path / 'bad.png', tmp_path / 'none.png']
    found = list(predict_each(model, paths, batch_size=batch_size, workers=workers))
    assert len(found) == len(paths)
    names = label_names(model)
    for path, result in zip(paths, found):
        if not path.name[0].isdigit():
            assert isinstance(result, str) and str(path) in result
            continue
        expected = model(preprocess(path, model))[0].softmax(-1).tolist()
        assert result.image == str(path)
        assert dict(zip(result.labels, result.probabilities)) == pytest.approx(dict(zip(names, expected)), rel=1e-4)


def test_one_image_without_finite_outputs_is_alone_in_its_batch(tmp_path):
    """Its neighbours are predicted; here a layer adds NaN to the brighter image."""
    Image.new('RGB', (32, 32), 'white').save(tmp_path / 'white.png')
    Image.new('RGB', (32, 32), 'black').save(tmp_path / 'black.png')
    model = randomise_(timm.create_model('test_vitresnet_mix', num_classes=3))
    spoilt = torch.nn.Sequential(model)
    spoilt.num_classes, spoilt.pretrained_cfg = 3, model.pretrained_cfg
    spoilt.register_forward_pre_hook(lambda _, inputs: torch.where(inputs[0] > 0, torch.nan, inputs[0]))
    dark, bright = predict_each(spoilt, [tmp_path / 'black.png', tmp_path / 'white.png'])
    assert dark.image.endswith('black.png') and 'white.png the model gives no finite numbers' in bright


def test_predictions_come_before_the_next_image_is_opened(model, tmp_path):
    first = draw(tmp_path / 'first.png')
    results = predict_each(model, [first, tmp_path / 'second.png'], batch_size=1)
    assert next(results).image == str(first)
    draw(tmp_path / 'second.png')
    assert next(results).image.endswith('second.png')
