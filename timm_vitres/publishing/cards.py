"""Model cards: facts -> `render_card` -> README.md; an older card and a new one -> `merge_cards`.

The head of a card is YAML that the Hub reads (task, licence, results); its text keeps to what was measured.
"""

import hashlib
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from timm.models import get_pretrained_cfg
from torch import nn

from ..checks import on_one_line
from ..data import data_config as model_data_config
from ..labels import own_names, printable
from ..weights.checksums import SHA256_FIELD
from ..weights.files import CARD_HEAD, CARD_NAME, CURVES_NAME

_logger = logging.getLogger(__name__)
TEMPLATE = Path(__file__).with_name('card.md')
# this package writes its part of a card between these marks, and replaces that part when it writes again
# (a mark that lost its fellow is text of the user's)
OURS = re.compile(r'<!-- timm-vitres:(?:(?!<!-- timm-vitres:).)*?<!-- end of timm-vitres -->', re.DOTALL)
RESULT = re.compile(r'\n## Result\n.*?(?=\n## )', re.DOTALL)  # a section of that part
FACTS = re.compile(r'^- Architecture: `.*\n- Input: .*\n- Classes \([^\r\n]*', re.MULTILINE)  # lines of it
USE = re.compile(r'\n## Use\n(?!.*\n## Use\n).*?(?=\n<!-- end of)', re.DOTALL)
UNMEASURED = 'Not measured.'
UNKNOWN = 'The recipe is not known.'
MEASURED = 'Measured after epoch'  # so the note on a run's result begins
PACKAGE_TAG = 'timm-vitres'
DATASET_TYPE = 'imagefolder'  # of the data of results that this package writes
TASKS = {'image-classification', 'image-feature-extraction'}  # of a model with a head, and without
RENDERED = ('library_name', 'pipeline_tag', 'license')  # fields that this package writes by itself
TEXT_FIELD = 'card_text_sha256'  # of a pushed card's head: the user's text as it was pushed


def render_card(
    model: nn.Module,
    model_name: str,
    description: str,
    recipe: str,
    source: str,
    label_names: Sequence[str] = (),
    data_config: Optional[Dict[str, Any]] = None,
    results: Sequence[EvalResult] = (),
    result_note: str = '',
    license: Optional[str] = None,
    picture: Optional[str] = None,
) -> str:
    """Return a model card from facts.

    Args:
        model_name: The card's title.
        source: Name that `timm.create_model` takes ('local-dir:...' or 'hf-hub:...').
        results: The measured values; without any, the card says that nothing was measured.
        result_note: The data and the method of the measurement.
        picture: File beside the card that shows the training.
    """
    config = data_config or model_data_config(model)
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        tags=['timm', PACKAGE_TAG, task],
        license=license,
        model_name=model_name,
        eval_results=list(results) or None,
    )
    lines = [_line(result) for result in results]
    names = [_as_text(printable(str(name))) for name in label_names[:20]]
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE.read_text(encoding='utf-8'),
        model_name=_as_text(model_name),
        description=_as_text(description),
        architecture=model.pretrained_cfg['architecture'],
        parameters=f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M',
        input_size=tuple(config['input_size']),
        mean=tuple(config['mean']),
        std=tuple(config['std']),
        num_classes=model.num_classes,
        classes=(', '.join(names) + (', ...' if len(label_names) > len(names) else '')) or 'not named',
        result='\n'.join([*lines, '', _as_text(result_note)]) if lines else UNMEASURED,
        recipe=_as_text(recipe) + (f'\n\n![Loss and accuracy by epoch]({picture})' if picture else ''),
        source=repr(source),
    )
    return str(card).encode('utf-8', 'backslashreplace').decode('utf-8')  # files may have names that are no text


def plain_card(
    model: nn.Module,
    name: str,
    source: str,
    label_names: Sequence[str] = (),
    data_config: Optional[Dict[str, Any]] = None,
) -> str:
    """Return the card of a model of which nothing is known but what it is; names and preprocessing as in `save`."""
    architecture = model.pretrained_cfg['architecture']
    license = model.pretrained_cfg.get('license')
    with suppress(RuntimeError):  # a tag that timm does not know
        registered = get_pretrained_cfg(f'{architecture}.{model.pretrained_cfg.get("tag") or ""}'.rstrip('.'))
        # every model of the architecture has the registry's; another one came with weights from elsewhere
        license = None if registered is not None and registered.license == license else license
    return render_card(
        model,
        model_name=name,
        description=f'A `{architecture}` for timm, saved with timm-vitres.',
        recipe=UNKNOWN,
        source=source,
        label_names=label_names or own_names(model),
        data_config=data_config,
        license=license,
    )


