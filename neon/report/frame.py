"""What the pages of all runs have in common: the frame with its style and script.

A page fetches nothing and forbids itself to: styles, pictures and one script are inside the file, and no other script
is run. Without it the page shows everything but what moves.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from neon.report.plots import COLOURS
from neon.report.template import filled, text_of
from neon.runtime.files import as_json

PAGE_FILE, SAMPLES_FILE = "report.html", "samples.png"
WEIGHTS = """w = 0 is the base, w = -1 the self-trained model, w &gt; 0 Neon:
θ<sub>neon</sub> = (1 + w) θ<sub>base</sub> - w θ<sub>self-trained</sub>."""
"""what w is, as HTML"""


def framed(
    title: str,
    sentences: Sequence[str],
    main: str,
    how: str,
    notes: Sequence[str],
    provenance: Mapping[str, Any],
) -> str:
    """A page as text: `main`, which is HTML, between what it says first and how that came about; the rest is text.

    The first of `sentences` is the headline; `how` is the heading of the notes.
    """
    result, *more = map(html.escape, sentences)
    script = text_of("page.js")
    return filled(
        "page.html",
        title=html.escape(title),
        colours=";".join(f"--{name}:{colour}" for name, colour in COLOURS.items()),
        style=text_of("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        result=result,
        more="".join(f"<p>{sentence}</p>" for sentence in more),
        main=main,
        how=html.escape(how),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes),
        provenance=html.escape(json.dumps(as_json(provenance), indent=2)),
    )
