"""Every argument fits its annotation, or is refused by its name."""

import dataclasses
import json
import re
from collections import UserList
from typing import Literal, Optional, Tuple

import numpy as np
import pytest
import timm
import torch

from timm_vitres import checks


@pytest.mark.parametrize('name', ['vitresnet', 'test_vitresnet_dual'])
def test_numbers_of_numpy_are_numbers(name):
    changes = dict(embed_dim=np.int64(48), num_heads=np.int32(3), mlp_ratio=np.float32(2), qkv_bias=np.bool_(False))
    model = timm.create_model(name, device='meta', img_size=np.int64(64), num_classes=np.int64(5), **changes)
    assert [type(getattr(model.cfg, key)) for key in changes] == [int, int, float, bool]
    assert model.num_classes == 5
    assert type(model.num_classes) is int


@pytest.mark.parametrize('name', ['vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
@pytest.mark.parametrize('indices', [99, 0, True, (0, 99), (-99,), ('a',), 'last', 1.5, (), (0, 0)])
def test_wrong_levels_are_named(name, indices):
    with pytest.raises(ValueError, match=r'^out_indices: got'):
        timm.create_model(name, features_only=True, out_indices=indices, device='meta')


@pytest.mark.parametrize('name', ['vitresnet_small', 'test_vitresnet_dual'])
def test_unknown_arguments_are_answered_with_the_nearest(name):
    with pytest.raises(TypeError, match=r'^embed_dims: .* did you mean embed_dim'):
        timm.create_model(name, embed_dims=12, device='meta')


# Each row is a value, an annotation that it fits, and the plain value that it becomes
FITTING = [
    (np.int64(3), int, 3),
    (np.float32(0.5), float, 0.5),
    (2, float, 2.0),
    (np.int32(2), float, 2.0),
    (np.bool_(True), bool, True),
    (np.str_('a'), str, 'a'),
    (None, Optional[int], None),
    ([1, np.int8(2)], Tuple[int, ...], (1, 2)),
    ([0.5, (1, 2)], Tuple[float, Tuple[int, int]], (0.5, (1, 2))),
    (np.int64(7), checks.Size, 7),
    ([7, 9], checks.Size, (7, 9)),
    (range(2, 4), Tuple[int, ...], (2, 3)),
    (UserList([7, 9]), checks.Size, (7, 9)),  # as the lists of configs are that Hydra reads
    (np.int64(2), Literal[1, 2], 2),
    (None, Literal['a', None], None),
    (0, checks.Rate, 0.0),
    ('silu', checks.Activation, 'silu'),
    ('rmsnorm', checks.TokenNorm, 'rmsnorm'),
    ('groupnorm', checks.MapNorm, 'groupnorm'),
    ('meta', checks.Device, 'meta'),
    (torch.float16, checks.FloatType, torch.float16),
]
# Each row is a value, an annotation that it does not fit, and the end of the sentence that says so
MISFITS = [
    (True, int, 'a whole number'),
    (1.0, int, 'a whole number'),
    ('1', int, 'a whole number'),
    (None, int, 'a whole number'),
    (float('nan'), float, 'a number'),
    (float('-inf'), float, 'a number'),
    (10**400, float, 'a number'),
    (False, float, 'a number'),
    (1j, float, 'a number'),
    (1, bool, 'True or False'),
    (b'a', str, 'a string'),
    ('12', Tuple[int, ...], 'a tuple of values, each a whole number'),
    (b'12', Tuple[int, ...], 'a tuple of values, each a whole number'),
    ((), Tuple[int, ...], 'a tuple of values, each a whole number'),
    ({1: 2}, Tuple[int, ...], 'a tuple of values, each a whole number'),
    ((1, 2, 3), Tuple[int, int], 'a tuple of 2 values, each a whole number'),
    ((1, 'a'), Tuple[int, int], 'a tuple of 2 values, each a whole number'),
    ('a', Optional[int], 'a whole number'),
    ('c', Literal['a', 'b'], "one of 'a', 'b'"),
    (True, Literal[1, 2], 'one of 1, 2'),
    (None, Literal['a'], "one of 'a'"),
    (0, checks.Width, 'a whole number from 1 to 16384'),
    (1.0, checks.Rate, 'a number from 0 up to, but not including, 1'),
    (0, checks.Ratio, 'a number above 0 to 64.0'),
    ((5, 0), checks.Size, 'a whole number from 1 to 32768 or a tuple of 2 values, each a whole number from 1 to 32768'),
    ('batchnorm2d', checks.TokenNorm, "the name, which can be saved (a class can not), of a norm of timm's for tokens"),
    ('layernorm', checks.MapNorm, "the name, which can be saved (a class can not), of a norm of timm's for maps"),
    ('bent', checks.Activation, "an activation that timm's get_act_layer knows"),
    ('cuda:99', checks.Device, 'a device that torch can use here'),
    (torch.int64, checks.FloatType, 'torch.float32, float64, float16 or bfloat16'),
    (torch.nn.ReLU(), torch.Tensor, 'a Tensor'),
]


def show_type(value):
    """Return the type of a value, and for a tuple a list of the types in it, too."""
    return [type(value), *(show_type(one) for one in value)] if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize('value, annotation, expected', FITTING)
def test_what_fits_becomes_plain(value, annotation, expected):
    found = checks.conform('x', value, annotation)
    assert found == expected and show_type(found) == show_type(expected)


@pytest.mark.parametrize('value, annotation, expected', MISFITS)
def test_what_does_not_fit_is_named_with_what_is_allowed(value, annotation, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        checks.conform('x', value, annotation)
    sentence = str(caught.value)
    assert sentence.startswith(f'x: got {checks.show(value)}, expected ') and sentence.endswith('.')
    assert '\n' not in sentence


@pytest.mark.parametrize(
    'bounds, allowed, refused, expected',
    [
        ((1, 3), [1, 3], [0, 4], 'a whole number from 1 to 3'),
        ((0, 1.0), [0, 0.5, 1], [-0.001, 1.001], 'a number from 0 to 1.0'),
        ((0, 1.0, True), [0.001, 1], [0], 'a number above 0 to 1.0'),
        ((0, 1.0, False, True), [0, 0.999], [1], 'a number from 0 up to, but not including, 1'),
    ],
)
def test_bounds_belong_to_a_range_or_do_not(bounds, allowed, refused, expected):
    rule = checks.between(*bounds)
    assert [value for value in (*allowed, *refused) if rule.allows(value)] == allowed
    assert rule.expected == expected


@checks.checked
def area(height: checks.ImageSide, width: Optional[checks.ImageSide] = None, note='', *, unit: str = 'px') -> tuple:
    """Return the arguments that arrived."""
    return height, width, note, unit


def test_a_checked_function_gets_plain_arguments():
    assert area.__name__ == 'area' and area.__doc__ == 'Return the arguments that arrived.'
    assert area(np.int64(3)) == (3, None, '', 'px')
    found = area(np.int64(3), width=np.int32(4), note=[5], unit=np.str_('mm'))
    assert found == (3, 4, [5], 'mm') and show_type(found) == [tuple, int, int, list, str]


@pytest.mark.parametrize(
    'args, kwargs, error, message',
    [
        ((0,), {}, ValueError, 'height: got 0, expected a whole number from 1 to 32768'),
        ((1, 2.5), {}, ValueError, r'width: got 2\.5, expected a whole number'),
        ((1,), dict(unit=1), ValueError, 'unit: got 1, expected a string'),
        ((), {}, TypeError, "area: missing a required argument: 'height'"),
        ((1,), dict(heigth=2), TypeError, "area: got an unexpected keyword argument 'heigth'"),
    ],
)
def test_a_checked_function_refuses_by_name(args, kwargs, error, message):
    with pytest.raises(error, match=f'^{message}'):
        area(*args, **kwargs)


def test_what_a_run_records_is_what_json_gives_back():
    value = dict(a=[1, np.int64(2)], b=dict(c=(None, True, 'text', np.float64(0.25))), d=())
    found = checks.plain('x', value)
    assert found == dict(a=(1, 2), b=dict(c=(None, True, 'text', 0.25)), d=())
    assert type(found['a'][1]) is int and type(found['b']['c'][3]) is float
    assert checks.plain('x', json.loads(json.dumps(found))) == found


@pytest.mark.parametrize(
    'value, error, message',
    [
        (dict(a=[0, float('nan')]), ValueError, 'x: a: got nan, expected a finite number'),
        (np.float32('inf'), ValueError, 'x: got inf, expected a finite number'),
        (dict(a=dict(b=print)), TypeError, 'x: a: b: got <built-in function print>, which a run can not record'),
        ({1: 2}, TypeError, r'x: got \{1: 2\}, which a run can not record'),
        ([np.ones(2)], TypeError, r'x: got array\(\[1\., 1\.\]\), which a run can not record'),
        ({'a', 'b'}, TypeError, 'x: got .* which a run can not record; give numbers, text, tuples and dicts'),
    ],
)
def test_what_no_run_can_record_is_named(value, error, message):
    with pytest.raises(error, match=f'^{message}'):
        checks.plain('x', value)


def test_names_that_are_near_are_offered():
    checks.check_known(['width', 'depth'], ['depth', 'width'], 'Model')
    checks.check_known([], [], 'Model')
    for name, hint in (('dept', '; did you mean depth[?]'), ('zzz', '[.]'), ('widths', '; did you mean width[?]')):
        with pytest.raises(TypeError, match=f'^{name}: is no argument of Model{hint}$'):
            checks.check_known(['depth', name], ['depth', 'width'], 'Model')


def test_indices_of_levels():
    for indices, plain in ((2, 2), (np.int64(1), 1), ([0, -1], (0, -1)), ((-3, 2, 2), (-3, 2, 2))):
        assert checks.conform_indices('indices', indices, 3) == plain
    assert checks.conform_indices('indices', [0, -1], 3, distinct=True) == (0, -1)
    for indices in (0, 4, (3,), (-4,), (), True, 1.0, (0.0,), 'all'):
        with pytest.raises(
            ValueError, match=rf'^indices: got {re.escape(repr(indices))}, expected a whole number from 1'
        ):
            checks.conform_indices('indices', indices, 3)
    with pytest.raises(ValueError, match=r'^indices: got \[2, 0, -1\], expected every level once'):
        checks.conform_indices('indices', [2, 0, -1], 3, distinct=True)


def test_a_choice_is_one_of_its_kind():
    checks.check_choice('block', 'basic', ('basic', 'bottleneck'))
    with pytest.raises(ValueError, match=r"^block: got 'wide', expected one of 'basic', 'bottleneck'"):
        checks.check_choice('block', 'wide', ('basic', 'bottleneck'))
    checks.check_choice('stride', 2, (1, 2))
    with pytest.raises(ValueError, match=r'^stride: got True, expected one of 1, 2'):
        checks.check_choice('stride', True, (1, 2))


def test_what_is_shown_is_short_and_on_one_line():
    assert checks.show('a' * 78) == repr('a' * 78)
    assert checks.show('a' * 79) == "'" + 'a' * 76 + '...'
    assert checks.show(np.ones((2, 2))) == 'array([[1., 1.], [1., 1.]])'


def test_norms_are_told_apart_by_what_they_take():
    for name, tokens, maps in (
        ('layernorm', True, False),
        ('rmsnorm', True, False),
        ('batchnorm2d', False, True),
        ('groupnorm', False, True),
        ('groupnorm1', False, True),
        ('layernorm2d', False, True),
        ('evonorms0', False, True),
        ('norm', False, False),
    ):
        assert (checks.normalises_tokens(name), checks.normalises_maps(name)) == (tokens, maps), name


def test_arguments_of_a_model_belong_to_its_class_its_config_or_a_builder():
    @dataclasses.dataclass
    class Cfg:
        depth: checks.Count = 2

    class Model:
        def __init__(self, cfg: Cfg, num_classes: checks.NumClasses = 1000):
            self.cfg, self.num_classes = cfg, num_classes

    def build(variant, pretrained):
        """Take both arguments, as the functions of timm do."""

    given = dict(depth=np.int64(3), num_classes=np.int32(5), pretrained='anything', out_indices=[1])
    found = checks.conform_arguments(Model, Cfg(), given, build)
    assert found == dict(depth=3, num_classes=5, pretrained='anything', out_indices=[1])
    assert type(found['depth']) is type(found['num_classes']) is int
    with pytest.raises(ValueError, match=r'^depth: got 0, expected a whole number from 1 to 512'):
        checks.conform_arguments(Model, Cfg(), dict(depth=0))
    with pytest.raises(TypeError, match=r'^dept: is no argument of Model; did you mean depth'):
        checks.conform_arguments(Model, Cfg(), dict(dept=1))
    with pytest.raises(TypeError, match=r'^pretrained: is no argument of Model'):
        checks.conform_arguments(Model, Cfg(), dict(pretrained=True))


def test_some_words_of_many():
    assert (
        checks.some([]) == 'none' and checks.some('abc') == 'a, b, c' and checks.some('abcde') == 'a, b, c and 2 more'
    )
    assert checks.some((word for word in 'abcde'), 4, between='; ') == 'a; b; c; d and 1 more'


def test_the_first_sentence_of_an_error():
    assert checks.first_sentence(ValueError('it is so.\nAnd more. Still more')) == 'it is so'
    assert checks.first_sentence(ValueError('version 2.1 is needed')) == 'version 2.1 is needed'


def test_norms_are_known_where_parameters_are_made_on_meta(monkeypatch):
    """As accelerate's `init_empty_weights` makes them; and what was found there holds elsewhere."""
    register = torch.nn.Module.register_parameter

    def on_meta(self, name, parameter):
        register(self, name, None if parameter is None else torch.nn.Parameter(parameter.to('meta')))

    for known in (checks.normalises_tokens, checks.normalises_maps):
        known.cache_clear()
    monkeypatch.setattr(torch.nn.Module, 'register_parameter', on_meta)
    assert checks.normalises_tokens('rmsnorm') and checks.normalises_maps('groupnorm')
    assert not checks.normalises_tokens('batchnorm2d') and not checks.normalises_maps('no-such')
    monkeypatch.undo()
    assert timm.create_model('test_vitresnet', norm_layer='rmsnorm').norm.weight.device.type == 'cpu'
