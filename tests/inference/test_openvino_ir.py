"""OpenVINO's files: every size as torch computes it, two files that belong together, and what other programs read."""

import json
from concurrent.futures import ThreadPoolExecutor

import openvino
import pytest
import timm
import torch
from conftest import randomise_, relative_difference

from timm_vitres.inference import exports
from timm_vitres.inference.exports import export, load
from timm_vitres.inference.openvino_ir import OWN_GRAPHS, is_export

pytestmark = pytest.mark.recent
LAYERS = dict(backbone='resnet18', stage=1, depth=1, embed_dim=32, num_heads=2, num_classes=7)

OTHERS = ('test_vitresnet_dual', 'vitresnet_nano', 'test_vitresnet_mix')
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


@pytest.fixture
def net():
    return randomise_(timm.create_model('vitresnet', **LAYERS, img_size=64)).eval()


@pytest.mark.parametrize('name', ['test_vitresnet', *SLOW])
def test_position_tables_are_resized_as_by_torch(name, tmp_path):
    """Larger, smaller and odd: OpenVINO's own cubic resizing is off by 1e-3 and more."""
    model = randomise_(timm.create_model(name)).eval()
    export(model, tmp_path / 'm.xml')
    run = load(tmp_path / 'm.xml', 'openvino')
    assert min(run.largest) > exports.LARGEST  # the model takes any size, and so does its file
    for shape in [(2, 3, 224, 224), (1, 3, 97, 161), (3, 3, 225, 250), (1, 3, 33, 470), (1, 3, 64, 96)]:
        x = torch.randn(shape)
        with torch.inference_mode():
            assert relative_difference(run(x), model(x)) < 1e-5, shape


def test_the_first_sizes_have_graphs_of_their_own(net, tmp_path):
    export(net, tmp_path / 'm.xml')
    run = load(tmp_path / 'm.xml', 'openvino')
    for batch in range(1, 6):
        x = torch.randn(batch, 3, 64, 64 + batch)
        first, again = run(x), run(x)
        assert torch.equal(first, again) and relative_difference(first, net(x)) < 1e-5
    assert len(run.graphs) == OWN_GRAPHS + 1 and None in run.graphs


def test_no_image_has_no_answer(tmp_path):
    """OpenVINO's graphs answer an empty batch with what they answered before, or with words of C++."""
    model = randomise_(timm.create_model('test_vitresnet_mix', num_classes=3)).eval()
    export(model, tmp_path / 'm.xml')
    for _ in range(2):  # as the first shapes, and where all others share a graph
        run = load(tmp_path / 'm.xml', 'openvino')
        assert run(torch.randn(0, 3, 96, 96)).shape == (0, 3)
        for batch in range(1, 5):
            run(torch.randn(batch, 3, 64, 64))
        assert run(torch.randn(0, 3, 64, 96)).shape == (0, 3)
        with pytest.raises(ValueError, match=r'^input: got shape \(2, 3, 0, 64\), which has no pixels'):
            run(torch.randn(2, 3, 0, 64))


def test_outputs_are_not_overwritten_by_the_next_call(net, tmp_path):
    export(net, tmp_path / 'm.xml')
    run = load(tmp_path / 'm.xml', 'openvino')
    x = torch.randn(2, 3, 64, 64)
    first = run(x)
    kept = first.clone()
    run(torch.randn(2, 3, 64, 64))
    assert torch.equal(first, kept)


def test_other_programs_read_it(net, tmp_path):
    """By OpenVINO alone: names of input and output, sizes that may vary, config and precision."""
    export(net, tmp_path / 'm.xml', precision='bf16')
    model = openvino.Core().read_model(tmp_path / 'm.xml')
    assert model.input(0).get_any_name() == 'image' and model.output(0).get_any_name() == 'logits'
    dimensions = model.input(0).get_partial_shape()
    assert [dimensions[i].is_dynamic for i in range(4)] == [True, False, True, True]
    assert json.loads(model.get_rt_info(['timm_vitres', 'config']).astype(str))['input_size'] == [3, 64, 64]
    assert model.get_rt_info(['timm_vitres', 'precision']).astype(str) == 'bf16'
    x = torch.randn(1, 3, 64, 96)
    found = openvino.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})(x.numpy())[0]
    assert relative_difference(torch.from_numpy(found), net(x)) < 1e-5


def test_nothing_of_the_users_is_written_over(net, tmp_path):
    """Neither an .xml that is no model nor weights that are called .bin."""
    (tmp_path / 'notes.xml').write_text('<note>mine</note>')
    (tmp_path / 'yolo.xml').write_text('<?xml version="1.0"?><net name="yolo" version="11"><layers/></net>')
    (tmp_path / 'yolo.bin').write_text('weights')
    torch.save(net.state_dict(), tmp_path / 'pytorch_model.bin')
    (tmp_path / 'folder.bin').mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name, other in (
        ('notes', 'notes.xml'),
        ('yolo', 'yolo.xml'),
        ('pytorch_model', 'pytorch_model.bin'),
        ('folder', 'folder.bin'),
    ):
        with pytest.raises(FileExistsError, match=rf'{other}: holds no export, by its name or content'):
            export(net, tmp_path / f'{name}.xml')
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def kill_(patched, number: int) -> None:
    """Let an export be killed before it puts the so-manieth of its files in place."""
    replacing, calls = exports.replacing, []

    def killed(path):
        calls.append(path)
        if len(calls) == number:
            raise KeyboardInterrupt
        return replacing(path)

    patched.setattr(exports, 'replacing', killed)


