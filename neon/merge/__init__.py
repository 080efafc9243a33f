"""theta_neon = (1 + w) theta_base - w theta_self_trained, on tensors, state dicts, live networks and files.

w = 0 is the base, w = -1 the self-trained model, w > 0 Neon.
"""

from neon.merge.extrapolate import LEAST_CHANGE, Change, MergeWarning, UpdateStats, merge_tensor
from neon.merge.files import MergeReport, merge_files
from neon.merge.pair import check_same_network, load_self_trained, load_self_trained_network
from neon.merge.samplers import warn_of_merge, warn_of_snapshot
from neon.merge.states import LiveMerge, merge_state

__all__ = [
    "LEAST_CHANGE",
    "Change",
    "LiveMerge",
    "MergeReport",
    "MergeWarning",
    "UpdateStats",
    "check_same_network",
    "load_self_trained",
    "load_self_trained_network",
    "merge_files",
    "merge_state",
    "merge_tensor",
    "warn_of_merge",
    "warn_of_snapshot",
]
