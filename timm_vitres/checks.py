"""Arguments are what their annotations say: one checker for constructors, methods and the configs of models (those of a
run have their own, in `training.settings`).

An annotation is a plain type (bool, int, float, str), a choice (`Literal`), a tuple or `Optional` of them, or a type
with a rule (`Annotated[int, between(1, 64)]`). `conform` compares a value with it, and returns the value in plain
Python: a list becomes a tuple, and a number of NumPy's becomes a number of Python's.
"""

import codecs
import difflib
import functools
import importlib.util
import inspect
import math
import numbers
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Callable, Dict, Iterable, Literal, Optional, ParamSpec, Tuple, TypeVar, Union

import numpy as np
import torch
from timm.layers import get_act_layer, get_norm_act_layer, get_norm_layer


def read_text(name: str, path: Path) -> str:
    """Return an argument's file of text; ValueError where it is no UTF-8, OSError where it can't be read.

    What Windows' PowerShell writes (`>`) is UTF-16, which its first bytes tell.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode('utf-16' if is_utf16 else 'utf-8-sig')
        return text.replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{name}: {path} is no text in UTF-8 ({error}).') from error
    except OSError as error:
        raise OSError(f'{name}: {path} can not be read ({error.strerror}).') from error


def some(words: Iterable[str], limit: int = 3, between: str = ', ') -> str:
    """Return the first words, and how many there are besides: 'a, b, c and 4 more'; 'none' of none."""
    words = list(words)
    more = f' and {len(words) - limit} more' if len(words) > limit else ''
    return (between.join(words[:limit]) or 'none') + more


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of what an error says, without its end."""
    return on_one_line(error).partition('. ')[0].rstrip('.')


def usable_device(name: str) -> torch.device:
    """Return a device; ValueError where nothing can be computed on it here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # 'meta' can't do this, nor can a device that is missing
    except Exception as error:  # torch raises errors of many kinds
        raise ValueError(f'device: got {name!r}, which can not be used here ({first_sentence(error)}).') from error
    return device


def plain(name: str, value: Any) -> Any:
    """Return a value as plain numbers, text, tuples and dicts, which JSON can hold.

    Raises:
        TypeError, ValueError: for anything else; a run could not record it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{name}: got {value}, expected a finite number.')
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(plain(name, one) for one in value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(f'{name}: {key}', one) for key, one in value.items()}
    raise TypeError(f'{name}: got {value!r}, which a run can not record; give numbers, text, tuples and dicts.')


Params = ParamSpec('Params')
Result = TypeVar('Result')


@dataclass(frozen=True)
class Rule:
    """A condition that a value must meet, beside its type."""

    allows: Callable[[Any], bool]
    expected: str  # the text ends the sentence 'got ..., expected'


def between(low: float, high: float, above: bool = False, below: bool = False) -> Rule:
    """Return the rule that a number is from `low` to `high`; `above` excludes `low` itself, `below` excludes `high`."""

    def allows(value: float) -> bool:
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    kind = 'a whole number' if isinstance(low, int) and isinstance(high, int) else 'a number'
    start = f'above {low:g}' if above else f'from {low:g}'
    end = f'up to, but not including, {high:g}' if below else f'to {high}'
    return Rule(allows, f'{kind} {start} {end}')


