"""Numerical tools that the whole theory room shares: matrices, quadrature, Monte-Carlo estimates."""

from lagless.theory.numerics._estimate import Estimate as Estimate, estimate as estimate
from lagless.theory.numerics._matrices import (
    check_fraction as check_fraction,
    check_positive as check_positive,
    check_tau as check_tau,
    check_time as check_time,
    commute as commute,
    inverse as inverse,
    op_norm as op_norm,
    point_and_matrices as point_and_matrices,
    positive_definite as positive_definite,
    square_root as square_root,
)
from lagless.theory.numerics._quadrature import gauss_legendre as gauss_legendre, integrate as integrate
