"""Training a generative model: briefly on its own samples (Neon), or from scratch on real images.

The noise of a training image belongs to its visit (the n-th image that training looks at), and on a CPU
gradients are added up in a fixed order of micro-batches; so there the weights do not depend on the number
of processes, and a killed run that continues ends with the weights of one that was never killed. On GPUs
gradients are reduced by NCCL, in the order that is fastest.
"""

from neon.selftrain.curve import training_curve
from neon.selftrain.examples import asked, check_trainable, encoded_once
from neon.selftrain.folder import CURVE_FILE, LOG_FILE, STATE_FILE
from neon.selftrain.loop import EXAMPLES, train, train_in_folder
from neon.selftrain.plan import largest_divisor, recipe_of, training_identity, usual_micro_batch
from neon.selftrain.run import TrainingRun
from neon.selftrain.snapshots import Snapshot, pickle_copies, snapshot_path, snapshot_steps
from neon.selftrain.visits import visit

__all__ = [
    "CURVE_FILE",
    "EXAMPLES",
    "LOG_FILE",
    "STATE_FILE",
    "Snapshot",
    "TrainingRun",
    "asked",
    "check_trainable",
    "encoded_once",
    "largest_divisor",
    "pickle_copies",
    "recipe_of",
    "snapshot_path",
    "snapshot_steps",
    "train",
    "train_in_folder",
    "training_curve",
    "training_identity",
    "usual_micro_batch",
    "visit",
]
