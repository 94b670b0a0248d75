"""Programs that take timm models as backbones, each run on a model by its name: the forward pass and a training step.

Every function raises where the program fails on the model, where loss or gradients are not finite, or where a parameter
of the model has no gradient, and returns the strides of the maps that the program takes, if it takes any. A size is
(height, width); options go to timm.create_model. tests/test_downstream.py runs them on our families,
benchmarks/downstream.py on timm's models, too.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, Tuple

import timm
import torch
import torch.nn.functional as F
from conftest import randomise_, write_folder

Strides = List[int]


def train(model: torch.nn.Module, body: torch.nn.Module, loss: torch.Tensor, spared: Tuple[str, ...] = ()) -> None:
    """Take a training step.

    Args:
        model: What is trained.
        body: The part of it that is timm's: all its parameters must have gradients.
        spared: Beginnings of the names of those that need none.
    """
    loss.backward()
    gradients = {name: value.grad for name, value in body.named_parameters() if not name.startswith(spared)}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise AssertionError(f'no gradient: {", ".join(missing)}')
    if not all(torch.isfinite(value).all() for value in (loss, *gradients.values())):
        raise AssertionError('loss or gradients are not finite')
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def segment(
    name: str, size: Tuple[int, int], architecture: str, in_chans: int = 3, spared: Tuple[str, ...] = (), **options: Any
) -> Strides:
    """Segment two images by a model of segmentation_models_pytorch; `options` are its own, too."""
    import segmentation_models_pytorch as smp

    settings = dict(encoder_name=f'tu-{name}', encoder_weights=None, in_channels=in_chans, classes=3)
    model = getattr(smp, architecture)(**settings, **options)
    images = torch.randn(2, in_chans, *size)
    logits = model.train()(images)
    assert logits.shape == (2, 3, *size), f'masks of {tuple(logits.shape[2:])} for images of {size}'
    train(model, model.encoder.model, F.cross_entropy(logits, torch.randint(0, 3, (2, *size))), spared)
    with torch.inference_mode():
        assert torch.isfinite(model.eval()(images)).all()
    if architecture == 'DPT':
        return model.encoder.output_strides
    strides = model.encoder.model.feature_info.reduction()
    if architecture in ('Unet', 'FPN'):  # they run on two maps of one size, too, but their decoders are made for others
        assert len(set(strides)) == len(strides), f'the strides of the levels are {strides}'
    return strides


def segment_by_dpt(name: str, size: Tuple[int, int], **options: Any) -> Strides:
    """Segment by smp.DPT, which takes maps before the final norm: head and norm have no part in it."""
    return segment(name, size, 'DPT', spared=('head', 'norm.', 'fc_norm.'), **options)


class Pyramid(torch.nn.Module):
    """A features_only model with torchvision's feature pyramid network on its last levels, four at most."""

    def __init__(self, name: str, **options: Any):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        levels = len(timm.create_model(name, features_only=True, **options).feature_info.out_indices)
        self.body = timm.create_model(name, features_only=True, out_indices=tuple(range(levels))[-4:], **options)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 64)
        self.out_channels = 64

    def forward(self, x):
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


