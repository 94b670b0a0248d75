"""Hybrids of ResNet and Vision Transformer for timm: importing this registers the models."""

from .config import VitResNetCfg, VitResNetDualCfg
from .data import preprocess
from .fold import fold
from .hub import push, verify
from .prepare import prepare
from .saving import save
from .vitresnet import VitResNet
from .vitresnet_dual import VitResNetDual

__version__ = '0.1.0'
__all__ = ['VitResNet', 'VitResNetCfg', 'VitResNetDual', 'VitResNetDualCfg']
__all__ += ['fold', 'prepare', 'preprocess', 'push', 'save', 'verify']