def tells_of_run(card: str) -> Optional[bool]:
    """Return whether our part of a card tells of a run, whose curves lie beside it; None for a card without one."""
    block = OURS.search(card)
    return None if block is None else f']({CURVES_NAME})' in block.group(0) or MEASURED in block.group(0)


def _as_text(value: Any) -> str:
    """Return text whose lines hold no control characters and no tags, such as the marks of this package's part."""
    return '\n'.join(map(printable, str(value).split('\n'))).replace('<', '&lt;')


def fields_of(card: str) -> Dict[str, Any]:
    """Return the fields in the head of a card; none where it has no head, or one that is no YAML."""
    head, _ = _split(card)
    with suppress(yaml.YAMLError):
        fields = yaml.safe_load(head or '')
        return fields if isinstance(fields, dict) else {}
    return {}


def are_of_same_weights(old: str, new: str) -> bool:
    """Return whether two cards tell the same sha256."""
    sha256 = fields_of(old).get(SHA256_FIELD)
    return sha256 is not None and sha256 == fields_of(new).get(SHA256_FIELD)


def read_card(path: Path, name: str = '') -> Optional[str]:
    """Return the text of a card, None where there is none.

    Args:
        name: How sentences about it begin; its path by default.

    Raises:
        ValueError: for a card that is no UTF-8, or whose head the Hub would not understand; the message names it.
    """
    name = name or str(path)
    if not path.exists():
        return None
    try:
        card = path.read_bytes().decode('utf-8-sig')  # line ends stay as they are
    except UnicodeDecodeError as error:
        raise ValueError(f'{name}: is no UTF-8 text (byte {error.start} is not); save it as UTF-8.') from None
    except OSError as error:
        raise ValueError(f'{name}: can not be read ({error.strerror}).') from error
    check_card(card, name)
    return card


def check_card(card: str, name: str = CARD_NAME) -> None:
    """Raise ValueError, naming the card, if it has a head that is not YAML that the Hub understands."""
    head, _ = _split(card)
    if head is None and re.match(r'\s*---[ \t]+\r?\n\w+:', card):
        raise ValueError(f'{name}: the Hub sees no head where spaces follow its first ---; take them away.')
    if head is None and re.match(r'\s*---\r?\n\w+: ', card):
        raise ValueError(f"{name}: the head of the card has no end; close it with a line '---'.")
    try:
        ModelCard(card)
    except yaml.YAMLError as error:
        raise ValueError(
            f'{name}: the head of the card is no valid YAML; mend it ({on_one_line(error):.200}).'
        ) from error
    except Exception as error:  # fields of other types than the Hub knows fail in many ways
        raise ValueError(
            f'{name}: the head of the card is not one of a model; mend it ({on_one_line(error):.200}).'
        ) from error


