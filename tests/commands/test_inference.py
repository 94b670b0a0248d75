import json

import pytest
import timm
from PIL import Image

from timm_vitres import cli, preprocess
from timm_vitres.commands import inference


def test_predict_prints_a_table(model_folder, picture, capsys):
    assert cli.main(['predict', str(picture), '--model', f'local-dir:{model_folder}', '--topk', '2']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(str(picture)) and '%' in lines[0]
    assert {line.split()[-1] for line in lines} < {'cat', 'dog', 'owl'}


def test_predict_prints_json_and_draws(model_folder, picture, tmp_path, capsys):
    drawing = tmp_path / 'drawing.png'
    arguments = ['--model', f'local-dir:{model_folder}', '--json', '--plot', str(drawing)]
    assert cli.main(['predict', str(picture), str(picture), *arguments]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert len(predictions) == 2 and predictions[0]['image'] == str(picture)
    assert sum(predictions[0]['probabilities']) == pytest.approx(1, abs=1e-5)
    assert predictions[0]['probabilities'] == sorted(predictions[0]['probabilities'], reverse=True)
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True).eval()
    expected = model(preprocess(picture, model))[0].softmax(-1)
    names = ['cat', 'dog', 'owl']
    assert predictions[0]['labels'][0] == names[expected.argmax()]
    with Image.open(drawing) as image:
        assert image.size[0] > 300


def test_names_move_no_cursor(model_folder, picture, capsys):
    config = json.loads((model_folder / 'config.json').read_text())
    config['pretrained_cfg']['label_names'] = config['label_names'] = ['\x1b]0;title\x07', 'dog\n100%', 'owl']
    (model_folder / 'config.json').write_text(json.dumps(config))
    assert cli.main(['predict', str(picture), '--model', f'local-dir:{model_folder}']) == 0
    printed = capsys.readouterr().out
    assert '\x1b' not in printed and '\\x1b]0;title' in printed and len(printed.splitlines()) == 3


@pytest.mark.parametrize('tta', ['', 'flip'])
def test_predict_takes_the_views_it_is_asked_for(tta, model_folder, picture, capsys):
    options = ['--tta', tta] if tta else []
    assert cli.main(['predict', str(picture), '--model', f'local-dir:{model_folder}', '--json', *options]) == 0
    [found] = json.loads(capsys.readouterr().out)
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True).eval()
    x = preprocess(picture, model)
    logits = (model(x) + model(x.flip(-1))) / 2 if tta else model(x)
    expected = logits[0].softmax(-1).sort(descending=True).values.tolist()
    assert found['probabilities'] == pytest.approx(expected, abs=1e-5)
    if tta:
        assert model(x)[0].softmax(-1).max().item() != pytest.approx(expected[0], abs=1e-4)


def test_predict_names_what_it_cannot_read_and_goes_on(model_folder, picture, tmp_path, capsys):
    (tmp_path / 'bad.png').write_text('no picture')
    files = [str(tmp_path / name) for name in ('bad.png', 'none.png', 'picture.png')]
    assert cli.main(['predict', *files, '--model', f'local-dir:{model_folder}']) == 1
    printed = capsys.readouterr()
    assert 'picture.png' in printed.out and 'bad.png' in printed.err and 'none.png' in printed.err


def test_predict_takes_folders(model_folder, image_folder, tmp_path, capsys):
    (image_folder / 'notes.txt').write_text('no picture')
    files = sorted(str(path) for path in image_folder.rglob('*.png'))
    broken = image_folder / 'broken.png'
    command = ['predict', str(image_folder), '--model', f'local-dir:{model_folder}', '--batch-size', '3', '--json']
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert sorted(prediction['image'] for prediction in json.loads(printed.out)) == files
    assert 'notes.txt (no image, by its suffix)' in printed.err
    broken.write_text('no picture')
    assert cli.main([*command, '--workers', '1']) == 1
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == len(files) and str(broken) in printed.err
    (tmp_path / 'empty').mkdir()
    assert cli.main(['predict', str(tmp_path / 'empty'), '--model', 'nothing']) == 1
    assert 'images: there is none in' in capsys.readouterr().err


def test_json_is_whole_where_prediction_ends_early(model_folder, picture, monkeypatch, capsys):
    whole = inference.predict_each

    def predict_each(model, images, *args, **kwargs):
        yield from whole(model, images[:2])
        raise ValueError('the third is one too many.')

    monkeypatch.setattr(inference, 'predict_each', predict_each)
    command = ['predict', str(picture), str(picture), str(picture), '--model', f'local-dir:{model_folder}', '--json']
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 2 and 'one too many' in printed.err


def test_a_path_that_no_file_has_is_named_and_the_others_go_on(model_folder, picture, capsys):
    assert cli.main(['predict', 'x' * 300, str(picture), '--model', f'local-dir:{model_folder}']) == 1
    printed = capsys.readouterr()
    assert str(picture) in printed.out and 'xxx cannot be opened' in printed.err


def test_nothing_is_printed_of_nothing_readable(model_folder, tmp_path, capsys):
    assert cli.main(['predict', str(tmp_path / 'a.png'), '--model', f'local-dir:{model_folder}', '--json']) == 1
    assert capsys.readouterr().out == ''


def test_imagenet_classes_have_names():
    from timm_vitres.labels import label_names

    names = label_names(timm.create_model('vitresnet_small', device='meta'))
    assert len(names) == 1000 and 'tench' in names[0]
    assert label_names(timm.create_model('test_vitresnet', num_classes=2)) == ['class 0', 'class 1']
