import pytest
import timm
import torch
from torch.nn import functional as F

from timm_vitres.data import data_config
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.tasks import MeanOverHeads, Teacher, create_task, create_teacher

NAMES = ['across', 'down', 'none']
CPU = torch.device('cpu')


def cfg(**kwargs) -> FinetuneCfg:
    return FinetuneCfg(**{**dict(data_dir='images', model='test_vitresnet'), **kwargs})


def model(name='test_vitresnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(num_classes=3), **kwargs})


def saved_teacher(folder, label_names=NAMES, **kwargs):
    """Save a teacher whose images are 48 x 64 and normalised their own way; return its name and itself."""
    import timm_vitres

    torch.manual_seed(1)
    teacher = timm.create_model('resnet10t', num_classes=len(label_names), **kwargs).eval()
    config = dict(data_config(teacher), input_size=(teacher.conv1[0].in_channels, 48, 64), mean=(0.4,), std=(0.3,))
    config.update(mean=config['mean'] * config['input_size'][0], std=config['std'] * config['input_size'][0])
    timm_vitres.save(teacher, folder, label_names=label_names, data_config=config)
    return f'local-dir:{folder}', teacher


def images(student, size=32):
    """Return images in 0 to 1, and the same as a student sees them."""
    pixels = torch.rand(4, student['input_size'][0], size, size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(student[name]).view(1, -1, 1, 1) for name in ('mean', 'std'))
    return pixels, (pixels - mean) / std


@pytest.mark.parametrize(
    'kind, options',
    [
        ('logit', {}),
        ('logit', dict(task_loss_weight=0.3)),
        ('feature', dict(task_loss_weight=0.3)),
        ('token', dict(kd_token_distill_type='soft')),
        ('token', dict(kd_token_distill_type='hard', task_loss_weight=0.3)),
    ],
)
def test_a_teacher_sees_the_images_its_own_way(tmp_path, kind, options):
    name, teacher = saved_teacher(tmp_path / 'teacher')
    student = model('test_vitresnet_dual' if kind == 'token' else 'test_vitresnet')
    config = dict(data_config(student), input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    settings = cfg(
        kd_model_name=name, kd_distill_type=kind, kd_temperature=3.0, distill_loss_weight=2.0, smoothing=0.0, **options
    )
    task = create_task(settings, student, NAMES, None, config, CPU).eval()
    pixels, x = images(config)
    seen = F.interpolate(pixels, (48, 64), mode='bicubic', antialias=True, align_corners=False)
    seen = (seen - 0.4) / 0.3
    target = torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        expected, features = teacher(seen), teacher.forward_head(teacher.forward_features(seen), pre_logits=True)
        if kind == 'token':
            student.train()
            logits, distilled = student(x)
        else:
            logits = distilled = student(x)
        found = task(x, target)['loss']
        loss = options.get('task_loss_weight', 1.0) * F.cross_entropy(logits, target)
        if kind == 'feature':
            own = student.forward_head(student.forward_features(x), pre_logits=True)
            loss += 2 * F.mse_loss(task.get_trainable_module().projection(own), features)
        elif options.get('kd_token_distill_type') == 'hard':
            loss += 2 * F.cross_entropy(distilled, expected.argmax(-1))
        else:
            soft = F.log_softmax(distilled / 3, -1), F.softmax(expected / 3, -1)
            loss += 2 * 9 * F.kl_div(*soft, reduction='batchmean')
    assert found.item() == pytest.approx(loss.item(), rel=1e-4)
    assert all(not parameter.requires_grad for parameter in task.teacher.parameters())


def test_a_teacher_answers_in_the_order_of_the_students_classes(tmp_path):
    name, teacher = saved_teacher(tmp_path / 'teacher', ['none', 'across', 'down'])
    config = dict(data_config(model()), input_size=(3, 32, 32))
    found = create_teacher(cfg(kd_model_name=name), NAMES, config)
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(found(x), teacher(x)[:, [1, 2, 0]])


def test_a_teachers_memory_format_is_the_students(tmp_path):
    name, teacher = saved_teacher(tmp_path / 'teacher')
    config, x = dict(data_config(model()), input_size=(3, 32, 32)), torch.randn(2, 3, 48, 64)
    for channels_last in (False, True):
        found = create_teacher(cfg(kd_model_name=name, channels_last=channels_last), NAMES, config)
        kernel = next(value for value in found.state_dict().values() if value.ndim == 4 and min(value.shape) > 1)
        assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
        torch.testing.assert_close(found(x), teacher(x))


def test_a_student_of_one_channel_has_a_teacher_of_three(tmp_path):
    name, teacher = saved_teacher(tmp_path / 'teacher')
    student = model(in_chans=1)
    config = dict(data_config(student), input_size=(1, 48, 64), mean=(0.5,), std=(0.25,))
    found = create_teacher(cfg(kd_model_name=name, in_chans=1), NAMES, config)
    pixels, x = images(config, 48)
    pixels, x = pixels[..., :1].expand(-1, -1, 48, 64), x[..., :1].expand(-1, -1, 48, 64)
    # timm sums the channels of the first convolution, so that a grey image is what it was
    expected = teacher((pixels.expand(-1, 3, -1, -1) - 0.4) / 0.3)
    torch.testing.assert_close(found(found.normalize_input(x)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    'names, says',
    [(['across', 'down'], 'has 2 classes, but the images have 3'), (['a', 'b', 'c'], "no class 'across'")],
)
def test_a_teacher_of_other_classes_is_refused_but_for_its_features(tmp_path, names, says):
    name, _ = saved_teacher(tmp_path / 'teacher', names)
    config = dict(data_config(model()), input_size=(3, 32, 32))
    with pytest.raises(ValueError, match=f'^kd_model_name: .*{says}'):
        create_teacher(cfg(kd_model_name=name), NAMES, config)
    assert isinstance(create_teacher(cfg(kd_model_name=name, kd_distill_type='feature'), NAMES, config), Teacher)


@pytest.mark.parametrize(
    'settings, says',
    [
        (dict(kd_model_name='resnet999'), '^kd_model_name: .*can not be loaded'),
        (dict(kd_model_name='resnet18', head_loss='both'), '^head_loss: .*kd_model_name'),
        (dict(kd_model_name='resnet18', kd_distill_type='token'), '^kd_distill_type: .*no second head'),
        (dict(balance_classes=True, bce_loss=True), '^balance_classes: '),
        (dict(balance_classes=True, cutmix=0.5), '^balance_classes: '),
    ],
)
def test_what_does_not_go_together(settings, says):
    config = dict(data_config(model()), input_size=(3, 32, 32))
    with pytest.raises(ValueError, match=says):
        create_task(cfg(**settings), model(), NAMES, [1, 2, 3], config, CPU)


def test_losses():
    config = dict(data_config(model()), input_size=(3, 32, 32))
    logits, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])

    def loss(target=target, counts=None, **kwargs):
        return create_task(cfg(**kwargs), model(), NAMES, counts, config, CPU).criterion(logits, target).item()

    hot = F.one_hot(target, 3).float()
    assert loss(smoothing=0.0) == pytest.approx(F.cross_entropy(logits, target).item())
    assert loss(smoothing=0.1) == pytest.approx(F.cross_entropy(logits, target, label_smoothing=0.1).item(), rel=1e-5)
    assert loss(hot, mixup=0.2) == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    bce = F.binary_cross_entropy_with_logits
    assert loss(bce_loss=True, smoothing=0.0) == pytest.approx(bce(logits, hot).item(), rel=1e-5)
    assert loss(bce_loss=True, bce_sum=True, smoothing=0.0) == pytest.approx(3 * bce(logits, hot).item(), rel=1e-5)
    weighted = bce(logits, hot, pos_weight=torch.tensor(2.0)).item()
    assert loss(bce_loss=True, bce_pos_weight=2.0, smoothing=0.0) == pytest.approx(weighted, rel=1e-5)
    soft = 0.6 * hot + 0.1
    thresholded = loss(soft, bce_loss=True, bce_target_thresh=0.5, mixup=0.2)
    assert thresholded == pytest.approx(bce(logits, hot).item(), rel=1e-5)
    weight = torch.tensor([6 / 3, 6 / 6, 6 / 9])
    balanced = F.cross_entropy(logits, target, weight=weight).item()
    assert loss(counts=[1, 2, 3], balance_classes=True, smoothing=0.0) == pytest.approx(balanced, rel=1e-5)


def test_mean_over_heads():
    target, one, other = torch.tensor([0, 1]), torch.randn(2, 3), torch.randn(2, 3)
    loss = MeanOverHeads(torch.nn.CrossEntropyLoss())
    both = (F.cross_entropy(one, target) + F.cross_entropy(other, target)) / 2
    torch.testing.assert_close(loss((one, other), target), both)
    torch.testing.assert_close(loss(one, target), F.cross_entropy(one, target))


def test_weights_of_classes():
    """A class without images weighs nothing; where smoothing would call common images rare, it is refused."""
    config = dict(data_config(model()), input_size=(3, 32, 32))

    def weight(counts, **kwargs):
        task = create_task(cfg(balance_classes=True, **kwargs), model(), NAMES, counts, config, CPU)
        return task.criterion.criterion.weight.tolist()

    assert weight([100, 50, 0]) == pytest.approx([0.75, 1.5, 0])
    # of 0.1, a third goes to each class; 27 times as rare is less than (1 - 0.1 + 0.1 / 3) / (0.1 / 3) = 28
    assert weight([270, 10, 10])[1] == pytest.approx(290 / 30)
    with pytest.raises(
        ValueError, match=r'^smoothing: got 0\.1, but with balance_classes .* counts as 29 of the com.*0\.097'
    ):
        weight([290, 10, 10])
    assert weight([290, 10, 10], smoothing=0.09)
