"""``lagless theory``: figures of the quadratic laboratory, and advice on which rule to choose.

Parts that draw need matplotlib and are imported from their modules, so that the others work without it.
"""

from lagless.experiments.laboratory._advice import advise as advise
from lagless.experiments.laboratory._advice import print_advice as print_advice
from lagless.experiments.laboratory._advice import print_estimate as print_estimate
from lagless.experiments.laboratory._bias_tables import print_biases as print_biases
from lagless.experiments.laboratory._checkpoints import estimate_checkpoints as estimate_checkpoints
from lagless.experiments.laboratory._statements import print_statements as print_statements
