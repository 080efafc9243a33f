"""Why flags of the published programs are refused: said by name, for a flag without effect would mislead.

An architecture's programs put these together in `refused`, from the flag without its dashes to what to do instead.
"""

LOADING = "images are loaded by the process that computes; leave it out"
PLACE = "a run lies in --outdir, and nowhere else; leave it out"
RESUMED = "the same command goes on where a killed run was; to start from other weights name them as the base"
SCORED = "no images are written on the way to a score; leave it out, and name a file for the scores with --json"
DEVICE = "the device is a GPU where there is one, else --device says; leave it out"
LAUNCHED = "torchrun says how many processes there are; leave it out"
CLASSES = "the checkpoint knows its classes; leave it out"
NO_EFFECT = "it had no effect in the published self-training, and would have none here; leave it out"
FIXED = "it is always as published; leave it out"
SELF_TRAINED = "name the self-trained weights with --self_trained"
BUDGET = "give the budget in images: --total_images"

TORCHRUN = dict.fromkeys(("dist_url", "world_size", "local_rank", "dist_on_itp"), LAUNCHED)
SCORES = {
    **dict.fromkeys(("temp_dir", "gen_dir", "out_dir"), SCORED),
    "cuda": DEVICE,
    "var_aux": SELF_TRAINED,
    "model_ckpt_aux": SELF_TRAINED,
    "no_isc": "the Inception Score costs nothing beside the FID; leave it out",
    "class_num": CLASSES,
    **TORCHRUN,
}
