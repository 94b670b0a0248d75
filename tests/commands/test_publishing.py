import json

import pytest
import timm
import torch

from timm_vitres import cli

CONVERT = ['convert', 'weights.pth', '--output']


@pytest.fixture
def workplace(tmp_path, model_folder, monkeypatch):
    """A folder that holds a checkpoint."""
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True)
    torch.save(dict(arch='test_vitresnet', state_dict=model.state_dict()), tmp_path / 'weights.pth')
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_names_of_classes_are_read_as_they_are_written(workplace, capsys):
    """With a byte order mark, Windows' ends of lines, an empty last line, and any space within."""
    (workplace / 'names').write_bytes('\ufeffcat\r\nblue dog\r\nöwl\x85\u2028x\r\n\r\n'.encode())
    assert cli.main([*CONVERT, 'new', '--label-names', 'names']) == 0
    config = json.loads((workplace / 'new' / 'config.json').read_text())
    assert config['label_names'] == ['cat', 'blue dog', 'öwl\x85\u2028x']


def test_a_folder_that_is_there_and_empty_is_converted_to(workplace, capsys):
    assert cli.main([*CONVERT, 'empty']) == 0
    assert timm.create_model('local-dir:empty', pretrained=True).num_classes == 3
