from pathlib import Path

import numpy as np
import pytest

from timm_vitres.labels import normalise_label_names


@pytest.mark.parametrize(
    'names, expected',
    [
        (('cat', 'dog'), ['cat', 'dog']),
        ({'1': 'dog', '0': 'cat'}, ['cat', 'dog']),
        ({1: 'dog', 0: 'cat'}, ['cat', 'dog']),
        ({str(index): f'class {index}' for index in range(12)}, [f'class {index}' for index in range(12)]),
        (np.array(['cat', 'dog']), ['cat', 'dog']),
        ([np.int64(7), 8, 0.5], ['7', '8', '0.5']),
        ([Path('cats') / 'old', np.str_('dog')], [str(Path('cats') / 'old'), 'dog']),
        ([], []),
    ],
)
def test_names_become_plain_strings(names, expected):
    found = normalise_label_names(names, len(expected))
    assert found == expected and all(type(name) is str for name in found)


@pytest.mark.parametrize(
    'names, message',
    [
        (['cat'], 'label_names: got 1, but the model has 2 classes'),
        ({'0': 'cat', '1': 'dog', '2': 'cow'}, 'label_names: got 3, but the model has 2 classes'),
        ({'0': 'cat', '2': 'dog'}, "with the keys '0', '2', expected 0 to 1"),
        ({'cat': 0, 'dog': 1}, "with the keys 'cat', 'dog', expected 0 to 1"),
        ({'0': 'cat', 0: 'dog'}, "with the keys '0', 0, expected 0 to 1"),
        ('ab', "got 'ab', expected a list of names"),
        ({'cat', 'dog'}, 'expected a list of names'),
        (2, 'got 2, expected a list of names'),
        (None, 'got None, expected a list of names'),
        (['cat', b'dog'], "the name of class 1 is b'dog', which is bytes"),
        ([None, 'dog'], 'the name of class 0 is None, which is NoneType'),
        (['cat', ['dog']], r"the name of class 1 is \['dog'\], which is list"),
    ],
)
def test_what_is_no_list_of_names_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        normalise_label_names(names, 2)
