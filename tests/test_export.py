"""One graph for every size: TorchScript, torch.compile, torch.export, ONNX."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from torch.export import Dim

NAMES = ['vitresnet_tiny', 'vitresnet_small', 'vitresnet_nano', 'test_vitresnet']
NAMES += ['test_vitresnet_dual', 'vitresnet_dual_tiny', 'vitresnet_dual_small_p32']
# name, features_only; capturing takes its time
CASES = [('vitresnet_nano', False), ('vitresnet_nano', True), ('test_vitresnet', False)]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [(name, features_only) for name in NAMES for features_only in (False, True)]
    if case not in CASES
]
# (B, H, W), none of which the graphs below are captured at
UNSEEN = [(1, 97, 161), (2, 384, 352), (3, 225, 250), (1, 33, 470)]


def create(name, features_only=False):
    model = timm.create_model(name, features_only=features_only)
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


@pytest.mark.parametrize('name, features_only', CASES)
def test_torch_export(name, features_only, tmp_path):
    model = create(name, features_only)
    program = torch.export.export(model, (torch.randn(2, 3, 224, 224),), dynamic_shapes=(dynamic(),))
    torch.export.save(program, tmp_path / 'model.pt2')
    check(torch.export.load(tmp_path / 'model.pt2').module(), model)


@pytest.mark.parametrize(
    'name, features_only',
    [
        pytest.param('vitresnet_small', False, marks=pytest.mark.slow),
        ('vitresnet_tiny', True),
        ('test_vitresnet_dual', False),
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
    assert len(graphs) <= 4  # whether a patch needs padding, and one image or more, are graphs of their own


SHALLOW = dict(backbone='resnet18', stage=1, depth=1, embed_dim=48, num_heads=3)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('vitresnet', SHALLOW),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ('test_vitresnet', 'test_vitresnet_dual')),
        pytest.param('vitresnet_tiny', {}, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_at_changing_sizes(name, kwargs):
    """Gradients are those of the uncompiled model, position embeddings included."""
    torch._dynamo.reset()
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


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    model = create('test_vitresnet')
    check(torch.compile(model, dynamic=True), model)


def test_torch_fx():
    """timm's feature extraction by graph, at a size that was not traced."""
    model = create('test_vitresnet')
    graph = timm.models.GraphExtractNet(model, ['blocks.1.mlp.fc2', 'head'], return_dict=True)
    x = torch.randn(2, 3, 97, 161)
    with torch.inference_mode():
        assert relative_difference(graph(x)['head'], model(x)) < 1e-6
