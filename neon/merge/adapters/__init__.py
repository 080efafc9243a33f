"""LoRA adapters: read over a base, as the weights that they change it to."""

from neon.merge.adapters.names import weights_of
from neon.merge.adapters.over import AdaptedCheckpoint, adapted, is_over

__all__ = ["AdaptedCheckpoint", "adapted", "is_over", "weights_of"]