def detect(name: str, size: Tuple[int, int], kind: str, **options: Any) -> Strides:
    """Detect on two images of different sizes by a detector of torchvision's."""
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    pyramid = Pyramid(name, **options)
    strides = pyramid.body.feature_info.reduction()
    anchors = AnchorGenerator(tuple((4 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
    sizes = dict(min_size=min(size), max_size=max(size))
    if kind == 'FasterRCNN':
        pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], 7, 2)
        model = FasterRCNN(
            pyramid, 3, rpn_anchor_generator=anchors, box_roi_pool=pool, box_detections_per_img=5, **sizes
        )
    else:
        model = RetinaNet(pyramid, 3, anchor_generator=anchors, detections_per_img=5, **sizes)
    images = [torch.rand(3, *size), torch.rand(3, *size[::-1])]
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    targets = [{'boxes': boxes, 'labels': torch.tensor([label])} for label in (1, 2)]
    losses = model.train()(images, targets)
    train(model, pyramid.body, sum(losses.values()))
    with torch.inference_mode():
        detections = model.eval()(images)
    assert len(detections) == 2 and all(torch.isfinite(found['boxes']).all() for found in detections)
    return strides


def classify(name: str, size: Tuple[int, int], **options: Any) -> Strides:
    """Classify by transformers' TimmWrapper, and return all hidden states by it."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture=name, num_labels=3, model_args=options)
    model = TimmWrapperForImageClassification(config)
    images = torch.randn(2, 3, *size)
    result = model.train()(images, labels=torch.tensor([0, 2]))
    assert result.logits.shape == (2, 3)
    train(model, model.timm_model, result.loss)
    with torch.inference_mode():
        hidden = model.eval()(images, output_hidden_states=True).hidden_states
    info = model.timm_model.feature_info
    assert len(hidden) == len(info) and all(torch.isfinite(state).all() for state in hidden)
    return []


def take_maps(name: str, size: Tuple[int, int], **options: Any) -> Strides:
    """Take the maps of transformers' TimmBackbone."""
    from transformers import TimmBackbone, TimmBackboneConfig

    levels = timm.create_model(name, features_only=True, **options).feature_info.out_indices
    backbone = TimmBackbone(TimmBackboneConfig(backbone=name, out_indices=tuple(levels)), **options)
    maps = backbone.train()(torch.randn(2, 3, *size)).feature_maps
    assert [level.shape[1] for level in maps] == backbone.channels
    train(backbone, backbone._backbone, sum(level.square().mean() for level in maps))
    return backbone._backbone.feature_info.reduction()


def learn(name: str, size: Tuple[int, int], **options: Any) -> Strides:
    """Fine-tune with fastai: new head first, then, unfrozen, the body."""
    from fastai.vision.all import ImageDataLoaders, Resize, vision_learner

    with TemporaryDirectory() as folder:
        loaders = ImageDataLoaders.from_folder(
            write_folder(Path(folder) / 'images'), valid_pct=0.25, seed=0, item_tfms=Resize(size), bs=8, num_workers=0
        )
        learner = vision_learner(loaders, name, pretrained=False, metrics=[], path=folder, **options)
        assert learner.model(torch.randn(2, 3, *size)).shape == (2, 2)
        before = [value.clone() for value in learner.model.parameters()]
        with learner.no_bar(), learner.no_logging():
            learner.fine_tune(1)
    for (key, value), old in zip(learner.model.named_parameters(), before):
        assert torch.isfinite(value).all() and not torch.equal(value, old), f'{key} is not finite, or not trained'
    return []


def cams(model: torch.nn.Module, size: Tuple[int, int]) -> List[Any]:
    """Return pytorch-grad-cam's maps of an image, (num_classes, height, width) each.

    They are taken at the ResNet's last map, and, where there are any, at the last tokens.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    places: List[Tuple[torch.nn.Module, Any]] = []
    if hasattr(model, 'blocks') and hasattr(model, 'patch_embed'):
        stride = model.feature_info[-1]['reduction']
        grid = [-(-side // stride) for side in size]

        def to_map(tokens):
            return tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)

        places = [(model.patch_embed.backbone, None), (model.blocks[-1].norm1, to_map)]
    else:
        places = [(model.get_submodule(model.feature_info[-1]['module']), None)]
    images = torch.randn(1, 3, *size).repeat(model.num_classes, 1, 1, 1)
    targets = [ClassifierOutputTarget(label) for label in range(model.num_classes)]
    found = []
    for layer, reshape_transform in places:
        with GradCAM(model=model, target_layers=[layer], reshape_transform=reshape_transform) as cam:
            found.append(cam(input_tensor=images, targets=targets))
    return found


def explain(name: str, size: Tuple[int, int], **options: Any) -> Strides:
    """Find where a model looks by pytorch-grad-cam."""
    model = randomise_(timm.create_model(name, num_classes=5, **options))  # as it is made, much of it may be zero
    for cam in cams(model, size):
        assert cam.shape == (5, *size) and cam.min() >= 0, f'maps of {cam.shape}'
        # nothing may speak for a class, but something does for one of them
        assert cam.max() > 0.9 and cam.std((1, 2)).max() > 0.01, 'a map of one value'
    return []


# What each program is called, a size for it, no multiple of 32 where it takes such ones, and its function
PROGRAMS: Dict[str, Tuple[Tuple[int, int], Callable[..., Strides]]] = {
    'smp Unet': ((97, 161), partial(segment, architecture='Unet')),
    'smp FPN': ((96, 160), partial(segment, architecture='FPN')),
    'smp DeepLabV3': ((96, 144), partial(segment, architecture='DeepLabV3')),
    'smp DPT': ((96, 160), segment_by_dpt),
    'torchvision Faster R-CNN': ((97, 161), partial(detect, kind='FasterRCNN')),
    'torchvision RetinaNet': ((97, 161), partial(detect, kind='RetinaNet')),
    'transformers TimmWrapper': ((97, 161), classify),
    'transformers TimmBackbone': ((97, 161), take_maps),
    'fastai': ((97, 161), learn),
    'pytorch-grad-cam': ((97, 161), explain),
}
