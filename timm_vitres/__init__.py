"""Hybrids of ResNet and Vision Transformer for timm: importing this registers the models.

What the package does is called by verbs at its root, such as `timm_vitres.finetune`. A verb's module is imported when
the verb is first used, so that importing the package takes little longer than importing timm.
"""

import importlib
from typing import TYPE_CHECKING, Any, List

from .models.config import VitResNetCfg, VitResNetDualCfg, VitResNetMixCfg
from .models.vitresnet import VitResNet
from .models.vitresnet_dual import VitResNetDual
from .models.vitresnet_mix import VitResNetMix

if TYPE_CHECKING:
    from .data import preprocess
    from .explanation import explain
    from .inference.exports import export
    from .inference.folding import fold
    from .inference.preparation import prepare
    from .prediction import predict, predict_each
    from .publishing.conversion import convert
    from .publishing.hub import push, verify
    from .publishing.saving import save
    from .training.comparing import compare
    from .training.loop import finetune
    from .training.recipes import recipe
    from .training.settings import FinetuneCfg

__version__ = '0.1.0'
# The module that each name is imported from when it is first used
_LAZY = {
    'FinetuneCfg': 'training.settings',
    'compare': 'training.comparing',
    'convert': 'publishing.conversion',
    'explain': 'explanation',
    'export': 'inference.exports',
    'finetune': 'training.loop',
    'fold': 'inference.folding',
    'predict': 'prediction',
    'predict_each': 'prediction',
    'prepare': 'inference.preparation',
    'preprocess': 'data',
    'push': 'publishing.hub',
    'recipe': 'training.recipes',
    'save': 'publishing.saving',
    'verify': 'publishing.hub',
}
__all__ = ['FinetuneCfg', 'VitResNet', 'VitResNetCfg', 'VitResNetDual', 'VitResNetDualCfg']
__all__ += ['VitResNetMix', 'VitResNetMixCfg']
__all__ += ['compare', 'convert', 'explain', 'export', 'finetune', 'fold', 'predict', 'predict_each', 'prepare']
__all__ += ['preprocess', 'push', 'recipe', 'save', 'verify']


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_LAZY[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
