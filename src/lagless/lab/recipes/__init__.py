"""Recipes: everything that decides a training run, as a typed and documented YAML file."""

from lagless.lab.recipes._data import (
    PretrainingData as PretrainingData,
    SftData as SftData,
    Source as Source,
    SpanNoise as SpanNoise,
)
from lagless.lab.recipes._describe import describe as describe
from lagless.lab.recipes._load import (
    load_recipe as load_recipe,
    open_fields as open_fields,
    parse_override as parse_override,
    parse_value as parse_value,
    recipe_names as recipe_names,
    summary as summary,
)
from lagless.lab.recipes._method import (
    AnySchedule as AnySchedule,
    Constant as Constant,
    Cosine as Cosine,
    Power as Power,
    WarmupStableDecay as WarmupStableDecay,
)
from lagless.lab.recipes._model import NewModel as NewModel
from lagless.lab.recipes._optimizers import (
    AdamW as AdamW,
    OptimizerSection as OptimizerSection,
    OwnOptimizer as OwnOptimizer,
    PrimalAveraging as PrimalAveraging,
)
from lagless.lab.recipes._recipe import Recipe as Recipe
