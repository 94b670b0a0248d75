"""Programs that take timm models as backbones take ours as they are: segmentation, detection, transformers, fastai."""

import json

import pytest
import timm
import torch
from conftest import randomise_, relative_difference

import timm_vitres

NAME = 'vitresnet_small'


def segment(name: str, architecture: str, in_chans: int, size, **kwargs) -> None:
    """Segment two images, then take a training step."""
    import segmentation_models_pytorch as smp

    options = dict(encoder_name=f'tu-{name}', encoder_weights=None, in_channels=in_chans, classes=3, **kwargs)
    model = getattr(smp, architecture)(**options)
    images = torch.randn(2, in_chans, *size)
    model.train()
    logits = model(images)
    assert logits.shape == (2, 3, *size)
    loss = torch.nn.functional.cross_entropy(logits, torch.randint(0, 3, (2, *size)))
    loss.backward()
    assert not [key for key, value in model.encoder.named_parameters() if value.grad is None]
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.inference_mode():
        assert torch.isfinite(model.eval()(images)).all()


@pytest.mark.parametrize('in_chans', [3, 4])
@pytest.mark.parametrize('architecture', ['Unet', 'FPN'])
def test_segmentation(architecture, in_chans):
    segment(NAME, architecture, in_chans, (128, 192))


@pytest.mark.parametrize('name', ['vitresnet_tiny', 'test_vitresnet', 'vitresnet', 'vitresnet_dual_tiny'])
def test_segmentation_of_the_others(name):
    segment(name, 'Unet', 3, (96, 64))


def test_segmentation_with_four_levels():
    segment('vitresnet_base', 'Unet', 3, (64, 64), encoder_depth=4, decoder_channels=(64, 32, 16, 8))


@pytest.mark.parametrize('output_stride', [8, 16])
def test_segmentation_with_dilation(output_stride):
    segment('test_vitresnet', 'DeepLabV3', 3, (64, 96), encoder_output_stride=output_stride)


def test_segmentation_sees_the_whole_pyramid():
    """What reaches smp's decoder is what features_only gives."""
    import segmentation_models_pytorch as smp

    encoder = smp.Unet(f'tu-{NAME}', encoder_weights=None).encoder.eval()
    model = timm.create_model(NAME, features_only=True).eval()
    model.load_state_dict(encoder.model.state_dict())
    x = torch.randn(1, 3, 96, 160)
    with torch.inference_mode():
        for theirs, ours in zip(encoder(x)[1:], model(x), strict=True):
            torch.testing.assert_close(theirs, ours)


class Pyramid(torch.nn.Module):
    """A features_only model with torchvision's feature pyramid network on its last four levels."""

    def __init__(self, name: str):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 64)
        self.out_channels = 64

    def forward(self, x):
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


