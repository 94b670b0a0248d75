"""All images below a folder on bad days: links, circles, what can not be read, what other programs keep there."""

import os

import numpy as np
import pytest
from conftest import write_folder

from timm_vitres import walking
from timm_vitres.data import find_files
from timm_vitres.training.datasets import ImageFolder
from timm_vitres.walking import find_images


def test_a_file_system_without_inodes(image_folder, monkeypatch):
    """Some of Windows' network drives say 0 for every file and folder."""
    status = os.stat

    def numberless(path, **kwargs):
        return os.stat_result([*status(path, **kwargs)[:1], 0, *status(path, **kwargs)[2:]])

    expected = find_images(image_folder)
    (image_folder / 'down' / 'up').symlink_to(image_folder)
    monkeypatch.setattr(os, 'stat', numberless)
    found = find_images(image_folder)
    assert found.images == expected.images and len(found.images) == 24
    assert found.left_out == {str(image_folder / 'down' / 'up'): 'a link that leads in a circle'}


def test_links_in_circles_and_to_other_folders(image_folder, tmp_path):
    outside = write_folder(tmp_path / 'outside', per_class=2)
    (image_folder / 'down' / 'up').symlink_to(image_folder)
    (image_folder / 'down' / 'top').symlink_to('/')
    (image_folder / 'down' / 'self').symlink_to('self')
    (image_folder / 'across' / 'other').symlink_to(image_folder / 'down')
    (image_folder / 'linked').symlink_to(outside / 'down')  # a class may be elsewhere
    (outside / 'down' / 'back').symlink_to(image_folder / 'across')
    folder = ImageFolder(image_folder)
    assert folder.classes == ['across', 'down', 'linked'] and np.bincount(folder.targets).tolist() == [12, 12, 2]
    reasons = {os.path.relpath(path, image_folder): reason for path, reason in folder.left_out.items()}
    assert reasons == {
        'across/other': f'a link to {image_folder}/down, which is read already',
        'down/self': 'a link to nothing (self)',
        'down/top': 'a link that leads in a circle',
        'down/up': 'a link that leads in a circle',
        'linked/back': f'a link to {image_folder}/across, which is read already',
    }
    (image_folder / 'again').symlink_to('down')
    with pytest.raises(ValueError, match=r'again has no image, since it is a link to .*down, which is read already'):
        ImageFolder(image_folder)


def test_a_folder_that_cannot_be_read_is_named(image_folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('down'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match=r'the folder .*down cannot be read \(Permission denied\)'):
        ImageFolder(image_folder)


def test_an_image_that_the_system_refuses_is_an_error(image_folder, monkeypatch):
    status = os.stat

    def refuse(path, **kwargs):
        if str(path).endswith('3.png'):
            raise PermissionError(13, 'Permission denied', str(path))
        return status(path, **kwargs)

    monkeypatch.setattr(os, 'stat', refuse)
    with pytest.raises(PermissionError, match=r'3\.png cannot be read \(Permission denied\)'):
        ImageFolder(image_folder)
    (image_folder / 'down' / '3.png').unlink()
    (image_folder / 'across' / '3.png').rename(
        image_folder / 'across' / '.3.png'
    )  # what is left out anyway is no error
    found = ImageFolder(image_folder)
    assert found.left_out == {str(image_folder / 'across' / '.3.png'): 'Permission denied'}
    (image_folder / 'down' / 'more3.png').symlink_to(image_folder)
    with pytest.raises(PermissionError, match=r'more3\.png cannot be read'):
        ImageFolder(image_folder)


def test_a_file_under_several_names_is_one_to_train_on_and_several_to_predict(image_folder, caplog):
    """Stores of other programs (DVC, git-annex) keep each content once, and link every name to it."""
    (image_folder / 'down' / 'twin.png').hardlink_to(image_folder / 'down' / '1.png')
    (image_folder / 'down' / '10.png').unlink()
    (image_folder / 'down' / '10.png').symlink_to('2.png')
    found = find_images(image_folder / 'down')
    assert len(found.images) == 11 and found.same.keys() == {f'{image_folder}/down/{n}' for n in ('twin.png', '10.png')}
    names = [os.path.basename(path) for path in find_files([image_folder / 'down'])]
    assert names == [*(f'{index}.png' for index in range(12)), 'twin.png'] and not caplog.text


def test_what_is_left_out_is_not_counted_for_ever(image_folder, monkeypatch):
    monkeypatch.setattr(walking, 'MOST_COUNTED', 3)
    for index in range(5):
        (image_folder / '.cache' / str(index)).mkdir(parents=True)
        (image_folder / '.cache' / str(index) / 'object').write_text('')
    assert find_images(image_folder).left_out == {f'{image_folder}/.cache': 'hidden, with 3 files or more'}
