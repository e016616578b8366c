"""``lagless theory``: figures of the quadratic laboratory, and advice on which rule to choose."""

from lagless.experiments.laboratory._advice import advise as advise
from lagless.experiments.laboratory._advice import draw_advice as draw_advice
from lagless.experiments.laboratory._advice import print_advice as print_advice
from lagless.experiments.laboratory._advice import print_estimate as print_estimate
from lagless.experiments.laboratory._advice import save_advice as save_advice
from lagless.experiments.laboratory._checkpoints import estimate_checkpoints as estimate_checkpoints
from lagless.experiments.laboratory._drawing import Picture as Picture
from lagless.experiments.laboratory._laboratory import Effort as Effort
from lagless.experiments.laboratory._laboratory import LaboratoryResult as LaboratoryResult
from lagless.experiments.laboratory._laboratory import make_primer_figures as make_primer_figures
from lagless.experiments.laboratory._laboratory import run_laboratory as run_laboratory
from lagless.experiments.laboratory._statements import print_statements as print_statements
