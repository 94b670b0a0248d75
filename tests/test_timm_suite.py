"""timm's own tests of models, run on ours: the source distribution of the installed timm, its tests/test_models.py.

By hand: python -m pytest tests/test_timm_suite.py -s
"""

import re
import subprocess
import sys
import tarfile

import pytest
import timm

SMALL = ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix', 'vitresnet_nano', 'vitresnet_mix_nano']
# by name, so that the first means all of them
LARGE = ['vitresnet', 'vitresnet_tiny', 'vitresnet_small', 'vitresnet_dual_tiny']
LARGE += ['vitresnet_mix', 'vitresnet_mix_eca_bot26ts', 'vitresnet_mix_se_bot33ts']
# timm's lists of models by name, and how they change to know ours: tokens come out of forward_features and pool_size is
# None, as in its ViTs, but the pyramid's test is kept on; forward_intermediates is tested by module.
PATCHES = [
    ('NON_STD_FILTERS = [\n', "NON_STD_FILTERS = [\n    'vitresnet*',\n"),
    ('FEAT_INTER_FILTERS = [\n', "FEAT_INTER_FILTERS = [\n    'vitresnet', 'vitresnet_dual', 'vitresnet_mix',\n"),
    (
        'EXCLUDE_FEAT_FILTERS = NON_STD_FILTERS[:]\n',
        "EXCLUDE_FEAT_FILTERS = [f for f in NON_STD_FILTERS if f not in ('vitresnet*', 'test_vit*')]\n",
    ),
    # the parallel family's features are a tuple, as this test allows for, but then adds it to a list
    (
        'features = features if isinstance(features, (list, tuple)) else [features]\n        sum(',
        'features = list(features) if isinstance(features, (list, tuple)) else [features]\n        sum(',
    ),
]
# tests with 'pretrained' in their name download weights of every model
DESELECTED = ['vitresnet_base', 'vitresnet_large', 'dual_small', 'dual_base', 'mix_bot', 'mix_alter', 'pretrained']


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """Return the folder with timm's tests/test_models.py, which knows ours; a failed download is a failure."""
    folder = tmp_path_factory.mktemp('timm')
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', f'timm=={timm.__version__}', '--no-binary', 'timm']
    subprocess.run([*command, '--no-deps', '--dest', str(folder)], check=True)
    (archive,) = folder.glob('timm-*.tar.gz')
    name = f'timm-{timm.__version__}/tests/test_models.py'
    with tarfile.open(archive) as tar:
        text = tar.extractfile(name).read().decode()
    for old, new in PATCHES:
        assert text.count(old) == 1, f'timm {timm.__version__} has no {old!r} in {name} any more'
        text = text.replace(old, new)
    (folder / 'test_models.py').write_text(text)
    return folder


@pytest.mark.recent
@pytest.mark.parametrize('names', [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=['small', 'large'])
def test_timms_suite(names, suite):
    chosen = f'({" or ".join(names)}) and not ({" or ".join(DESELECTED)})'
    command = [sys.executable, '-m', 'pytest', '-p', 'timm_vitres', '-p', 'no:cacheprovider', '-rs', '-v']
    command += ['-W', 'ignore', '-k', chosen, 'test_models.py', '--durations=8']
    result = subprocess.run(command, cwd=suite, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
    passed = re.findall(r'::(test_\w+)\[(?:\d+-)?([\w.]+?)(?:-\d+)?\] PASSED', result.stdout)
    # every one of timm's tests that is run for all models, on every one of ours
    for test in (
        *(
            'test_model_forward',
            'test_model_backward',
            'test_model_default_cfgs_non_std',
            'test_model_forward_features',
        ),
        *('test_model_forward_torchscript', 'test_model_forward_fx', 'test_model_backward_fx'),
        *('test_model_forward_intermediates', 'test_model_forward_intermediates_features'),
        'test_prune_intermediate_layers_contract',
    ):
        assert {name.split('.')[0] for found, name in passed if found == test} >= set(names), test
    # timm's own limits on size are the only reason to skip
    skipped = re.findall(r'^SKIPPED .*$', result.stdout, re.MULTILINE)
    assert all('size model > limit' in line for line in skipped), skipped
