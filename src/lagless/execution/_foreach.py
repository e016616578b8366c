"""torch's elementwise updates of whole lists of tensors, which `torch.optim` is made of and torch keeps private.

All of them that lagless uses are here, under the names that torch gives them without the underscore. The test of this
module fails where a release of torch has moved one of them.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import torch

SEEN_IN = ("2.8", "2.13")
"""Releases of torch in which all of them were found to work."""

foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_addcdiv_ = torch._foreach_addcdiv_
foreach_addcmul = torch._foreach_addcmul
foreach_addcmul_ = torch._foreach_addcmul_
foreach_clamp_max = torch._foreach_clamp_max
foreach_clamp_max_ = torch._foreach_clamp_max_
foreach_clamp_min_ = torch._foreach_clamp_min_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp = torch._foreach_lerp
foreach_lerp_ = torch._foreach_lerp_
foreach_max = torch._foreach_max
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_neg = torch._foreach_neg
foreach_norm = torch._foreach_norm
foreach_reciprocal_ = torch._foreach_reciprocal_
foreach_round_ = torch._foreach_round_
foreach_sqrt = torch._foreach_sqrt
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_
foreach_zero_ = torch._foreach_zero_
