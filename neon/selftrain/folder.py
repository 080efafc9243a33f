"""What the files in the folder of a training are called, beside its snapshots."""

STATE_FILE = "training-state.pt"
SHARDS, FACTS_FILE, OF_STEP = "training-state", "state.json", "step-"
"""the folder in its place where the state is spread over processes; in it, what tells where and of what it is, and how
folders of it begin"""
LOG_FILE, CURVE_FILE = "training.jsonl", "training.csv"
"""every step, as it is taken; and the same as a table, whenever the state is saved"""
