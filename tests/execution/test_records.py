"""Rows and constants cross over to C by position: the fields of the Python records have the order of the C sources."""

import re
from pathlib import Path

import pytest

import lagless.execution._c as c
from lagless.execution import AdamConstants, AdamRow, PaceRow, PrimalRow
from lagless.updates import PaceConstants, PrimalConstants

SOURCES = Path(c.__file__).parent / "c"
RECORDS = {
    "adam.c": (AdamRow, AdamConstants),
    "pace.c": (PaceRow, PaceConstants),
    "primal.c": (PrimalRow, PrimalConstants),
}


def source_of(name):
    """The source with the header that AdamW's steps share, whose numbers are a record in theirs."""
    text = (SOURCES / name).read_text()
    return (SOURCES / "adamw.h").read_text() + text if '"adamw.h"' in text else text


def fields_of_struct(source, name):
    body = re.search(r"typedef struct \{([^{}]*)\}\s*\\?\s*NAME##_" + name, source).group(1)
    code = re.sub(r"/\*.*?\*/|\\\n", " ", body, flags=re.DOTALL)
    if shared := re.match(r"\s*NAME##_([a-z]+) \1;", code):
        return fields_of_struct(source, shared.group(1)) + fields_of(code[shared.end() :])
    return fields_of(code)


def fields_of(code):
    assert re.fullmatch(r"\s*REAL [a-z0-9_, ]+;[\s\\]*", code), f"not one list of numbers: {code}"
    return re.findall(r"[a-z_0-9]+", code)


def rows_of_enum(source):
    names = re.search(r"enum \{ (WEIGHTS[A-Z_, ]*), ROWS \};", source).group(1)
    return [name.strip().lower() for name in names.split(",")]


@pytest.mark.parametrize("name", RECORDS)
def test_fields_have_the_order_of_c(name):
    source, (row, constants) = source_of(name), RECORDS[name]
    assert fields_of_struct(source, "constants") == list(constants._fields)
    assert rows_of_enum(source) == list(row._fields)


@pytest.mark.parametrize("name", RECORDS)
def test_swapped_fields_are_noticed(name):
    source, (row, constants) = source_of(name), RECORDS[name]
    swapped = re.sub(r"\bdecay, (rate|first)", r"\1, decay", source, count=1)
    assert swapped != source
    assert fields_of_struct(swapped, "constants") != list(constants._fields)
    swapped = source.replace("EXP_AVG, EXP_AVG_SQ", "EXP_AVG_SQ, EXP_AVG", 1)
    assert rows_of_enum(swapped) != list(row._fields)