def merge_cards(old: str, new: str) -> str:
    """Return an older card, brought up to date by a new one.

    The old head keeps its own fields, its tags, and its results on other data or metrics (all of them where they are of
    several models), but those that this package wrote of the model before; the lines of fields that stay are not
    rewritten. Between this package's marks stands what the new card has there. All other text is the user's. Where
    nobody has changed it since it was pushed (`TEXT_FIELD`), the new card's takes its place; else the old one stays,
    letter by letter, and what the new card has beside it is appended.

    Raises:
        ValueError: where the old card's head is not valid YAML.
    """
    check_card(old, f'{CARD_NAME} that is there')
    head, text = _split(old)
    theirs = ModelCard(old) if head is not None else ModelCard('---\nlibrary_name: timm\n---\n')
    ours = ModelCard(new)
    data, tags, license = ours.data, theirs.data.tags or [], ours.data.license
    task, is_ours = theirs.data.get('pipeline_tag'), PACKAGE_TAG in tags
    stale = {task} & TASKS & set(tags) if is_ours and data.get('pipeline_tag') not in tags else set()  # of another head
    about = {SHA256_FIELD} | ({'pipeline_tag'} if stale else set())
    if _users(_split(new)[1]) or TEXT_FIELD not in theirs.data:  # else what was pushed of it is what it was
        about.add(TEXT_FIELD)
    if not is_ours and theirs.data.get('library_name') == 'transformers':  # whose weights are replaced by timm's
        about |= {'pipeline_tag', 'library_name'}
    asked = fields_of(new)
    for key, value in theirs.data.to_dict().items():
        if key not in ('model-index', 'tags') and (key not in about or data.get(key) is None):
            if asked.get(key) not in (None, value) and key not in (*RENDERED, TEXT_FIELD):
                _logger.warning('%s: its %s stays %r, not %r; change it there.', CARD_NAME, key, value, asked[key])
            data[key] = value
    data.tags = list(dict.fromkeys([*(tag for tag in tags if tag not in stale), *(ours.data.tags or [])]))
    if license and data.license != license:
        told = CARD_NAME, data.license, license
        _logger.warning('%s: its licence stays %s, but that of the weights is %s; change it there if it is so.', *told)
    replaced = {_about(result) for result in ours.data.eval_results or []}
    is_same = are_of_same_weights(old, new)  # else results that stand in the text go with it
    written = [] if is_same else ''.join(OURS.findall(text)).splitlines()

    def is_kept(result: EvalResult) -> bool:
        return _about(result) not in replaced and (result.dataset_type != DATASET_TYPE or _line(result) not in written)

    own = ours.data.to_dict().get('model-index')
    data.eval_results = [*filter(is_kept, theirs.data.eval_results or []), *(ours.data.eval_results or [])] or None
    data.model_name = theirs.data.model_name or ours.data.model_name
    # fields stay as the YAML has them: huggingface_hub drops those without a value, and makes one result of several on
    # data of one type
    head = head if head is not None else 'library_name: timm\n'
    raw = yaml.safe_load(head) or {}
    before, merged = theirs.data.to_dict(), data.to_dict()
    merged['model-index'] = _merged_index(raw.get('model-index'), merged.get('model-index'), own, is_kept)
    changed = {name: value for name, value in merged.items() if value is not None and before.get(name) != value}
    if changed.get('model-index') == raw.get('model-index'):
        changed.pop('model-index', None)
    if 'model-index' in raw or 'model-index' in changed:
        changed.pop('model_name', None)
    after = {**raw, **changed}
    for name in {*before} - {name for name, value in merged.items() if value is not None}:
        changed[name] = None
        after.pop(name, None)
    head = _with_fields(head, changed, after)
    new_text = _with_known(_split(new)[1], text) if is_same else _split(new)[1]
    return f'---\n{head}---\n{_merged(text, new_text, theirs.data.get(TEXT_FIELD), is_same)}'


def _merged_index(
    old: Optional[List[Any]],
    new: Optional[List[Any]],
    ours: Optional[List[Any]],
    is_kept: Callable[[EvalResult], bool],
) -> Optional[List[Any]]:
    """Return the results of a merged card: those of the old one that are kept, entry by entry as they are, and ours.

    Args:
        old: The old card's model-index; one of several models stays.
        new: That of all results that are kept and ours, as huggingface_hub writes it, for where there is no old one.
        ours: That of ours alone.
    """
    if not old or len(old) > 1:
        return old or new
    results = []
    for entry in old[0].get('results') or []:
        metrics = [metric for metric in entry.get('metrics') or [] if is_kept(_result_of(entry, metric))]
        if metrics:
            results.append(entry if len(metrics) == len(entry['metrics']) else {**entry, 'metrics': metrics})
    results += ours[0]['results'] if ours else []
    return [{**old[0], 'results': results}] if results else None


def _result_of(entry: Dict[str, Any], metric: Dict[str, Any]) -> EvalResult:
    """Return what huggingface_hub makes of a metric of an entry of a model-index."""
    return model_index_to_eval_results([{'name': '', 'results': [{**entry, 'metrics': [metric]}]}])[1][0]


def _with_known(new: str, old: str) -> str:
    """Return a card's text, with what an older one of the same weights knew and it does not: result, recipe, title."""
    there, block = OURS.search(old), OURS.search(new)
    if there is None or block is None or UNMEASURED not in block.group(0):
        return new
    known, told = there.group(0), block.group(0)
    if UNKNOWN in told:  # it knows what the model is, and no more
        merged = _with_part(USE, _with_part(FACTS, known, told), told)
    else:
        merged = _with_part(RESULT, told, known)
    return OURS.sub(lambda _: merged, new)


