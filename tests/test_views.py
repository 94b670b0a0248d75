"""Test-time augmentation is the mean over views that are written out here one by one."""

import numpy as np
import pytest
import timm
import torch
from conftest import dual, randomise_, relative_difference

from timm_vitres.views import TTA, averaged


def by_hand(model, x, tta, move) -> torch.Tensor:
    """Return the mean of the logits, image by image and view by view, by NumPy's padding."""
    rows = []
    for image in x.numpy():
        views = [(image, 4), (image[..., ::-1], 4)]
        if tta == 'shift':
            vertical, horizontal = move
            height, width = image.shape[1:]
            padding = ((0, 0), (vertical, vertical), (horizontal, horizontal))
            around = np.pad(image, padding, mode='reflect')
            for top, left in ((0, 0), (2 * vertical, 2 * horizontal)):
                moved = around[:, top : top + height, left : left + width]
                views = [*views, (moved, 2), (moved[..., ::-1], 2)]
        logits = [weight * model(torch.from_numpy(view.copy())[None])[0] for view, weight in views]
        rows.append(sum(logits) / sum(weight for _, weight in views))
    return torch.stack(rows)


@pytest.mark.parametrize(
    'tta, size, move', [('flip', (40, 40), None), ('shift', (32, 32), (1, 1)), ('shift', (40, 96), (1, 3))]
)
def test_views_are_those_that_are_written_out(tta, size, move, model):
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = averaged(model, x, tta)
        torch.testing.assert_close(found, by_hand(model, x, tta, move), rtol=1e-4, atol=1e-5)
        alone = averaged(model, x)
    assert torch.equal(alone, model(x)) and not torch.allclose(found, alone, rtol=1e-2)


def test_an_image_moves_by_one_pixel_in_32():
    """The weights of pixels are those of the views, which are six."""

    class Picture(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)

    x = torch.zeros(1, 1, 96, 64)
    x[0, 0, 50, 20] = 16
    found = averaged(Picture(), x, 'shift').view(96, 64)
    expected = torch.zeros(96, 64)
    for row, column, weight in ((50, 20, 4), (47, 18, 2), (53, 22, 2)):  # 96 / 32 rows, 64 / 32 columns
        expected[row, column] = expected[row, 63 - column] = weight
    assert torch.equal(found, expected)
    assert torch.equal(averaged(Picture(), torch.ones(2, 1, 1, 1), 'shift'), torch.ones(2, 1))  # nowhere to move


def test_what_is_flipped_has_the_same_flips(model):
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(averaged(model, x.flip(-1), 'flip'), averaged(model, x, 'flip'))
        assert not torch.equal(averaged(model, x.flip(-1)), averaged(model, x))


@pytest.mark.parametrize('tta', TTA)
def test_logits_are_averaged_in_float32_under_autocast(tta):
    model, x = dual(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        exact = averaged(model, x, tta)
        with torch.autocast('cpu', torch.bfloat16):
            found = averaged(model, x, tta)
            logits, mirrored = model(x), model(x.flip(-1))
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32 and found.shape == (2, 3)
    assert relative_difference(found, exact) < 0.1
    if tta != 'shift':
        assert torch.equal(found, (logits.float() + mirrored.float()) / 2 if tta else logits.float())


def test_timm_models_are_averaged_too():
    model = randomise_(timm.create_model('test_resnet', num_classes=3))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            averaged(model, x, 'shift'), by_hand(model, x, 'shift', (2, 2)), rtol=1e-4, atol=1e-5
        )


def test_views_that_do_not_exist(model):
    with pytest.raises(ValueError, match=r"tta: got 'flips', expected one of '', 'flip', 'shift'"):
        averaged(model, torch.zeros(1, 3, 32, 32), 'flips')
