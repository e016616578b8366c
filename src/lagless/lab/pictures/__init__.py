"""``lagless theory``: figures of the quadratic laboratory, and advice on which rule to choose.

Parts that draw need matplotlib and are imported from their modules, so that the others work without it.
"""

from typing import Any

from lagless.lab.pictures._advice import (
    advise as advise,
    print_advice as print_advice,
    print_estimate as print_estimate,
)
from lagless.lab.pictures._bias_tables import print_biases as print_biases
from lagless.lab.pictures._checkpoints import estimate_checkpoints as estimate_checkpoints
from lagless.lab.pictures._statements import print_statements as print_statements


def __getattr__(name: str) -> Any:
    if name == "draw_schedules":
        from lagless.lab.pictures._schedules import draw_schedules

        return draw_schedules
    if name in ("make_primer_figures", "run_laboratory"):  # they draw, and matplotlib is not always there
        from lagless.lab.pictures import _pictures

        return getattr(_pictures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
