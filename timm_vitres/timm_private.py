"""The private names of timm's, and torch's, that this package needs, each with the reason; no other module has one."""

# Every model of timm's offers its features by these, but timm.models exports neither.
from timm.models._features import FeatureGetterNet, feature_take_indices

# timm's public `save_for_hf` writes straight into the folder, so that a kill in between leaves half a file; what makes
# its config.json is private.
from timm.models._hub import save_config_for_hf

# `ByobNet` initialises itself in its constructor alone; this is how.
from timm.models.byobnet import _init_weights as init_byob_weights

# `torch.compiler.is_exporting` asks this. From torch 2.7 to 2.13 a graph that torch.compile captures, and that nobody
# exports, has True in the place of that call (github.com/pytorch/pytorch/issues/176347).
EXPORTING_FLAG = '_is_exporting_flag'

__all__ = ['EXPORTING_FLAG', 'FeatureGetterNet', 'feature_take_indices', 'init_byob_weights', 'save_config_for_hf']
