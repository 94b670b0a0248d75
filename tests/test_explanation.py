import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_
from PIL import Image

import timm_vitres
from timm_vitres import cli
from timm_vitres.explanation import attention_rollout, explain, grad_cam


def create(name='test_vitresnet', **kwargs):
    return randomise_(timm.create_model(name, **{'num_classes': 5, **kwargs}))


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (70, 160, 3), dtype=np.uint8)
    path = tmp_path / 'photograph.png'
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.recent
@pytest.mark.parametrize('name', ['vitresnet_small', 'vitresnet_tiny', 'vitresnet_nano'])
def test_grad_cam_is_that_of_pytorch_grad_cam(name):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = create(name)
    x = torch.randn(2, 3, 96, 160)
    for target in (1, 4):
        ours = grad_cam(model, x, target)
        with GradCAM(model=model, target_layers=[model.patch_embed.backbone]) as cam:
            theirs = cam(input_tensor=x, targets=[ClassifierOutputTarget(target)] * 2)
        assert ours.shape == theirs.shape == (2, 96, 160)
        # theirs stretches over 0 to 1 before it enlarges, too
        assert np.corrcoef(ours.numpy().ravel(), theirs.ravel())[0, 1] > 0.999
        assert np.abs(ours.numpy() - theirs).max() < 0.05
    assert not torch.allclose(grad_cam(model, x, 1), grad_cam(model, x, 2))


@pytest.mark.parametrize('kwargs', [{}, dict(class_token=False), dict(reg_tokens=3), dict(qk_norm=True)])
def test_rollout_is_the_product_of_the_attentions(kwargs):
    model = create(**kwargs)
    x = torch.randn(2, 3, 64, 96)
    product, prefix = None, model.num_prefix_tokens
    with torch.inference_mode():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks:
            attn = block.attn
            q, k, _ = (
                attn.qkv(block.norm1(tokens)).reshape(2, -1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
            )
            weights = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale).softmax(-1).mean(1)
            weights = (weights + torch.eye(weights.shape[-1])) / 2
            product = weights if product is None else weights @ product
            tokens = block(tokens)
    row = product[:, 0] if model.has_class_token else product[:, prefix:].mean(1)
    expected = row[:, prefix:].reshape(2, 2, 3)
    torch.testing.assert_close(product.sum(-1), torch.ones(product.shape[:2]))
    got = attention_rollout(model, x)
    assert got.shape == (2, 64, 96)
    # the centres of the patches keep their order and, apart from the stretch, their distances
    centres = got[:, 15::32, 15::32].flatten(1)
    for ours, theirs in zip(centres, expected.flatten(1)):
        assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.99
    assert all(block.attn.fused_attn for block in model.blocks)


@pytest.mark.parametrize('patch_size', [16, 32])
def test_the_parallel_family_is_explained(photograph, patch_size):
    """Its ResNet by the map that its head pools, its ViT by the attention of every unit's block."""
    torch.manual_seed(0)  # of some random weights nothing is left behind the ReLU
    model = create('test_vitresnet_dual', patch_size=patch_size)
    x = torch.randn(2, 3, 70, 160)
    feature_map, _ = model.forward_features(x)
    # what Grad-CAM is where a linear head follows on the average: the map, weighted by the head
    expected = torch.einsum('bchw,c->bhw', feature_map, model.head_resnet.weight[3]).relu()
    assert feature_map.shape[2:] == (3, 5) and expected.max() > 0
    got = grad_cam(model, x, 3)
    assert got.shape == (2, 70, 160)
    centres = got[:, 15:64:32, 15::32].flatten(1)
    for ours, theirs in zip(centres, expected[:, :2].flatten(1)):
        assert torch.corrcoef(torch.stack([ours, theirs.detach()]))[0, 1] > 0.99
    attention = attention_rollout(model, x)
    assert attention.shape == (2, 70, 160) and attention.std() > 0.01
    averaged = attention_rollout(create('test_vitresnet_dual', patch_size=patch_size, global_pool='avg'), x)
    assert not torch.allclose(attention, averaged)
    explanation = explain(model, photograph)
    assert explanation.resnet.shape == explanation.vit.shape == (96, 219)
    assert all(unit.block.attn.fused_attn for unit in model.units)


def test_even_attention_leaves_an_even_map():
    model = create(class_token=False)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.qkv.bias)
    assert attention_rollout(model, torch.randn(1, 3, 96, 96)).abs().max() == 0


