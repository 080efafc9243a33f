"""What a pipeline's folder says of itself: `model_index.json` and the configurations of its components, as plain data.

Nothing that they name is imported. `described` reads any pipeline; `Pipeline.of` refuses one that names code.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon.checkpoint.weight_sets import DENOISERS, PIPELINE_FILE, pipeline_of
from neon.errors import RequestError
from neon.runtime.hub import fetched, hub_name, is_hub_name
from neon.runtime.small_json import read_table

SCHEDULER = "scheduler"
FROZEN = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""components that are no part of what is trained"""
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}
"""what components may come from; the last one, a module of diffusers, has the safety checker, which is not loaded"""
_CODE = ("auto_map", "custom_pipelines", "custom_pipeline")
"""entries of a configuration that name code of its own"""


@dataclass(frozen=True)
class Component:
    """A model or scheduler of a pipeline, by the name of its class and its configuration."""

    class_name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline whose components are of known libraries."""

    class_name: str
    components: Mapping[str, Component]
    """those with a configuration, by name"""
    place: str | None
    """its folder, or its name on the Hub with the commit; None: not told"""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Pipeline":
        """The pipeline of a description as `described` makes it, or as a file carries it.

        Raises:
            RequestError: it names code that is in no known library, or is no description.
        """
        place = config.get("place")
        place = place if isinstance(place, str) else None
        name, entries = config.get("pipeline"), config.get("components")
        if not isinstance(name, str):
            raise RequestError(
                f"{source_of(place)}: its class is {str(name)[:100]}, a pipeline of somebody's own; its code is not "
                "run, expected a pipeline of diffusers"
            )
        if not isinstance(entries, dict):
            raise RequestError(f"{source_of(place)}: the config tells of no components; open the pipeline's folder")
        found = (_component(part, entry, place) for part, entry in entries.items())
        return cls(name, {part: component for part, component in zip(entries, found, strict=True) if component}, place)

    @property
    def source(self) -> str:
        """What errors call it."""
        return source_of(self.place)

    def folder(self) -> Path | None:
        """Where it lies, after it was fetched from the Hub unless it is in the cache; None: not told.

        Raises:
            RequestError, WorkError: as `neon.runtime.hub.fetched`.
        """
        if self.place is None:
            return None
        return fetched(self.place) if is_hub_name(self.place) else Path(self.place)


def source_of(place: str | None) -> str:
    """What errors call the pipeline at `place`."""
    return place or "the pipeline"


def described(weights: Path) -> dict[str, Any] | None:
    """The pipeline to which a denoiser's file of weights belongs, as JSON; None: the file lies in none.

    {"pipeline": the name of its class, "components": {name: [library, class, configuration or None]}, "place": its
    folder or name on the Hub}, all as the folder says and nothing checked. Entries that begin with an underscore, which
    tell where a configuration comes from, are left out.
    """
    folder = pipeline_of(weights)
    index = {} if folder is None else read_table(folder / PIPELINE_FILE)
    if folder is None or not index:
        return None
    parts = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    return {
        "pipeline": index.get("_class_name"),
        "components": {name: [*value[:2], _config_in(folder, name)] for name, value in parts.items() if any(value)},
        "place": hub_name(folder) or os.path.realpath(folder),
    }


def _config_in(folder: Path, name: str) -> dict[str, Any] | None:
    """The configuration of a component, in the folder of its name or, as old pipelines have it, beside the index."""
    if name not in (*DENOISERS, *FROZEN, SCHEDULER):
        return None
    place = folder / name if (folder / name).is_dir() else folder
    table = read_table(place / ("scheduler_config.json" if name == SCHEDULER else "config.json"))
    return {key: value for key, value in table.items() if not key.startswith("_")} or None


def _component(name: str, entry: Any, place: str | None) -> Component | None:
    """A component of a description; None: it has no configuration, and is not looked at."""
    if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry[:2])):
        raise RequestError(f"{source_of(place)}: {name} is {str(entry)[:100]}; expected its library and its class")
    module, class_name, config = entry
    if module not in _LIBRARIES:
        raise RequestError(
            f"{source_of(place)}: {name} is {module}.{class_name}, code of the pipeline's own, which is not run; "
            "expected classes of diffusers and transformers"
        )
    if not isinstance(config, dict):
        return None
    if code := next((key for key in _CODE if config.get(key)), None):
        raise RequestError(
            f"{source_of(place)}: the configuration of {name} names code of its own ({code}: {str(config[code])[:100]}"
            "), which is not run; expected a model of the library"
        )
    return Component(class_name, config)
