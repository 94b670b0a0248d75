"""One graph for every size: TorchScript, torch.compile, torch.export, ONNX; and the files that `export` writes."""

import copy
import json
import os
import time
import zipfile

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import timm
import torch
from conftest import differs, draw, randomise_, relative_difference, write_folder
from torch.export import Dim

from timm_vitres import cli
from timm_vitres.data import example_images
from timm_vitres.explanation import explain
from timm_vitres.inference import exports
from timm_vitres.inference.exports import check_target, export, load
from timm_vitres.inference.formats import FORMATS
from timm_vitres.models import layers
from timm_vitres.models.base import ImageSizes
from timm_vitres.publishing import hub
from timm_vitres.writing import TEMPORARY

NAMES = ['vitresnet_tiny', 'vitresnet_small', 'vitresnet_nano', 'test_vitresnet']
NAMES += ['test_vitresnet_mix', 'test_vitresnet_dual', 'vitresnet_dual_tiny', 'vitresnet_dual_small_p32']
NAMES += ['vitresnet_mix_eca_bot26ts']
# name, features_only; capturing takes its time
QUICK = [('vitresnet_nano', False), ('vitresnet_nano', True), ('test_vitresnet', False)]
# torch 2.6 does not compile timm's features
CASES = [pytest.param(*case, marks=pytest.mark.recent) if case[1] else case for case in QUICK]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [(name, features_only) for name in NAMES for features_only in (False, True)]
    if case not in QUICK
]
# (B, H, W), none of which the graphs below are captured at
UNSEEN = [(1, 97, 161), (2, 384, 352), (3, 225, 250), (1, 33, 470)]


def create(name, features_only=False, **kwargs):
    model = timm.create_model(name, features_only=features_only, **kwargs)
    randomise_(model.model if features_only else model)
    return model.eval()


def as_list(outputs):
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def check(captured, model, tolerance=1e-5):
    for batch, height, width in UNSEEN:
        x = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            expected = as_list(model(x))
        with torch.no_grad():
            got = as_list(captured(x))
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            assert one.shape == other.shape
            assert relative_difference(one, other) < tolerance, (height, width)


def dynamic(at_least=33):
    """Every batch, height and width; torch.export wants two of everything that may vary, so two tokens a side."""
    return {0: Dim('batch'), 2: Dim('height', min=at_least, max=4096), 3: Dim('width', min=at_least, max=4096)}


@pytest.mark.parametrize('name', [*NAMES[:5], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[5:])])
def test_torchscript(name, tmp_path):
    model = create(name)
    torch.jit.script(model).save(str(tmp_path / 'model.pt'))
    check(torch.jit.load(str(tmp_path / 'model.pt')), model)


@pytest.mark.recent
@pytest.mark.parametrize(
    'name, features_only', [*CASES, pytest.param('vitresnet_mix_nano', False, marks=pytest.mark.slow)]
)
def test_torch_export(name, features_only, tmp_path):
    model = create(name, features_only)
    program = torch.export.export(model, (torch.randn(2, 3, 224, 224),), dynamic_shapes=(dynamic(),))
    torch.export.save(program, tmp_path / 'model.pt2')
    check(torch.export.load(tmp_path / 'model.pt2').module(), model)


@pytest.mark.recent
@pytest.mark.parametrize(
    'name, features_only',
    [
        pytest.param('vitresnet_small', False, marks=pytest.mark.slow),
        ('vitresnet_tiny', True),
        pytest.param('test_vitresnet_dual', False, marks=pytest.mark.slow),
        pytest.param('test_vitresnet_mix', False, marks=pytest.mark.slow),
        pytest.param('vitresnet_dual_small_p32', True, marks=pytest.mark.slow),
    ],
)
def test_onnx(name, features_only, tmp_path):
    model = create(name, features_only)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 224, 224),),
        path,
        dynamo=True,
        verbose=False,
        input_names=['image'],
        dynamic_shapes=(dynamic(),),
    )
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

    def run(x):
        return [torch.from_numpy(np.array(output)) for output in session.run(None, {'image': x.numpy()})]

    check(run, model)


