"""theta_neon = (1 + w) theta_base - w theta_self_trained, on tensors, state dicts, live networks and files.

w = 0 is the base, w = -1 the self-trained model, w > 0 Neon.
"""

from neon.merge.extrapolate import LEAST_CHANGE, Change, MergeWarning, UpdateStats, merge_tensor
from neon.merge.files import merge_files
from neon.merge.folders import FolderReport, is_folder_merge, merge_folders
from neon.merge.pair import check_same_network, load_self_trained, load_self_trained_network
from neon.merge.precision import Precision
from neon.merge.samplers import warn_of_merge, warn_of_snapshot
from neon.merge.states import LiveMerge, merge_state
from neon.merge.streaming import MergeReport

__all__ = [
    "LEAST_CHANGE",
    "Change",
    "FolderReport",
    "LiveMerge",
    "MergeReport",
    "MergeWarning",
    "Precision",
    "UpdateStats",
    "check_same_network",
    "is_folder_merge",
    "load_self_trained",
    "load_self_trained_network",
    "merge_files",
    "merge_folders",
    "merge_state",
    "merge_tensor",
    "warn_of_merge",
    "warn_of_snapshot",
]
