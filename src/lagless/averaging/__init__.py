"""Averages that follow a run: state, dtypes, devices."""

from lagless.averaging._attachment import Attachment as Attachment
from lagless.averaging._averager import Averager as Averager
from lagless.averaging._live import plain_name as plain_name, unwrap as unwrap
from lagless.averaging._notices import warn_of_rate as warn_of_rate
from lagless.averaging._protocol import HoldsAverages as HoldsAverages
from lagless.execution import gather as gather, ranks_of as ranks_of