def with_facts(card: str, other: str) -> str:
    """Return a card as it is, but for what its part of ours says of architecture, input and classes: as the other's."""

    def renewed(block: 're.Match[str]') -> str:
        text = block.group(0)
        return _with_part(FACTS, text, other.replace('\n', '\r\n') if '\r\n' in text else other)

    return OURS.sub(renewed, card, count=1)


def _with_part(part: 're.Pattern[str]', text: str, other: str) -> str:
    """Return a text with its first part of a kind as another text has it; as it is where the other has none."""
    found = part.search(other)
    return part.sub(lambda _: found.group(0), text, count=1) if found else text


def _merged(old: str, new: str, pushed: Optional[str], is_same: bool) -> str:
    """Return the text of a merged card.

    Args:
        pushed: The sha256 of the user's part of the old one when it was pushed.
        is_same: Whether both are of the same weights.
    """
    if _users(new) and pushed == _digest(old):
        return new
    block = OURS.search(new)
    parts = _users(new) if pushed != _digest(new) else []  # what was pushed may have been taken away since
    if block and OURS.search(old):
        old = OURS.sub(lambda _: block.group(0), old, count=1)
    elif block:
        parts = [block.group(0), *parts]
    elif not is_same:  # what we wrote of the old weights is not true of these
        old = OURS.sub('', old)
    for part in parts:
        if part not in old:
            old = f'{old.rstrip()}\n\n{part}\n' if old.strip() else f'{part}\n'
    return old


def _users(text: str) -> List[str]:
    """Return the parts of a card's text that are not this package's."""
    return [part.strip() for part in OURS.split(text) if part.strip()]


def text_sha256(card: str) -> str:
    """Return the sha256 of the user's part of a card's text."""
    return _digest(_split(card)[1])


def _digest(text: str) -> str:
    return hashlib.sha256('\n\n'.join(_users(text)).encode()).hexdigest()


def _line(result: EvalResult) -> str:
    """Return a result as the text of a card tells it."""
    return f'- {result.metric_name or result.metric_type}: {result.metric_value}'


def _about(result: EvalResult) -> tuple:
    return (*result.unique_identifier, result.dataset_name, result.metric_type)


def _split(card: str) -> Tuple[Optional[str], str]:
    """Return a card's head without its marks, or None if it has no head, and the card's text."""
    found = CARD_HEAD.match(card)
    return (found.group(1), card[found.end() :]) if found else (None, card)


def _edited(head: str, changes: Dict[str, Any]) -> str:
    """Return a head with some fields set, or removed if their value is None; all other lines stay as they are."""
    fields: Dict[str, str] = {}
    name, above = '', ''  # comments belong to the field that they stand above
    for line in head.splitlines(keepends=True):
        if re.match(r'[^\s#-][^:]*:', line):
            name = line.partition(':')[0].strip('"\'')
            fields[name] = above + line
            above = ''
        elif line.strip() and not line.startswith('#'):
            fields[name] = fields.get(name, '') + above + line
            above = ''
        else:
            above += line
    for name, value in changes.items():
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000)
    return ''.join(field if field.endswith('\n') else f'{field}\n' for field in fields.values()) + above


def _with_fields(head: str, changes: Dict[str, Any], expected: Dict[str, Any]) -> str:
    """Return an edited head that means `expected`; YAML that has no line for each field is written anew."""
    written = yaml.safe_dump(expected, sort_keys=False, allow_unicode=True, width=1000)
    edited = _edited(head, changes)
    try:
        return edited if yaml.safe_load(edited) == yaml.safe_load(written) else written
    except yaml.YAMLError:
        return written


def set_field(card: str, name: str, value: Any) -> str:
    """Return a card with a field of its head set, or removed if `value` is None; nothing else is changed.

    Raises:
        ValueError: for a card whose head is not valid YAML.
    """
    check_card(card)
    head, text = _split(card)
    if head is None:
        return card if value is None else f'---\n{_edited("", {name: value})}---\n{card}'
    expected = {**(yaml.safe_load(head) or {}), name: value}
    if value is None:
        del expected[name]
    return f'---\n{_with_fields(head, {name: value}, expected)}---\n{text}'


def set_source(card: str, source: str) -> str:
    """Return a card whose snippet, where this package wrote it, loads the model by another name."""
    return OURS.sub(
        lambda block: re.sub(
            r"create_model\(['\"](local-dir|hf-hub):.*?(?=, pretrained)",
            lambda _: f'create_model({source!r}',
            block.group(0),
        ),
        card,
    )