def detect(name: str, kind: str) -> None:
    """Detect on two images of different, non-square sizes, after a training step."""
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    sizes = dict(min_size=96, max_size=160)
    if kind == 'FasterRCNN':
        pool = MultiScaleRoIAlign(['0', '1', '2', '3'], 7, 2)
        model = FasterRCNN(
            Pyramid(name), 3, rpn_anchor_generator=anchors, box_roi_pool=pool, box_detections_per_img=5, **sizes
        )
    else:
        model = RetinaNet(Pyramid(name), 3, anchor_generator=anchors, detections_per_img=5, **sizes)
    images = [torch.rand(3, 96, 150), torch.rand(3, 130, 97)]
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    targets = [{'boxes': boxes, 'labels': torch.tensor([label])} for label in (1, 2)]
    losses = model.train()(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert not [key for key, value in model.backbone.named_parameters() if value.grad is None]
    with torch.inference_mode():
        detections = model.eval()(images)
    assert len(detections) == 2 and all(torch.isfinite(found['boxes']).all() for found in detections)


@pytest.mark.parametrize('kind', ['FasterRCNN', 'RetinaNet'])
def test_detection(kind):
    detect(NAME, kind)


def test_detection_with_the_parallel_family():
    detect('vitresnet_dual_tiny', 'FasterRCNN')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a model saved with class names."""
    model = randomise_(timm.create_model(NAME, num_classes=3, drop_path_rate=0.1))
    path = timm_vitres.save(model, tmp_path_factory.mktemp('saved') / 'model', label_names=['cat', 'dog', 'owl'])
    return path, model


def test_transformers_classifies(folder):
    """TimmWrapper gives the logits, the class names and the preprocessing of the saved model."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    path, model = folder
    wrapped = AutoModelForImageClassification.from_pretrained(path).eval()
    assert wrapped.config.id2label == {0: 'cat', 1: 'dog', 2: 'owl'}
    image = Image.new('RGB', (300, 260), (90, 30, 200))
    pixels = AutoImageProcessor.from_pretrained(path)(image, return_tensors='pt')['pixel_values']
    torch.testing.assert_close(pixels, timm_vitres.preprocess(image, model))
    with torch.inference_mode():
        assert relative_difference(wrapped(pixels).logits, model(pixels)) < 1e-6
        hidden = wrapped(pixels, output_hidden_states=True).hidden_states
        assert len(hidden) == len(model.feature_info)
        features = AutoModel.from_pretrained(path).eval()(pixels)
        assert relative_difference(features.last_hidden_state, model.forward_features(pixels)) < 1e-6
        assert (
            relative_difference(
                features.pooler_output, model.forward_head(model.forward_features(pixels), pre_logits=True)
            )
            < 1e-6
        )


def test_transformers_backbone(folder):
    """TimmBackbone gives the pyramid of the saved model, from `timm.create_model`'s own names."""
    from transformers import TimmBackbone

    path, model = folder
    backbone = TimmBackbone.from_pretrained(f'local-dir:{path}', out_indices=(0, 1, 2, 3, 4)).eval()
    assert backbone.channels == [64, 256, 512, 1024, 384]
    x = torch.randn(1, 3, 97, 160)
    with torch.inference_mode():
        ours = model.forward_intermediates(x, indices=[0, 1, 2, 3, 4], intermediates_only=True)
        for theirs, feature in zip(backbone(x).feature_maps, ours, strict=True):
            assert relative_difference(theirs, feature) < 1e-6


@pytest.mark.parametrize('name', ['vitresnet_tiny', 'vitresnet_nano', 'test_vitresnet', 'test_vitresnet_dual'])
def test_transformers_backbone_of_the_others(name):
    """Every entry of feature_info has a name of its own, which transformers insists on."""
    from transformers import TimmBackbone, TimmBackboneConfig

    model = timm.create_model(name)
    every = tuple(range(len(model.feature_info)))
    backbone = TimmBackbone(TimmBackboneConfig(backbone=name, out_indices=every)).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 64, 64)).feature_maps
    assert [feature.shape[1] for feature in maps] == [level['num_chs'] for level in model.feature_info]


def test_a_saved_config_names_its_classes_once(folder):
    path, _ = folder
    assert 'num_classes' not in json.loads((path / 'config.json').read_text())['model_args']


def learn(name: str, image_folder) -> None:
    """Fine-tune with fastai: new head first, then, unfrozen, the body."""
    from fastai.vision.all import ImageDataLoaders, Resize, vision_learner

    loaders = ImageDataLoaders.from_folder(
        image_folder, valid_pct=0.25, seed=0, item_tfms=Resize(64), bs=8, num_workers=0
    )
    learner = vision_learner(loaders, name, pretrained=False, metrics=[])
    assert learner.model(torch.randn(2, 3, 64, 64)).shape == (2, 2)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(1)
    assert not [key for key, value in learner.model.named_parameters() if not torch.isfinite(value).all()]


@pytest.mark.parametrize('name', [NAME, 'vitresnet_nano', 'test_vitresnet_dual'])
def test_fastai(image_folder, name):
    learn(name, image_folder)


def cams(name: str):
    """Return pytorch-grad-cam's maps at the last ResNet stage and at the tokens, (1, 96, 160) each."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    model = randomise_(timm.create_model(name, num_classes=5))
    x, grid = torch.randn(1, 3, 96, 160), (3, 5)

    def to_map(tokens):
        return tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(len(tokens), -1, *grid)

    targets = [ClassifierOutputTarget(2)]
    with GradCAM(model=model, target_layers=[model.patch_embed.backbone]) as cam:
        resnet = cam(input_tensor=x, targets=targets)
    with GradCAM(model=model, target_layers=[model.blocks[-1].norm1], reshape_transform=to_map) as cam:
        tokens = cam(input_tensor=x, targets=targets)
    return resnet, tokens


def test_grad_cam():
    for cam in cams(NAME):
        assert cam.shape == (1, 96, 160)
        assert cam.min() >= 0 and cam.max() > 0.9 and cam.std() > 0.01
