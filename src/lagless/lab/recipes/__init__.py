"""Recipes: everything that decides a training run, as a typed and documented YAML file."""

from lagless.lab.recipes._describe import describe as describe
from lagless.lab.recipes._load import (
    load_recipe as load_recipe,
    open_fields as open_fields,
    parse_override as parse_override,
    parse_value as parse_value,
    recipe_names as recipe_names,
    summary as summary,
)
from lagless.lab.recipes._recipe import Recipe as Recipe
