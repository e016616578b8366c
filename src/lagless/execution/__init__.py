"""How tensors are moved: blocks, rounding, shards and ranks, compiled kernels, C. Averages and optimizers run on it."""

from lagless.execution._adam_c import (
    AdamConstants as AdamConstants,
    AdamRow as AdamRow,
    adam_step_c as adam_step_c,
    fits_adam_c as fits_adam_c,
)
from lagless.execution._annotated import (
    backward as backward,
    from_numpy as from_numpy,
    numbers as numbers,
    split as split,
    watch_gradient as watch_gradient,
)
from lagless.execution._autocast import without_autocast as without_autocast
from lagless.execution._autograd_private import (
    after_pass as after_pass,
    current_pass as current_pass,
    within_another_pass as within_another_pass,
)
from lagless.execution._blocks import (
    Row as Row,
    block_size as block_size,
    blocks as blocks,
    cut as cut,
    pieces as pieces,
)
from lagless.execution._compiled import (
    compiled as compiled,
    fits_kernel as fits_kernel,
    flat as flat,
    on_device as on_device,
)
from lagless.execution._devices import counts as counts, exact_dtype as exact_dtype
from lagless.execution._errors import RankError as RankError
from lagless.execution._foreach import (
    foreach_add as foreach_add,
    foreach_add_ as foreach_add_,
    foreach_addcdiv_ as foreach_addcdiv_,
    foreach_addcmul as foreach_addcmul,
    foreach_addcmul_ as foreach_addcmul_,
    foreach_clamp_max as foreach_clamp_max,
    foreach_clamp_max_ as foreach_clamp_max_,
    foreach_clamp_min_ as foreach_clamp_min_,
    foreach_copy_ as foreach_copy_,
    foreach_div_ as foreach_div_,
    foreach_lerp as foreach_lerp,
    foreach_lerp_ as foreach_lerp_,
    foreach_max as foreach_max,
    foreach_mul as foreach_mul,
    foreach_mul_ as foreach_mul_,
    foreach_neg as foreach_neg,
    foreach_norm as foreach_norm,
    foreach_reciprocal_ as foreach_reciprocal_,
    foreach_round_ as foreach_round_,
    foreach_sqrt as foreach_sqrt,
    foreach_sub as foreach_sub,
    foreach_sub_ as foreach_sub_,
    foreach_zero_ as foreach_zero_,
)
from lagless.execution._forks import forks as forks
from lagless.execution._lerp_c import (
    LERP_C_MANY as LERP_C_MANY,
    LERP_C_SMALLEST as LERP_C_SMALLEST,
    fits_lerp_c as fits_lerp_c,
    lerp_c as lerp_c,
)
from lagless.execution._lerp_compiled import KERNEL_SMALLEST as KERNEL_SMALLEST, lerp_compiled as lerp_compiled
from lagless.execution._low_bits import LOW_DTYPE as LOW_DTYPE, SMALL_GAIN as SMALL_GAIN
from lagless.execution._pace_c import PaceRow as PaceRow, fits_pace_c as fits_pace_c, pace_step_c as pace_step_c
from lagless.execution._primal_c import (
    PrimalRow as PrimalRow,
    fits_primal_c as fits_primal_c,
    primal_step_c as primal_step_c,
)
from lagless.execution._process_sums import (
    over_shards as over_shards,
    sum_in_place as sum_in_place,
    sum_over as sum_over,
    sum_over_mesh as sum_over_mesh,
)
from lagless.execution._product_c import Pieces as Pieces, Product as Product
from lagless.execution._ranks import Ranks as Ranks
from lagless.execution._recursion import (
    BLOCK as BLOCK,
    first_nan as first_nan,
    move_block as move_block,
    read_block as read_block,
    start_buffers as start_buffers,
)
from lagless.execution._rounding import Noise as Noise
from lagless.execution._rows import (
    RowUpdate as RowUpdate,
    apply_row as apply_row,
    buffer_dtype as buffer_dtype,
    combine as combine,
    in_place_order as in_place_order,
    is_small as is_small,
    update_rows as update_rows,
)
from lagless.execution._rule_set import RuleSet as RuleSet
from lagless.execution._sharding import (
    Sharding as Sharding,
    fsdp_modules as fsdp_modules,
    gather as gather,
    is_sharded as is_sharded,
    local as local,
    ranks_of as ranks_of,
)
from lagless.execution._shown_weights import (
    LIVE as LIVE,
    follow_optimizer as follow_optimizer,
    follow_optimizers as follow_optimizers,
    keeping_modes as keeping_modes,
    leave_evaluation as leave_evaluation,
    observe_steps as observe_steps,
    require_own_weights as require_own_weights,
    require_training_mode as require_training_mode,
    showing as showing,
    shown_average as shown_average,
    trained_weights as trained_weights,
    untraced as untraced,
    wait_for_copies as wait_for_copies,
    writing_weights as writing_weights,
)
from lagless.execution._turns import Turns as Turns
