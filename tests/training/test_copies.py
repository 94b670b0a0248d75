"""Files of the same content are found, whatever their names."""

import pytest

from timm_vitres.training import copies
from timm_vitres.training.copies import check_copies, check_left, find_copies


def write(folder, contents):
    files = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files.append((str(folder / name), len(content)))
    return files


def test_a_copy_is_that_of_the_first_that_has_its_content(tmp_path):
    files = write(tmp_path, {'a': b'12', 'b': b'21', 'c': b'12', 'd': b'12', 'e': b'1', 'f': b''})
    a = str(tmp_path / 'a')
    assert find_copies(files) == {str(tmp_path / 'c'): a, str(tmp_path / 'd'): a}
    assert find_copies(files[::-1]) == {a: str(tmp_path / 'd'), str(tmp_path / 'c'): str(tmp_path / 'd')}
    (tmp_path / 'c').unlink()  # others say what can't be read
    assert find_copies(files) == {str(tmp_path / 'd'): a}


def test_too_many_files_are_not_read(tmp_path, monkeypatch, caplog):
    files = write(tmp_path, {'a': b'1', 'b': b'1', 'c': b'2'})
    monkeypatch.setattr(copies, 'MANY', 3)
    assert find_copies(files) == {str(tmp_path / 'b'): str(tmp_path / 'a')}
    assert find_copies([*files, ('d', 2), ('e', 3)]) == find_copies(files)  # only those of equal size count
    monkeypatch.setattr(copies, 'MANY', 2)
    assert find_copies(files) is None and 'nobody looks for copies, since 3 images have the size' in caplog.text


def test_half_of_a_set_is_no_accident():
    check_copies({}, 0, 'test')
    check_copies({'t1': 'v1', 't2': 'v1'}, 3, 'validation')
    with pytest.raises(ValueError, match=r'^val_split: 2 of 4 validation images are copies of training'):
        check_copies({'t1': 'v1', 't2': 'v2'}, 4, 'validation')
    with pytest.raises(ValueError, match=r'^test_split: 1 of 2 test images'):
        check_copies({'t1': 'v1'}, 2, 'test')


def test_a_class_keeps_images_to_train_on():
    check_left('abb', 'ab')
    with pytest.raises(ValueError, match=r"^data_dir: all training images of class 'b' are copies of others; add some"):
        check_left('abbc', 'ca')


def test_files_that_begin_alike_are_told_apart(tmp_path):
    start = bytes(copies.BEGINNING)
    files = write(tmp_path, {'a': start + b'1', 'b': start + b'2', 'c': start + b'1'})
    assert find_copies(files) == {str(tmp_path / 'c'): str(tmp_path / 'a')}
