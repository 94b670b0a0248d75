"""The private names of timm's that this package needs, each with the reason; no other module imports one."""

# Every model of timm's offers its features by this function, but timm.models does not export it.
from timm.models._features import feature_take_indices

# timm's public `save_for_hf` writes straight into the folder, so that a kill in between leaves half a file; what makes
# its config.json is private.
from timm.models._hub import save_config_for_hf

# `ByobNet` initialises itself in its constructor alone; this is how.
from timm.models.byobnet import _init_weights as init_byob_weights

__all__ = ['feature_take_indices', 'init_byob_weights', 'save_config_for_hf']
