"""Prepared models compute what they did, as closely as their precision allows, and say what was done to them."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from conftest import differs, randomise_, relative_difference
from torch import nn

import timm_vitres
from timm_vitres import prepare
from timm_vitres.inference import preparation
from timm_vitres.inference.exports import export
from timm_vitres.inference.folding import fold
from timm_vitres.inference.formats import ENGINES

SMALL = dict(backbone='resnet18', stage=1, depth=1, embed_dim=32, num_heads=2, img_size=64)
# how far outputs may be off, relative
CLOSE = {'fp32': 1e-5, 'bf16': 5e-2, 'int8': 8e-2}


def create(name, **kwargs):
    torch.manual_seed(0)  # of other weights and images int8 is at times further off than the bound
    model = timm.create_model(name, **{'num_classes': 7, **kwargs})
    randomise_(getattr(model, 'model', model))
    return model.eval()


@pytest.mark.parametrize('precision', list(CLOSE))
@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual', 'vitresnet_nano', 'test_vitresnet_mix'])
def test_it_computes_the_same(name, precision):
    model = create(name)
    if name == 'test_vitresnet_mix' and precision == 'int8':
        with pytest.raises(
            ValueError, match=r"precision: got 'int8', but VitResNetMix has no linear layers beside its"
        ):
            prepare(model, precision)
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example = torch.randn(4, 3, 96, 64)
    fast = prepare(model, precision, example=example)
    for x in (example, torch.randn(2, 3, 97, 161)):  # every size, as the model itself
        y = fast(x)
        assert y.dtype == torch.float32 and not y.requires_grad
        assert relative_difference(y, model(x)) < CLOSE[precision]
    assert fast.difference == pytest.approx(relative_difference(fast(example), model(example)), rel=0.1, abs=1e-7)
    assert 'channels-last' in fast.report and 'ratio' in fast.report and 'of 4 images' in fast.report
    assert ('int8 (torchao' in fast.report) == (precision == 'int8')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if precision != 'fp32':
        assert fast.difference > 1e-5  # it is another precision


@pytest.mark.parametrize('wanted', ['contiguous', 'channels-last'])
def test_what_is_fastest_is_taken_and_what_is_measured_told(wanted, monkeypatch):
    monkeypatch.setattr(
        preparation,
        'measure',
        lambda functions, x, **options: {key: 1.0 if key == 'after' or wanted in key else 2.0 for key in functions},
    )
    model = randomise_(timm.create_model('test_vitresnet_dual')).eval()
    fast = prepare(model)
    kernels = [value for value in fast.lowered.parameters() if value.ndim == 4 and min(value.shape) > 1]
    is_last = {value.is_contiguous(memory_format=torch.channels_last) for value in kernels}
    assert is_last == {wanted == 'channels-last'} and f'fp32, {wanted}' in fast.report
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.lowered.modules())
    assert 'ratio 0.500' in fast.report


def test_it_is_compiled_where_it_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, 'compile', lambda module, **options: seen.append((module, options)))
    fast = prepare(create('test_vitresnet', img_size=32), example=torch.randn(1, 3, 32, 32))
    assert seen == [] and 'compiled' not in fast.report
    fast = prepare(create('test_vitresnet', img_size=32), compile=True, example=torch.randn(1, 3, 32, 32))
    assert seen == [(fast.lowered, dict(mode='default'))]


def test_classes_that_stay_are_counted():
    assert preparation._agreement(torch.eye(4), torch.eye(4)[[0, 1, 2, 0]]) == (3, 4)


@pytest.mark.recent
@pytest.mark.parametrize(
    'name, engine, precision',
    [
        pytest.param(name, engine, precision, marks=[] if name == 'test_vitresnet' else pytest.mark.slow)
        for name in ('test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix')
        for engine, row in ENGINES.items()
        for precision in row.precisions
    ],
)
def test_engines_keep_the_contract(name, engine, precision):
    """Float32 in and out, any size, a report, no gradient, and no way to save it."""
    model = create(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example = torch.randn(4, 3, 96, 64)
    fast = prepare(model, precision, example=example, engine=engine)
    for x in (example, torch.randn(2, 3, 97, 161), torch.randn(1, 3, 64, 130), torch.randn(4, 3, 33, 70), example):
        y = fast(x)
        assert y.dtype == torch.float32 and not y.requires_grad
        assert relative_difference(y, model(x)) < dict(fp32=1e-5, bf16=5e-2, int8=0.2)[precision]
    assert torch.equal(fast(example.double()), fast(example)) and fast(example.requires_grad_()).grad_fn is None
    assert fast.difference == pytest.approx(relative_difference(fast(example), model(example)), rel=0.1, abs=1e-7)
    assert f'{precision}, run by {ENGINES[engine].runtime}' in fast.report and 'of 4 images' in fast.report
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (fast.difference > 1e-4) == differs(engine, precision)
    assert ('in fp32, since this CPU has no bfloat16' in fast.report) == (
        precision != 'fp32' and not differs(engine, precision)
    )
    with pytest.raises(TypeError, match='neither saved nor copied'):
        copy.deepcopy(fast)
    with pytest.raises(ValueError, match='folded for inference'):
        timm_vitres.save(fast, 'model')


@pytest.mark.recent
def test_a_pyramid_by_an_engine():
    model = create('test_vitresnet', features_only=True, num_classes=0)
    fast = prepare(model, engine='openvino')
    x = torch.randn(2, 3, 80, 96)
    for y, expected in zip(fast(x), model(x), strict=True):
        assert relative_difference(y, expected) < 1e-5


@pytest.mark.recent
def test_any_timm_model_by_an_engine():
    model = randomise_(timm.create_model('resnet18', num_classes=5)).eval()
    x = torch.randn(3, 3, 64, 96)
    fast = prepare(model, example=x, engine='openvino')
    assert relative_difference(fast(x), model(x)) < 1e-5 and relative_difference(fast(x[:2]), model(x[:2])) < 1e-5
    with pytest.raises(ValueError, match=r'input: got shape \(3, 3, 96, 64\), expected \(any, 3, 64, 96\), which'):
        fast(x.transpose(2, 3))


@pytest.mark.recent
@pytest.mark.parametrize('engine', ENGINES)
def test_an_engine_takes_what_the_model_takes(engine):
    """By itself onnxruntime and OpenVINO answer images that are smaller than a token, too."""
    model = create('test_vitresnet')
    one = prepare(model, example=torch.randn(1, 3, 32, 64), engine=engine)  # of one token a side
    assert 'for 32x64 pixels' in one.report
    fast = prepare(model, example=torch.randn(1, 3, 64, 64), engine=engine)
    assert 'for any height and width' in fast.report
    for shape in ((1, 3, 3, 64), (1, 1, 64, 64), (3, 64, 64)):
        errors = []
        for run in (model, fast):
            with pytest.raises(ValueError, match='input: got') as caught:
                run(torch.randn(shape))
            errors.append(str(caught.value))
        assert errors[0].split(',')[0] == errors[1].split(',')[0]


@pytest.mark.recent
def test_a_missing_engine_is_named():
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        'import timm, timm_vitres\n'
        "timm_vitres.prepare(timm.create_model('test_vitresnet').eval(), engine='openvino')\n"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'ValueError: engine: \'openvino\' needs openvino, pip install "timm-vitres[openvino]".' in result.stderr


def test_a_wrapper_is_taken_off_by_hand():
    averaged = torch.optim.swa_utils.AveragedModel(create('test_vitresnet')).eval()
    with pytest.raises(TypeError, match=r'^model: got AveragedModel, which wraps one'):
        prepare(averaged)


def test_a_pyramid():
    model = create('test_vitresnet', features_only=True, num_classes=0)
    fast = prepare(model, 'bf16', example=torch.randn(1, 3, 64, 96))
    x = torch.randn(2, 3, 80, 96)
    for y, expected in zip(fast(x), model(x), strict=True):
        assert y.dtype == torch.float32 and relative_difference(y, expected) < 5e-2
    assert fast.feature_info.reduction() == model.feature_info.reduction()


@pytest.mark.parametrize('precision', ['fp32', pytest.param('int8', marks=pytest.mark.slow)])
def test_compiled(precision):
    """Also at another size, and more often in a process than TorchDynamo compiles one function by default."""
    model = create('vitresnet', backbone='resnet18', stage=1, depth=1, embed_dim=32, num_heads=2)
    fast = prepare(model, precision, compile=True, example=torch.randn(2, 3, 64, 64))
    assert 'compiled by torch.compile' in fast.report
    for size in (64, 96):
        x = torch.randn(2, 3, size, size)
        assert relative_difference(fast(x), model(x)) < CLOSE[precision]


def test_what_the_model_refuses_is_refused_before_compiled_code_could_answer():
    fast = prepare(create('test_vitresnet'), example=torch.randn(2, 3, 64, 64))
    fast.compiled = True
    for shape in ((1, 3, 3, 64), (1, 3, 0, 64), (1, 1, 64, 64)):
        fast.lowered.forward = lambda x: pytest.fail('it was answered')
        with pytest.raises(ValueError, match=r'^input: got'):
            fast(torch.randn(shape))


@pytest.mark.slow
def test_many_compiled_models_in_a_process():
    model = create('vitresnet', backbone='resnet18', stage=1, depth=1, embed_dim=32, num_heads=2)
    x = torch.randn(2, 3, 64, 64)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(10):
            assert relative_difference(prepare(model, compile=True, example=x)(x), model(x)) < 1e-5


def test_it_is_for_inference(tmp_path):
    model = create('test_vitresnet', num_classes=3)
    fast = prepare(model)
    assert 'of noise' in fast.report
    with pytest.raises(ValueError, match='prepared for inference'):
        fast.train()
    assert not fast.eval().training
    for call in (timm_vitres.save, timm_vitres.push):
        with pytest.raises(ValueError, match='folded for inference'):
            call(fast, str(tmp_path / 'model'))


def test_images_are_preprocessed_as_for_the_model(image_folder):
    path = image_folder / 'down' / '0.png'
    model = create('vitresnet_nano', num_classes=2, img_size=48)
    fast = prepare(model)
    assert torch.equal(timm_vitres.preprocess(path, fast), timm_vitres.preprocess(path, model))
    from timm_vitres.prediction import predict

    (ours,), _ = predict(fast, [path])
    (expected,), _ = predict(model, [path])
    assert ours.labels == expected.labels and ours.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_any_timm_model():
    model = randomise_(timm.create_model('resnet18', num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64)
    assert relative_difference(prepare(model, example=x)(x), model(x)) < 1e-5


def test_a_model_in_bfloat16_is_taken_as_it_is():
    model = create('test_vitresnet').bfloat16()
    x = torch.randn(2, 3, 64, 64)
    assert relative_difference(prepare(model, 'fp32', example=x)(x), model(x.bfloat16()).float()) < 5e-2


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(precision='fp16'), r"precision: got 'fp16', .*'fp32', 'bf16', 'int8'"),
        (dict(example=[1, 2]), r'example: got list, expected images \(B, 3, H, W\)'),
        (dict(example=torch.randn(3, 64, 64)), r'example: got \(3, 64, 64\)'),
        (dict(example=torch.randn(1, 1, 64, 64)), r'example: got \(1, 1, 64, 64\)'),
        (dict(example=torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), 'torch.uint8'),
        (dict(example=torch.zeros(1, 3, 64, 64).numpy()), 'example: got ndarray, expected images .* a tensor'),
        (dict(example=torch.zeros(0, 3, 64, 64)), r'example: got \(0, 3, 64, 64\)'),
        (dict(example=torch.full((1, 3, 64, 64), float('nan'))), 'example: it has values that are not finite'),
        (dict(example=torch.zeros(1, 3, 64, 64).to_sparse()), 'example: got a tensor that is sparse'),
        (dict(example=torch.zeros(1, 3, 64, 64, device='meta')), 'example: got a tensor that is meta'),
        (dict(example=torch.zeros(1, 3, 64, 3)), 'input: got an image of 64x3 pixels'),
        (dict(compile='no'), "compile: got 'no'"),
        (dict(engine='tensorrt'), "engine: got 'tensorrt', expected one of 'torch', 'onnxruntime', 'openvino'"),
        (dict(engine='openvino', compile=True), "compile: got True, but 'openvino' compiles by itself"),
        (dict(engine='openvino', precision='int8'), "example: not given, but 'int8' of 'openvino' takes the ranges"),
        (dict(engine='onnxruntime', precision='bf16'), "precision: got 'bf16', format 'onnx' can be fp32 or int8"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prepare(create('test_vitresnet'), **kwargs)


def test_other_models_are_named():
    model = create('vitresnet', **SMALL)
    for call in (prepare, lambda model: export(model, 'model.pt')):
        with pytest.raises(TypeError, match=r'model: got str, expected a torch\.nn\.Module'):
            call('vitresnet_nano')
        with pytest.raises(ValueError, match=r'model: it has no weights\.'):
            call(nn.Identity().eval())
        with pytest.raises(ValueError, match=r'model: it has no weights \(it is on the device meta\)'):
            call(copy.deepcopy(model).to('meta'))
        broken = copy.deepcopy(model)
        nn.init.constant_(broken.head.weight, float('nan'))
        with pytest.raises(ValueError, match='model: its outputs for the example are not finite'):
            call(broken)
        with pytest.raises(TypeError, match='model: it is prepared already'):
            call(prepare(model, example=torch.randn(1, 3, 64, 64)))


@pytest.mark.parametrize('compile', [False, True])
def test_it_is_neither_saved_nor_copied(compile):
    model = create('vitresnet', **SMALL)
    x = torch.randn(2, 3, 64, 64)
    fast = prepare(model, compile=compile, example=x)
    calls = [
        (lambda: pickle.dumps(fast), 'neither saved nor copied; save the original, and prepare it again'),
        (lambda: fast.half(), 'is not cast; prepare the original'),
        (lambda: fast.to(torch.bfloat16), 'is not cast; prepare the original'),
        (lambda: torch.save(fast, io.BytesIO()), 'neither saved nor copied'),
        (lambda: copy.deepcopy(fast), 'neither saved nor copied'),
        (lambda: timm_vitres.fold(fast), 'neither saved nor copied'),
        (lambda: torch.save(fast.state_dict(), io.BytesIO()), 'has no state dict; save the original'),
        (lambda: fast.load_state_dict(model.state_dict()), 'loads no weights; load them into the original'),
        (lambda: torch.jit.script(fast), r'is not scripted; timm_vitres\.export writes'),
    ]
    for call, message in calls:
        with pytest.raises(TypeError, match=f'^a prepared model .*{message}'):
            call()
    assert relative_difference(fast(x), model(x)) < 1e-5


def test_what_is_no_image_is_named():
    fast = prepare(create('vitresnet', **SMALL), example=torch.randn(1, 3, 64, 64))
    for x, got in (
        ('cat.jpg', 'str'),
        (torch.randn(3, 64, 64), r'shape \(3, 64, 64\) of torch.float32'),
        (torch.ones(1, 3, 64, 64).int(), r'shape .* of torch.int32'),
    ):
        with pytest.raises(
            ValueError, match=rf'input: got {got}, expected a tensor \(B, C, H, W\) of a floating dtype'
        ):
            fast(x)


def test_training_mode_and_missing_torchao_are_named():
    with pytest.raises(ValueError, match=r'call model\.eval\(\)'):
        prepare(create('test_vitresnet').train())
    code = (
        "import sys; sys.modules['torchao'] = None\n"
        'import timm, timm_vitres\n'
        "model = timm.create_model('test_vitresnet').eval()\n"
        "timm_vitres.prepare(model, 'int8')\n"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'ValueError: precision: \'int8\' needs torchao, pip install "timm-vitres[int8]".' in result.stderr


@pytest.mark.parametrize('feature_cls, kind', [('dict', dict), ('getter', list)])
def test_a_pyramid_stays_what_it_is(feature_cls, kind):
    model = randomise_(timm.create_model('test_vitresnet_mix', features_only=True, feature_cls=feature_cls)).eval()
    x = torch.randn(1, 3, 64, 64)
    got, expected = prepare(model, example=x)(x), model(x)
    assert isinstance(got, kind)
    names = list(expected) if kind is dict else range(len(expected))
    assert names == (list(got) if kind is dict else range(len(got)))
    assert all(relative_difference(got[name], expected[name]) < 1e-5 for name in names)


def test_what_computes_something_else_is_no_preparation(monkeypatch):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3)).eval()
    wrong = randomise_(timm.create_model('test_vitresnet', num_classes=3), seed=1).eval()
    monkeypatch.setattr('timm_vitres.inference.preparation.fold', lambda _: fold(wrong))
    with pytest.raises(RuntimeError, match='model: what was made of it differs from it, by'):
        prepare(model)


def test_features_have_no_likeliest_class():
    model = randomise_(timm.create_model('test_vitresnet', num_classes=0)).eval()
    fast = prepare(model, 'fp32', example=torch.randn(4, 3, 64, 64))
    assert fast.done.same_class is None and 'likeliest' not in fast.report


def test_a_compiler_that_is_switched_off_is_named(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, 'disable', True)
    with pytest.raises(RuntimeError, match=r'compile: torch\.compile is switched off in this process'):
        prepare(timm.create_model('test_vitresnet').eval(), 'fp32', compile=True)