@pytest.mark.parametrize('size', [(97, 161), (33, 470), (225, 225)])
def test_maps_are_as_large_as_the_image(size):
    model = create()
    x = torch.randn(1, 3, *size)
    for values in (grad_cam(model, x, 0), attention_rollout(model, x)):
        assert values.shape == (1, *size)
        assert values.min() == 0 and values.max() == 1


def test_explain_sees_the_whole_image(photograph):
    model = create()
    explanation = explain(model, photograph, size=64)
    assert explanation.image.size == (146, 64)
    assert explanation.resnet.shape == explanation.vit.shape == (64, 146)
    pixels = torch.from_numpy(np.array(explanation.image)).permute(2, 0, 1)[None] / 255
    probabilities = model((pixels - 0.5) / 0.5)[0].softmax(-1)
    assert explanation.label == f'class {int(probabilities.argmax())}'
    assert explanation.probability == pytest.approx(probabilities.max().item(), abs=0.01)
    named = explain(model, photograph, target=2, size=64)
    assert named.label == 'class 2' and explain(model, photograph, target='class 2', size=64).label == 'class 2'
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_an_image_of_the_models_size_is_explained_as_it_is_predicted(tmp_path):
    model = create(img_size=64)
    model.pretrained_cfg['crop_pct'] = 1.0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    probabilities = model(timm_vitres.preprocess(image, model))[0].softmax(-1)
    explanation = explain(model, image)
    assert explanation.probability == pytest.approx(probabilities.max().item(), abs=1e-5)


def test_a_part_that_is_not_there_is_not_explained(photograph):
    assert explain(create('vitresnet', backbone='resnet18', depth=0), photograph, size=64).vit is None
    vit = create('vitresnet', backbone='', embed_dim=48, num_heads=3, depth=2)
    assert explain(vit, photograph, size=64).resnet is None
    with pytest.raises(ValueError, match='no ResNet'):
        grad_cam(vit, torch.randn(1, 3, 64, 64), 0)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(target=9), 'target: got 9'),
        (dict(target=-1), 'target: got -1, expected a class index from 0 to 4'),
        (dict(target=True), 'target: got True'),
        (dict(target=1.0), r'target: got 1\.0'),
        (dict(target='zebra'), "target: got 'zebra'"),
        (dict(target='1'), "target: got '1'"),
        (dict(size='big'), "size: got 'big', expected a whole number"),
        (dict(size=1.5), r'size: got 1\.5'),
        (dict(size=2100), 'size: the image of 160x70 pixels would be seen as 4800x2100, which is 9900 tokens'),
        (dict(size=0), 'size: got 0'),
        (dict(size=8), 'smaller than one token'),
    ],
)
def test_mistakes_are_named(photograph, kwargs, message):
    with pytest.raises(ValueError, match=message):
        explain(create(), photograph, **kwargs)


def test_a_very_long_image_is_refused_before_it_is_resized(tmp_path):
    """What would be 50,000 pixels wide costs nothing."""
    Image.new('L', (10000, 100)).save(tmp_path / 'long.png')  # images that are longer still are refused when opened
    serial, resnet = create(), create('vitresnet', backbone='resnet18', depth=0)
    for model in (serial, resnet, create('test_vitresnet_dual')):
        with pytest.raises(
            ValueError, match=r'size: the image of 10000x100 pixels would be seen as .* give a smaller size'
        ):
            explain(model, tmp_path / 'long.png', size=500)
    assert explain(serial, Image.new('L', (10000, 100)), size=32).vit.shape == (32, 3200)


def test_the_names_of_classes_come_first(photograph, tmp_path, capsys):
    """Of classes named 1, 2, 3 and so on, `--target 1` is the one of that name; an int is always an index."""
    model = create()
    model.pretrained_cfg['label_names'] = ['1', '2', '3', '0', '-1']
    assert explain(model, photograph, target=1, size=64).label == '2'
    assert explain(model, photograph, target=np.int64(1), size=64).label == '2'
    assert explain(model, photograph, target='1', size=64).label == '1'
    folder = timm_vitres.save(model, tmp_path / 'model', label_names=['1', '2', '3', '0', '-1'])
    command = ['explain', str(photograph), '--model', f'local-dir:{folder}', '--size', '64']
    command += ['--output', str(tmp_path / 'drawn.png'), '--target']
    for target, label in (('1', '1'), ('0', '0'), ('-1', '-1'), ('4', '-1')):
        assert cli.main([*command, target]) == 0
        assert capsys.readouterr().out.startswith(f'{label} (')
    for target in ('5', '-2'):
        assert cli.main([*command, target]) == 1
        assert f'target: got {target}, expected a class index from 0 to 4' in capsys.readouterr().err
    timm_vitres.save(model, folder, label_names=['crane', 'cat', 'crane', 'dog', 'owl'])
    assert cli.main([*command, 'crane']) == 1
    assert "target: got 'crane', the name of several classes; give the index of one: [0, 2]" in capsys.readouterr().err
    assert cli.main([*command, '2']) == 0


