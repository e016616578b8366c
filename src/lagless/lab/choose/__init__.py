"""``lagless choose``: predict which average of a run is best from its checkpoints alone, and check it by evaluation."""

from lagless.lab.choose._choice import (
    DEFAULT as DEFAULT,
    Choice as Choice,
    Option as Option,
    choose_rule as choose_rule,
    measure as measure,
    predict as predict,
)
from lagless.lab.choose._increments import increment_products as increment_products
from lagless.lab.choose._learning_rate import (
    LearningRate as LearningRate,
    constant_rate as constant_rate,
    logged_rate as logged_rate,
    rate_of_increments as rate_of_increments,
)
from lagless.lab.choose._motion import Motion as Motion, fit_motion as fit_motion
from lagless.lab.choose._progress import RunPath as RunPath, path_of as path_of
from lagless.lab.choose._shortlist import shortlist as shortlist
