"""Recipes: everything that decides a training run, as a typed and documented YAML file."""

from lagless.experiments.recipes._describe import describe as describe
from lagless.experiments.recipes._load import load_recipe as load_recipe
from lagless.experiments.recipes._load import open_fields as open_fields
from lagless.experiments.recipes._load import parse_override as parse_override
from lagless.experiments.recipes._load import parse_value as parse_value
from lagless.experiments.recipes._load import recipe_names as recipe_names
from lagless.experiments.recipes._load import summary as summary
from lagless.experiments.recipes._recipe import Recipe as Recipe
