"""Checkpoints on disk: layouts, formats, reading, writing, folders that appear whole or not at all."""

from lagless._deprecated import former_names as _former_names
from lagless.checkpoints._alike import check_alike as check_alike
from lagless.checkpoints._atomic_file import atomic_file as atomic_file
from lagless.checkpoints._atomic_folder import atomic_folder as atomic_folder, check_destination as check_destination
from lagless.checkpoints._checkpoint import Checkpoint as Checkpoint
from lagless.checkpoints._contents import (
    RECORD as RECORD,
    foreign_files as foreign_files,
    own_files as own_files,
    records_average as records_average,
    remove_own_files as remove_own_files,
)
from lagless.checkpoints._descriptors import spare_descriptors as spare_descriptors
from lagless.checkpoints._errors import CheckpointError as CheckpointError, reporting as reporting
from lagless.checkpoints._fingerprint import combine_digests as combine_digests, fingerprint as fingerprint
from lagless.checkpoints._json import read_object as read_object
from lagless.checkpoints._layout import (
    OUTPUT_DTYPES as OUTPUT_DTYPES,
    Layout as Layout,
    parse_size as parse_size,
    plan_layout as plan_layout,
)
from lagless.checkpoints._logged_rates import logged_rates as logged_rates
from lagless.checkpoints._model_card import (
    CARD as CARD,
    base_model_of as base_model_of,
    is_hub_name as is_hub_name,
    model_card as model_card,
)
from lagless.checkpoints._models import Models as Models, find_models as find_models
from lagless.checkpoints._open import holds_weights as holds_weights, open_checkpoint as open_checkpoint
from lagless.checkpoints._paths import StrPath as StrPath, absolute_path as absolute_path
from lagless.checkpoints._permissions import Permissions as Permissions, permissions_of as permissions_of
from lagless.checkpoints._readers import (
    Bytes as Bytes,
    FileReader as FileReader,
    Reader as Reader,
    byte_view as byte_view,
)
from lagless.checkpoints._run_folder import FoundRun as FoundRun, look_into as look_into, scan_run as scan_run
from lagless.checkpoints._safetensors_format import (
    NAMES as NAMES,
    TensorInfo as TensorInfo,
    build_header as build_header,
)
from lagless.checkpoints._sidecar_files import sidecar_files as sidecar_files
from lagless.checkpoints._training_record import Mode as Mode, metric_values as metric_values
from lagless.checkpoints._trajectory import (
    Trajectory as Trajectory,
    find_checkpoints as find_checkpoints,
)
from lagless.checkpoints._weight_names import (
    is_averaged as is_averaged,
    is_running_statistic as is_running_statistic,
)
from lagless.checkpoints._writer import ModelWriter as ModelWriter

__getattr__ = _former_names(__name__, {"Destination": "lagless.checkpoints:atomic_folder"})