def _has_device(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        return False
    try:
        torch.empty(0, device=value)
    except Exception:  # torch raises errors of several kinds for a device that it can't use
        return False
    return True


@functools.cache
def normalises_tokens(name: str) -> bool:
    """Return whether a norm of timm's takes tokens (B, N, D)."""
    try:
        layer = get_norm_layer(name)(8).to('meta')  # pyright: ignore[reportOptionalCall]
        return layer(torch.ones(2, 3, 8, device='meta')).shape == (2, 3, 8)
    except Exception:  # the name is unknown, or the layer takes another number of dimensions
        return False


@functools.cache
def normalises_maps(name: str) -> bool:
    """Return whether a norm of timm's takes the maps (B, C, H, W) of a ResNet."""
    for find in (get_norm_layer, get_norm_act_layer):  # the first is for `ResNet`, the second for `ResNetV2`
        try:
            layer = find(name)(64).to('meta')  # pyright: ignore[reportOptionalCall]
            if layer(torch.ones(2, 64, 3, 5, device='meta')).shape == (2, 64, 3, 5):
                return True
        except Exception:  # the name is unknown here, or the layer takes no maps
            continue
    return False


def _is_activation(name: str) -> bool:
    try:
        return get_act_layer(name) is not None
    except KeyError:
        return False


# The bounds are generous: they keep a mistyped number from taking all memory, or all day
MAX_BATCH = 2**20
Width = Annotated[int, between(1, 16384)]
Count = Annotated[int, between(1, 512)]
Factor = Annotated[int, between(1, 1024)]
Ratio = Annotated[float, between(0, 64.0, above=True)]
Rate = Annotated[float, between(0, 1.0, below=True)]
PatchSide = Annotated[int, between(1, 1024)]
ImageSide = Annotated[int, between(1, 32768)]
Size = Union[ImageSide, Tuple[ImageSide, ImageSide]]
NumClasses = Annotated[int, between(0, 2**24)]
Device = Annotated[Any, Rule(_has_device, "a device that torch can use here, such as 'cpu', 'meta' or 'cuda:0'")]
FloatType = Annotated[
    torch.dtype,
    Rule(
        lambda dtype: dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        'torch.float32, float64, float16 or bfloat16',
    ),
]
_NAME = 'the name, which can be saved (a class can not), of'
TokenNorm = Annotated[str, Rule(normalises_tokens, f"{_NAME} a norm of timm's for tokens: 'layernorm', 'rmsnorm', ...")]
MapNorm = Annotated[str, Rule(normalises_maps, f"{_NAME} a norm of timm's for maps: 'batchnorm2d', 'groupnorm', ...")]
Activation = Annotated[str, Rule(_is_activation, f"{_NAME} an activation that timm's get_act_layer knows")]
WeightInit = Literal['', 'jax', 'jax_nlhb', 'moco', 'reset', 'skip']


class _Misfit(Exception):
    pass


def conform(name: str, value: Any, annotation: Any) -> Any:
    """Return a value as plain Python, if it is what an annotation says.

    Raises:
        ValueError: where it is not; the message has the name, the value, and what is allowed.
    """
    try:
        return _fit(value, annotation)
    except _Misfit:
        raise ValueError(f'{name}: got {show(value)}, expected {_describe(annotation)}.') from None


def checked(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function so that its arguments are compared with its annotations, and arrive as plain Python.

    Raises:
        ValueError: in a call, for an argument that is not what its annotation says.
        TypeError: in a call, for an argument that the function does not take.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f'{function.__qualname__}: {error}.') from None
        for name, annotation in annotations_of(function).items():
            if name in bound.arguments:
                bound.arguments[name] = conform(name, bound.arguments[name], annotation)
        return function(*bound.args, **bound.kwargs)

    return wrapper


def annotations_of(function: Any) -> Dict[str, Any]:
    """Return the annotations of a function's arguments, or of a class's fields, by name."""
    hints = typing.get_type_hints(function, include_extras=True)
    hints.pop('return', None)
    return hints


def check_known(names: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise TypeError, with the nearest of the known names, for a name that is not known."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f'; did you mean {" or ".join(near)}?' if near else '.'
            raise TypeError(f'{name}: is no argument of {owner}{hint}')


def conform_arguments(model_cls: type, cfg: Any, kwargs: Dict[str, Any], *builders: Callable) -> Dict[str, Any]:
    """Return a model's keyword arguments in plain Python; each is an argument of its class or a field of its config.

    Args:
        builders: Functions that take some of the arguments for themselves.

    Raises:
        TypeError: for an argument that nobody knows.
        ValueError: for an argument that is not what its annotation says.
    """
    annotations = {**annotations_of(model_cls.__init__), **annotations_of(type(cfg))}
    features = ('features_only', 'out_indices', 'feature_cls')  # timm's builder takes these from its kwargs
    taken = {name for builder in builders for name in inspect.signature(builder).parameters}
    check_known(kwargs, {*annotations, *features, *taken}, model_cls.__name__)
    return {
        name: conform(name, value, annotations[name]) if name in annotations else value
        for name, value in kwargs.items()
    }


def conform_indices(name: str, indices: Any, number: int, distinct: bool = False) -> Any:
    """Return indices of `number` features as timm takes them: an int n (the last n) or a tuple of indices."""
    each = Annotated[int, between(-number, number - 1)]
    plain = conform(name, indices, Union[Annotated[int, between(1, number)], Tuple[each, ...]])
    if distinct and isinstance(plain, tuple) and len({index % number for index in plain}) < len(plain):
        raise ValueError(f'{name}: got {indices!r}, expected every level once.')
    return plain


def check_choice(name: str, value: Any, choices: Tuple[Any, ...]) -> None:
    """Raise ValueError unless a value is one of `choices`."""
    conform(name, value, Literal[choices])  # pyright: ignore[reportInvalidTypeArguments]


def on_one_line(error: BaseException) -> str:
    """Return what an error says, on one line; the name of its class where it says nothing."""
    return ' '.join(str(error).split()) or type(error).__name__


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules has None in its place
        return False


def show(value: Any) -> str:
    """Return a value as code, on one line, cut to 80 characters."""
    text = ' '.join(repr(value).split())
    return text if len(text) <= 80 else f'{text[:77]}...'


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        value = _fit(value, args[0])
        if not all(rule.allows(value) for rule in args[1:]):
            raise _Misfit
        return value
    if origin is Union:
        for option in args:
            try:
                return _fit(value, option)
            except _Misfit:
                continue
        raise _Misfit
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) == 0:
            raise _Misfit
        options = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(options) != len(value):
            raise _Misfit
        return tuple(_fit(item, option) for item, option in zip(value, options))
    if origin is Literal:
        for choice in args:
            if choice is None and value is None:
                return None
            try:
                if choice is not None and _fit(value, type(choice)) == choice:
                    return choice
            except _Misfit:
                continue
        raise _Misfit
    return _fit_plain(value, annotation)


def _fit_plain(value: Any, kind: Any) -> Any:
    if kind is Any:
        return value
    if kind is bool and isinstance(value, (bool, np.bool_)):
        return bool(value)
    if kind is str and isinstance(value, str):
        return str(value)
    if kind in (int, float) and isinstance(value, bool):
        raise _Misfit
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            raise _Misfit from None
        if math.isfinite(number):
            return number
    elif kind not in (bool, str, int) and isinstance(value, kind):
        return value
    raise _Misfit


def _describe(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return args[1].expected
    if origin is Union:
        return ' or '.join(_describe(option) for option in args if option is not type(None))
    if origin is tuple:
        number = 'a tuple of values' if args[-1] is Ellipsis else f'a tuple of {len(args)} values'
        return f'{number}, each {_describe(args[0])}'
    if origin is Literal:
        return f'one of {", ".join(repr(choice) for choice in args if choice is not None)}'
    plain: Dict[Any, Optional[str]] = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string'}
    return plain.get(annotation) or f'a {annotation.__name__}'