@pytest.mark.parametrize('name, features_only', CASES)
def test_torch_compile_makes_one_graph(name, features_only):
    """No graph break, and no graph for every size either."""
    model = create(name, features_only)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    check(torch.compile(model, backend=backend, fullgraph=True, dynamic=True), model)
    assert 1 <= len(graphs) <= 4  # whether a patch needs padding, and one image or more, are graphs of their own


SHALLOW = dict(backbone='resnet18', stage=1, depth=1, embed_dim=48, num_heads=3)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('vitresnet', SHALLOW),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in NAMES[3:6]),
        pytest.param('vitresnet_tiny', {}, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_at_changing_sizes(name, kwargs, monkeypatch):
    """Gradients are those of the uncompiled model, position embeddings included."""
    torch._dynamo.reset()
    # as torch 2.7 to 2.13 have it in the graphs that they compile
    monkeypatch.setattr(layers, 'is_exporting', torch.compiler.is_compiling)
    model = timm.create_model(name, num_classes=3, **kwargs)
    randomise_(model).train()
    compiled = torch.compile(model, backend='aot_eager', dynamic=True)
    for height, width in [(160, 224), (128, 97)]:
        x = torch.randn(2, 3, height, width)
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().mean().backward()
            gradients.append({key: value.grad.clone() for key, value in model.named_parameters()})
        for key, expected in gradients[0].items():
            assert (gradients[1][key] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, key


def test_compiled_positions_are_resampled_in_float32_under_autocast():
    torch._dynamo.reset()
    table = torch.randn(1, 50, 8, requires_grad=True)

    def resampled(table):
        return layers.resample_pos_embed(table, (9, 11), (7, 7), 1)

    with torch.autocast('cpu', torch.bfloat16):
        found = torch.compile(resampled, backend='aot_eager')(table)
    torch.testing.assert_close(found, resampled(table), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    model = create('test_vitresnet')
    check(torch.compile(model, dynamic=True), model)


@pytest.mark.recent
def test_torch_fx():
    """timm's feature extraction by graph, at a size that was not traced."""
    model = create('test_vitresnet')
    graph = timm.models.GraphExtractNet(model, ['blocks.1.mlp.fc2', 'head'], return_dict=True)
    x = torch.randn(2, 3, 97, 161)
    with torch.inference_mode():
        assert relative_difference(graph(x)['head'], model(x)) < 1e-6


LAYERS = dict(backbone='resnet18', stage=1, depth=1, embed_dim=32, num_heads=2, num_classes=7)
TOLERANCE = {'fp32': 1e-5, 'bf16': 5e-2, 'int8': 8e-2}


@pytest.mark.recent
@pytest.mark.parametrize(
    'format, precision', [(row.name, precision) for row in FORMATS.values() for precision in row.precisions]
)
def test_files_for_runtimes(format, precision, tmp_path):
    """Float32 images of any size in, float32 logits out, and what a program needs to know beside them."""
    torch.manual_seed(0)  # how much int8 loses depends on the weights
    model = create('vitresnet', **LAYERS)
    row = FORMATS[format]
    path = tmp_path / 'new folder' / ('model' + (row.suffixes[0] if row.beside else ''))
    images = torch.randn(8, 3, 224, 224) if precision in row.needs_images else None
    exported = export(model, path, format, precision, example=images)
    files = [path.name, *(f'model{suffix}' for suffix in row.beside)]
    assert exported.path == path and sorted(file.name for file in path.parent.iterdir()) == sorted(files)
    assert format in exported.report and precision in exported.report
    run = load(path, format)
    for shape in ((1, 3, 224, 224), (3, 3, 97, 65)):
        x = torch.randn(shape)
        assert run(x).dtype == torch.float32
        assert relative_difference(run(x), model(x)) < TOLERANCE[precision]
    assert (exported.difference > 1e-5) == differs(format, precision)
    config = json.loads(config_of(path, format))
    assert config['input_size'] == [3, 224, 224] and len(config['mean']) == 3 and config['label_names'][6] == 'class 6'


def config_of(path, format):
    files = {'config.json': ''}
    if format == 'torchscript':
        torch.jit.load(str(path), _extra_files=files)
    elif format == 'pt2':
        torch.export.load(path, extra_files=files)
    elif format == 'openvino':
        info = openvino.Core().read_model(path).get_rt_info(['timm_vitres', 'config'])
        files = {'config.json': info.astype(str)}
    else:
        assert format == 'onnx', f'config_of: say here how a file of the format {format!r} tells its config.'
        files = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    return files['config.json']


@pytest.mark.recent
@pytest.mark.parametrize('format', list(FORMATS))
def test_a_pyramid_as_a_file(format, tmp_path):
    model = create('vitresnet', **{**LAYERS, 'num_classes': 0}, features_only=True)
    path = tmp_path / f'model{FORMATS[format].suffixes[0]}'
    export(model, path, format)
    x = torch.randn(2, 3, 70, 97)
    for y, expected in zip(load(path, format)(x), model(x), strict=True):
        assert relative_difference(y, expected) < 1e-5


@pytest.mark.recent
def test_a_file_for_multiples_says_so(tmp_path):
    model = create('vitresnet', backbone='resnetaa34d', depth=1, num_heads=4, img_size=64, num_classes=3)
    exported = export(model, tmp_path / 'm.pt2')
    assert 'for any height and width that is a multiple of 32;' in exported.report
    x = torch.randn(2, 3, 96, 128)
    assert relative_difference(load(tmp_path / 'm.pt2', 'pt2')(x), model(x)) < 1e-5


@pytest.mark.recent
def test_what_computes_something_else_is_no_export(tmp_path, monkeypatch):
    model = create('test_vitresnet', num_classes=3)
    monkeypatch.setattr(exports, 'load', lambda path, format: lambda x: -model(x))
    with pytest.raises(RuntimeError, match=r'm\.pt2: what was written differs from the model, by 2\.0e\+00'):
        export(model, tmp_path / 'm.pt2', precision='bf16')
    assert not list(tmp_path.iterdir())


def test_a_model_is_exported_from_the_cpu():
    model = create('test_vitresnet')
    with pytest.raises(ValueError, match=r'^model: it is on meta, and is exported from the CPU'):
        exports.capture(model, 'fp32', torch.empty(2, 3, 64, 64, device='meta'))


@pytest.mark.recent
def test_int8_that_would_quantise_nothing_is_refused(tmp_path):
    model = timm.create_model('test_vitresnet_mix').eval()  # its attention is of convolutions
    with pytest.raises(RuntimeError, match='VitResNetMix has no linear layers beside its head'):
        export(model, tmp_path / 'model.onnx', precision='int8', dynamic=False)
    assert not list(tmp_path.iterdir())


def test_a_file_does_not_tell_where_the_code_lies(tmp_path):
    model = timm.create_model('test_vitresnet').eval()
    path = export(model, tmp_path / 'model.pt2', dynamic=False).path
    with zipfile.ZipFile(path) as archive:
        content = b''.join(archive.read(name) for name in archive.namelist())
    assert b'timm_vitres/models' not in content and b'site-packages' not in content


def test_onnx_ranges_of_images(tmp_path):
    """With images, convolutions are int8, too."""
    model = create('vitresnet', **LAYERS)
    x = torch.randn(8, 3, 64, 64)
    counts = {}
    for name, example in (('with', x), ('without', None)):
        exported = export(model, tmp_path / name, 'onnx', 'int8', dynamic=False, example=example)
        nodes = onnx.load(tmp_path / name).graph.node
        counts[name] = sum(node.op_type == 'QuantizeLinear' for node in nodes)
        assert exported.difference < 0.1
    assert counts['with'] > counts['without']
    run = load(tmp_path / 'with', 'onnx')
    assert relative_difference(run(x[:3]), model(x[:3])) < 0.1  # every batch
    with pytest.raises(Exception, match=r'(?i)invalid dimensions.*\n?.*Expected: 64'):
        run(torch.randn(1, 3, 96, 96))  # one size


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(format='tflite'), r"format: got 'tflite'"),
        (dict(format='onnx', precision='bf16'), r"precision: got 'bf16', format 'onnx' can be fp32 or int8"),
        (dict(format='torchscript', precision='int8'), "format 'torchscript' can be fp32 or bf16"),
        (dict(format='onnx', example=torch.randn(1, 1, 64, 64)), r'example: got \(1, 1, 64, 64\)'),
        (dict(format='onnx', dynamic='no'), "dynamic: got 'no'"),
        (dict(format='openvino'), r'path: got .*model, expected a name that ends in \.xml: its weights .* \.bin'),
        (
            dict(),
            rf'format: not given, and the name of .*model does not say it .*{", ".join(map(repr, FORMATS))}',
        ),
    ],
)
def test_mistakes_in_exports_are_named(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(create('vitresnet', **LAYERS), tmp_path / 'model', **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.recent
@pytest.mark.parametrize(
    'name, format',
    [
        ('m.onnx', 'onnx'),
        ('m.pt', 'torchscript'),
        ('m.TS', 'torchscript'),
        ('m.pt2', 'pt2'),
        ('m.xml', 'openvino'),
    ],
)
def test_the_name_of_the_file_says_the_format(name, format, tmp_path):
    assert check_target(tmp_path / name, None, 'fp32') == (tmp_path / name, format)
    if not FORMATS[format].beside:
        assert check_target(tmp_path / 'm', format, 'fp32') == (tmp_path / 'm', format)
    other = 'pt2' if format == 'onnx' else 'onnx'
    with pytest.raises(ValueError, match=f"format: got '{other}', but {name} is the name of '{format}'"):
        check_target(tmp_path / name, other, 'fp32')
    if format == 'pt2':
        model, x = create('vitresnet', **LAYERS), torch.randn(2, 3, 64, 64)
        assert f'{name}: {format}' in export(model, tmp_path / name, example=x).report
        assert relative_difference(load(tmp_path / name, format)(x), model(x)) < 1e-5


def test_an_empty_file_is_filled(tmp_path):
    """tempfile makes such; one of another name is left alone."""
    for name in ('a.ts', 'a.txt'):
        (tmp_path / name).touch()
    assert export(create('vitresnet', **LAYERS), tmp_path / 'a.ts').path.stat().st_size
    with pytest.raises(FileExistsError, match=r'a\.txt: holds no export'):
        export(create('vitresnet', **LAYERS), tmp_path / 'a.txt', format='torchscript')


def test_what_is_no_export_is_not_written_over(tmp_path):
    model = create('vitresnet', **LAYERS)
    hub.save(model, tmp_path / 'model')
    torch.save(model.state_dict(), tmp_path / 'best.pt')
    (tmp_path / 'text').write_text('mine')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    torch.save(model.state_dict(), tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    before[tmp_path / 'old.pt'] = (tmp_path / 'old.pt').read_bytes()
    for name in ('model/model.safetensors', 'model/config.json', 'best.pt', 'old.pt'):
        with pytest.raises(
            FileExistsError, match=f'{name}: holds no export, by its name or content, and is not written over'
        ):
            export(model, tmp_path / name, 'torchscript')
    for path, message in (
        (tmp_path / 'model', 'model is a folder, expected the path of a file'),
        (tmp_path / 'text' / 'model.pt', 'text is no folder'),
        ('/dev/null', 'no ordinary file'),
    ):
        with pytest.raises(OSError, match=f'^path: {path} .*{message}|^path: .*{message}'):
            export(model, path, 'torchscript')
    for path in ('', None):
        with pytest.raises(ValueError, match=r"path: got '.*', expected the path of a file"):
            export(model, path, 'torchscript')
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}


def test_other_precisions_of_model_and_example(tmp_path):
    model = create('vitresnet', **LAYERS)
    x = torch.randn(2, 3, 64, 96)
    half = copy.deepcopy(model).bfloat16()
    for number, (other, example) in enumerate(
        [(half, x), (copy.deepcopy(half).double(), x.half()), (model, x.double())]
    ):
        path = tmp_path / f'{number}.pt'
        export(other, path, example=example, dynamic=False)
        assert relative_difference(load(path, 'torchscript')(x), copy.deepcopy(other).float()(x)) < 1e-5
    assert next(half.parameters()).dtype == torch.bfloat16


def test_what_a_format_can_not_hold_is_one_sentence(tmp_path):
    model = create('vitresnet', **LAYERS)
    model.head = torch.nn.Sequential(model.head, Unscriptable()).eval()
    with pytest.raises(RuntimeError, match=r"model\.pt: format 'torchscript' can not hold this model: .+$") as caught:
        export(model, tmp_path / 'model.pt')
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())
    dual = create('test_vitresnet_dual', num_classes=3, global_pool='')
    with pytest.raises(ValueError, match='model: it returns a tuple, expected logits'):
        export(dual, tmp_path / 'model.pt', example=torch.randn(1, 3, 64, 64))


class Unscriptable(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.eval()

    def forward(self, x):
        return x + next(iter({1.0: x} | {}))


def test_a_model_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match='it is in training mode'):
        export(create('vitresnet', **LAYERS).train(), tmp_path / 'new' / 'model.pt')
    assert not list(tmp_path.iterdir())


def test_a_wrong_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'model.pt'
    model = create('vitresnet', **LAYERS)
    export(model, path)
    before, expected = path.read_bytes(), torch.no_grad()(model.forward)
    for wrong in (
        lambda x: torch.ones(len(x), 7),
        lambda x: expected(x) * (1 if x.shape[-1] == x.shape[-2] else float('nan')),  # at the second size alone
    ):
        monkeypatch.setattr('timm_vitres.inference.exports.load', lambda *_, wrong=wrong: wrong)
        with pytest.raises(RuntimeError, match=r'model\.pt: what was written differs from the model'):
            export(model, path, 'torchscript')
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_head_that_was_replaced_by_hand_is_named(tmp_path):
    model = create('vitresnet', **LAYERS)
    model.head = torch.nn.Linear(model.num_features, 5).eval()
    for call in (lambda: export(model, tmp_path / 'm.pt'), lambda: explain(model, draw(tmp_path / 'x.png'))):
        with pytest.raises(ValueError, match=r'model: it returns 5 logits, but says that it has \d+ classes; reset_cl'):
            call()


def test_a_file_for_one_size_says_which(tmp_path):
    model = create('test_vitresnet')
    export(model, tmp_path / 'm.pt2', dynamic=False, example=torch.randn(2, 3, 64, 96))
    assert json.loads(config_of(tmp_path / 'm.pt2', 'pt2'))['input_size'] == [3, 64, 96]
    export(model, tmp_path / 'm.pt2', dynamic=False)
    assert json.loads(config_of(tmp_path / 'm.pt2', 'pt2'))['input_size'] == [3, 96, 96]


@pytest.mark.recent
def test_a_file_for_every_size_says_the_models_own(tmp_path):
    export(create('test_vitresnet'), tmp_path / 'm.pt2')
    assert json.loads(config_of(tmp_path / 'm.pt2', 'pt2'))['input_size'] == [3, 96, 96]


@pytest.mark.recent
def test_the_command(tmp_path, capsys):
    model = create('vitresnet_nano', num_classes=2, img_size=32)
    folder = hub.save(model, tmp_path / 'model', label_names=['across', 'down'])
    images = write_folder(tmp_path / 'images', per_class=3)
    arguments = ['export', f'local-dir:{folder}', '--output', str(tmp_path / 'model.onnx'), '--precision', 'int8']
    assert cli.main([*arguments, '--images', str(images), '--num-images', '4', '--static', '--img-size', '48']) == 0
    assert 'onnx, int8, for 48x48 pixels' in capsys.readouterr().out
    run = load(tmp_path / 'model.onnx', 'onnx')
    assert example_images([images], model, limit=2).shape == (2, 3, 32, 32)
    x = torch.randn(1, 3, 48, 48)
    assert relative_difference(run(x), model(x)) < 0.2
    assert json.loads(config_of(tmp_path / 'model.onnx', 'onnx'))['label_names'] == ['across', 'down']
    assert cli.main([*arguments, '--images', str(tmp_path / 'model')]) == 1
    assert 'images: there is none in' in capsys.readouterr().err


@pytest.mark.recent
@pytest.mark.parametrize('patch_size, levels', [(16, (0, 1)), (64, (0, 1, 2, 3))])
def test_tokens_are_as_far_apart_in_a_pyramid_of_shallow_maps(tmp_path, patch_size, levels):
    options = dict(patch_size=patch_size, features_only=True, out_indices=levels)
    model = randomise_(timm.create_model('test_vitresnet_dual', **options)).eval()
    export(model, tmp_path / 'm.pt2', example=torch.randn(1, 3, 128, 128))
    run = load(tmp_path / 'm.pt2', 'pt2')
    for size in ((128, 192), (160, 136)):
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            for found, expected in zip(run(x), model(x), strict=True):
                assert relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize('size', [(32, 32), (32, 96)])
def test_images_of_one_token_a_side_have_a_file_for_their_size(size, tmp_path):
    """A graph for every size begins at two tokens; the default arguments take CIFAR's images, too."""
    model = randomise_(timm.create_model('test_vitresnet', img_size=size)).eval()
    assert f'for {size[0]}x{size[1]} pixels' in export(model, tmp_path / 'm.pt2').report
    x = torch.randn(3, 3, *size)
    with torch.inference_mode():
        assert relative_difference(load(tmp_path / 'm.pt2', 'pt2')(x), model(x)) < 1e-5


@pytest.mark.recent
def test_a_file_of_a_model_that_takes_no_larger_images(tmp_path):
    """Its other sizes are those that are left below: the table is cropped, and has two tokens a side."""
    model = randomise_(timm.create_model('test_vitresnet', pos_embed_fit='crop', img_size=64)).eval()
    export(model, tmp_path / 'm.pt2')
    run = load(tmp_path / 'm.pt2', 'pt2')
    for size in ((64, 64), (40, 64), (64, 40)):
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            assert relative_difference(run(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    'sizes, shapes, own, expected',
    [
        (ImageSizes(32, 1), (2, 3), (224, 224), [65, 95]),
        (ImageSizes(32, 1), (2, 3), (65, 95), [64, 94]),
        (ImageSizes(32, 1), (3,), (32, 224), [32, 95]),
        (ImageSizes(32, 32), (2, 3), (224, 224), [64, 96]),
        (ImageSizes(32, 32), (2, 3), (64, 96), [64, 64]),
        (ImageSizes(32, 1, (64, 64)), (2, 3), (64, 64), [63, 63]),
        (ImageSizes(2, 1), (2, 3), (4, 4), [5, 5]),
    ],
)
def test_what_is_compared_has_another_size(sizes, shapes, own, expected):
    assert exports._other_size(sizes, dict.fromkeys((0, *shapes)), own) == expected


def test_a_models_own_hooks_are_in_the_file_and_in_what_it_is_compared_with(tmp_path):
    model = create('test_vitresnet_mix')
    x = torch.randn(2, 3, 64, 64)
    plain = model(x).detach()
    model.register_forward_hook(lambda module, args, y: 2 * y)
    exported = export(model, tmp_path / 'm.pt2', dynamic=False, example=x)
    assert exported.difference < 1e-5
    assert relative_difference(load(tmp_path / 'm.pt2', 'pt2')(x), 2 * plain) < 1e-5


def test_timms_models_of_one_size_are_exported_for_it(tmp_path):
    model = create('test_vit', num_classes=3, dynamic_img_size=False)
    exported = export(model, tmp_path / 'm.pt')
    height, width = model.patch_embed.img_size
    assert f'for {height}x{width} pixels' in exported.report


def test_what_a_killed_export_left_is_swept(tmp_path):
    for name, age in (('m.pt2', 2), ('m.pt2', 0), ('other.pt2', 2)):
        folder = tmp_path / f'{TEMPORARY}{name}-{age}'
        folder.mkdir()
        (folder / 'model.pt2').write_text('weights')
        os.utime(folder, (time.time() - age * exports.DAY,) * 2)
    export(create('test_vitresnet_mix', img_size=64), tmp_path / 'm.pt2', dynamic=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f'{TEMPORARY}m.pt2-0', f'{TEMPORARY}other.pt2-2', 'm.pt2')
    ]