@pytest.mark.parametrize('killed_at', [1, 2, 3])
def test_a_first_export_that_was_killed_is_completed(net, tmp_path, monkeypatch, killed_at):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_(patched, killed_at)
        export(net, tmp_path / 'm.xml')
    export(net, tmp_path / 'm.xml')
    x = torch.randn(1, 3, 64, 64)
    assert relative_difference(load(tmp_path / 'm.xml', 'openvino')(x), net(x)) < 1e-5


def test_threads_may_share_a_file(net, tmp_path):
    export(net, tmp_path / 'm.xml')
    run, images = load(tmp_path / 'm.xml', 'openvino'), [torch.randn(2, 3, 64, 64 + 32 * (i % 3)) for i in range(24)]
    expected = [run(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, other) for one, other in zip(pool.map(run, images), expected))


@pytest.mark.parametrize('killed_at', [1, 2, 3])
def test_a_kill_never_leaves_a_model_with_the_weights_of_another(net, tmp_path, monkeypatch, killed_at):
    export(net, tmp_path / 'm.xml')
    x = torch.randn(1, 3, 64, 64)
    old = load(tmp_path / 'm.xml', 'openvino')(x)
    other = randomise_(timm.create_model('vitresnet', **{**LAYERS, 'num_classes': 5}, img_size=64), seed=1).eval()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_(patched, killed_at)
        export(other, tmp_path / 'm.xml')
    if killed_at == 1:
        assert torch.equal(load(tmp_path / 'm.xml', 'openvino')(x), old)
    else:
        with pytest.raises(RuntimeError):
            load(tmp_path / 'm.xml', 'openvino')
    assert is_export(tmp_path / 'm.xml')
    export(other, tmp_path / 'm.xml')  # the same call mends it
    assert relative_difference(load(tmp_path / 'm.xml', 'openvino')(x), other(x)) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ['m.bin', 'm.xml']


def test_int8_takes_its_ranges_from_images(net, tmp_path):
    """Convolutions are int8, too, and ranges of other images give another model."""
    x = torch.randn(8, 3, 64, 64)
    found = []
    for scale in (1.0, 0.05):
        export(net, tmp_path / f'{scale}.xml', precision='int8', example=scale * x)
        model = openvino.Core().read_model(tmp_path / f'{scale}.xml')
        kinds = [node.get_type_name() for node in model.get_ops()]
        assert kinds.count('FakeQuantize') >= kinds.count('Convolution') > 5
        found.append(relative_difference(load(tmp_path / f'{scale}.xml', 'openvino')(x), net(x)))
    assert found[0] < 0.1 < found[1]
    with pytest.raises(ValueError, match="example: not given, but 'int8' of 'openvino' takes the ranges"):
        export(net, tmp_path / 'm.xml', precision='int8')


@pytest.mark.slow
def test_a_larger_image_than_the_model_takes_is_refused(tmp_path):
    """Beyond a table of positions that is cropped there are none."""
    model = randomise_(timm.create_model('test_vitresnet', img_size=(64, 96), pos_embed_fit='crop', num_classes=3))
    export(model, tmp_path / 'model.xml', example=torch.randn(1, 3, 64, 64))
    run = load(tmp_path / 'model.xml', 'openvino')
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert relative_difference(run(x), model(x)) < 1e-5
    for size in ((65, 96), (64, 97)):
        with pytest.raises(ValueError, match='but the file takes at most 64x96'):
            run(torch.randn(1, 3, *size))


@pytest.mark.parametrize('axis', [2, 3])
def test_a_row_of_tokens_is_no_longer_than_the_model_takes(axis, tmp_path):
    """One token high, or wide, it has one size there, and more of the other."""
    size = (128, 32) if axis == 2 else (32, 128)
    model = randomise_(timm.create_model('test_vitresnet', img_size=size, pos_embed_fit='crop', num_classes=3)).eval()
    report = export(model, tmp_path / 'model.xml').report
    assert f'for any {"height" if axis == 2 else "width"} and {"width" if axis == 2 else "height"} 32;' in report
    run = load(tmp_path / 'model.xml', 'openvino')
    for side in (64, 96, 128):
        shape = [1, 3, 32, 32]
        shape[axis] = side
        x = torch.randn(*shape)
        with torch.inference_mode():
            assert relative_difference(run(x), model(x)) < 1e-5
    shape[axis] = 192
    with pytest.raises(ValueError, match='but the file takes at most'):
        run(torch.randn(*shape))


def test_any_number_of_tokens_in_any_order(tmp_path):
    """As many as heads; one, before others (OpenVINO's own attention kernels answer these wrongly)."""
    model = randomise_(timm.create_model('vitresnet_nano', num_classes=5)).eval()
    export(model, tmp_path / 'm.xml')
    for sides in ([(16, 16), (8, 64), (9, 17), (32, 8)], [(8, 8), (24, 40), (16, 16), (64, 64)]):
        run = load(tmp_path / 'm.xml', 'openvino')
        for graph in ('own', 'shared'):
            for size in sides:
                x = torch.randn(1, 3, *size)
                with torch.inference_mode():
                    assert relative_difference(run(x), model(x)) < 1e-5, (graph, size)
            run.graphs = {(index,): None for index in range(OWN_GRAPHS)}  # all others share one
