"""All kinds, by the classes of their pipelines."""

from neon.errors import RequestError
from neon_diffusers.kinds.classes import Classes
from neon_diffusers.kinds.flow import Flow
from neon_diffusers.kinds.kind import Kind
from neon_diffusers.kinds.pixels import Pixels
from neon_diffusers.kinds.stable import StableDiffusion
from neon_diffusers.pipeline import Pipeline

KINDS: tuple[type[Kind], ...] = (Pixels, Classes, StableDiffusion, Flow)
BY_PIPELINE = {name: kind for kind in KINDS for name in kind.pipelines}


def kind_of(pipeline: Pipeline) -> Kind:
    """The pipeline as one of its kind.

    Raises:
        RequestError: it is of no kind that is served, or a component is not.
    """
    kind = BY_PIPELINE.get(pipeline.class_name)
    if kind is None:
        served = ", ".join(f"{name} ({', '.join(kind.denoisers)})" for name, kind in BY_PIPELINE.items())
        raise RequestError(f"{pipeline.source}: a {pipeline.class_name}; served are {served}")
    return kind(pipeline)
