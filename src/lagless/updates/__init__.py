"""Update functions: numbers and tensors in, numbers and tensors out; no modules, optimizers or files."""

from lagless.updates._adam import (
    CORRECTIONS as CORRECTIONS,
    DERIVED as DERIVED,
    REFERENCE as REFERENCE,
    AdamForm as AdamForm,
    Constants as Constants,
    CrossFit as CrossFit,
    EmaWeights as EmaWeights,
    Folds as Folds,
    Group as Group,
    InverseCorrection as InverseCorrection,
    Moments as Moments,
    adam_folds as adam_folds,
    fed_moments as fed_moments,
    support_clip as support_clip,
)
from lagless.updates._lerp import lerp as lerp, lerp_square as lerp_square
from lagless.updates._linalg import vector_norm as vector_norm
from lagless.updates._noise_scale import NoiseMoments as NoiseMoments, noise_moments as noise_moments
from lagless.updates._pace import (
    PaceConstants as PaceConstants,
    pace_constants as pace_constants,
    pulled_adamw as pulled_adamw,
)
from lagless.updates._primal import PrimalConstants as PrimalConstants, primal_adamw as primal_adamw
from lagless.updates._shampoo import (
    Eigenbasis as Eigenbasis,
    eigenbasis as eigenbasis,
    energies as energies,
    inverse_fourth_root as inverse_fourth_root,
)
from lagless.updates._sophia import (
    sophia_inverse as sophia_inverse,
    sophia_update as sophia_update,
    sophia_variance as sophia_variance,
)
from lagless.updates._spread import Spread as Spread, skewed_nodes as skewed_nodes, two_nodes as two_nodes
