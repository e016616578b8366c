"""Averages that follow a run: state, dtypes, devices."""

from lagless.averaging._attachment import Attachment as Attachment
from lagless.averaging._averager import Averager as Averager
from lagless.averaging._live import plain_name as plain_name
from lagless.averaging._live import unwrap as unwrap
from lagless.averaging._sharding import gather as gather
from lagless.averaging._sharding import ranks_of as ranks_of
