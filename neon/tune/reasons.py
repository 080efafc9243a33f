"""Why a run gained nothing, as a sentence."""

from neon.report.record import Report, paired_gain
from neon.tune.run import Tuner

SMALL_MOVE = 1e-3
"""|self-trained - base| / |base| below which a self-training has hardly begun: the demo's is 2e-2"""
AT_THE_END = 0.9
"""share of the highest w from which on a choice is taken to want more"""


def why_nothing_gained(report: Report, tuners: tuple[Tuner, ...]) -> str | None:
    """The likeliest reason, and what to do about it; None: something was gained beyond the noise.

    `tuners` are those of the samplers that w was chosen at.
    """
    fair, best = report.fair, report.best
    if best is not fair and paired_gain(fair, best).certain:
        return None
    moved = max(tuner.moved for tuner in tuners)
    if moved < SMALL_MOVE:
        return (
            f"The self-training moved the weights by {moved:.1e} of their norm, less than {SMALL_MOVE:g}: too little "
            "to step away from; train on more images (--training_images)."
        )
    plan = tuners[0].plan
    highest = [tuner for tuner in tuners if tuner.best.w >= AT_THE_END * plan.w[1] > 0]
    if plan.grid is None and highest:
        return f"The best w lies at the end of its range, {plan.w[1]:g}: search further (--w), or train on more images."
    if best is not fair and paired_gain(fair, best).mean > 0:
        return (
            f"The difference is within the noise of {plan.blocks} x {plan.report_images:,} report images: more of them "
            "(--report_images, --blocks) would tell whether there is a gain."
        )
    return (
        "A step away from the self-trained weights does not bring the samples nearer to the real images: this sampler "
        "hardly seeks modes (few steps, guidance, a low temperature or top-k make one do so), so there is nothing to "
        "undo."
    )