def test_what_can_not_be_explained_is_named(photograph):
    model = create()
    with pytest.raises(ValueError, match='model: it is in training mode'):
        explain(create().train(), photograph)
    with torch.inference_mode():  # as a server's handler may be
        assert explain(model, photograph).resnet.max() > 0
    torch.nn.init.constant_(model.head.weight, float('nan'))
    with pytest.raises(ValueError, match='model: its outputs for the image are not finite'):
        explain(model, photograph)


def test_other_models_are_named(photograph):
    with pytest.raises(ValueError, match='model: got ResNet'):
        explain(timm.create_model('resnet18'), photograph)
    with pytest.raises(ValueError, match='no head'):
        explain(create(num_classes=0), photograph)


@pytest.mark.parametrize('name, panels', [('test_vitresnet', 3), ('grey', 3)])
def test_the_command_draws(photograph, tmp_path, capsys, name, panels):
    model = create('test_vitresnet', in_chans=1 if name == 'grey' else 3)
    folder = timm_vitres.save(model, tmp_path / 'model', label_names=['cat', 'dog', 'owl', 'cow', 'elk'])
    output = tmp_path / 'explain.png'
    arguments = ['--model', f'local-dir:{folder}', '--target', 'owl', '--size', '64', '--output', str(output)]
    assert cli.main(['explain', str(photograph), *arguments]) == 0
    assert 'owl' in capsys.readouterr().out
    drawn = np.asarray(Image.open(output).convert('RGB')).astype(int)
    assert drawn.shape[0] > drawn.shape[1] * 0.4  # three wide panels, one below the other
    # the maps are in colour
    saturation = drawn.max(-1) - drawn.min(-1)
    third = drawn.shape[0] // panels
    assert all((saturation[third * i : third * (i + 1)] > 40).mean() > 0.1 for i in range(1, panels))
    assert cli.main(['explain', str(photograph), '--model', f'local-dir:{folder}', '--target', 'yak']) == 1
    assert "target: got 'yak'" in capsys.readouterr().err


def test_a_class_token_that_the_head_does_not_see_is_not_explained():
    """Pooled over patches, a model is explained by what they attend to."""
    model = randomise_(timm.create_model('test_vitresnet', global_pool='avg')).eval()
    assert model.cls_token is not None and not model.explained_parts().class_token
    assert timm.create_model('test_vitresnet').explained_parts().class_token


def test_images_are_seen_at_a_size_that_the_model_takes(tmp_path):
    """Of multiples alone, or up to a size: the nearest one, whatever the photograph's proportions."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 150, 3), dtype=np.uint8)).save(tmp_path / 'a.png')
    multiples = create('vitresnet', backbone='resnetaa34d', depth=1, num_heads=4, img_size=64)
    assert explain(multiples, tmp_path / 'a.png').image.size == (128, 64)
    cropped = create(pos_embed_fit='crop', img_size=(64, 96))
    found = explain(cropped, tmp_path / 'a.png')
    assert found.image.size == (96, 45) and found.vit.shape == (45, 96)
    assert explain(create(), tmp_path / 'a.png', size=33).image.size == (71, 33)  # every size


def test_threads_that_share_a_model_get_their_own_maps(tmp_path):
    model = create()
    xs = [torch.randn(1, 3, side, 64, generator=torch.Generator().manual_seed(side)) for side in (64, 96) * 4]
    expected = [(grad_cam(model, x, 1), attention_rollout(model, x)) for x in xs]
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            with torch.inference_mode():
                model(xs[1])

    other = threading.Thread(target=disturb)
    other.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda x: (grad_cam(model, x, 1), attention_rollout(model, x)), xs))
    finally:
        stop.set()
        other.join()
    for one, two in zip(found, expected):
        for a, b in zip(one, two):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(attention.fused_attn for attention in model.explained_parts().attentions)
