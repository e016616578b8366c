"""Averages that follow a run: state, dtypes, devices."""

from lagless.averaging._attachment import Attachment as Attachment
from lagless.averaging._averager import Averager as Averager
