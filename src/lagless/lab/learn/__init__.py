"""``lagless learn``: weights on stored checkpoints learned from held-out loss by exact slopes."""

from lagless.lab.learn._baselines import default_prior as default_prior
from lagless.lab.learn._callback import LearnCallback as LearnCallback
from lagless.lab.learn._describe import (
    conclusions as conclusions,
    schedule_in_words as schedule_in_words,
)
from lagless.lab.learn._documents import (
    Document as Document,
    Part as Part,
    Parts as Parts,
    row_documents as row_documents,
    split_documents as split_documents,
    text_documents as text_documents,
)
from lagless.lab.learn._learn import learn as learn
from lagless.lab.learn._learned import Comparison as Comparison, Learned as Learned
from lagless.lab.learn._learner import (
    RIDGES as RIDGES,
    TARGETS_PER_WEIGHT as TARGETS_PER_WEIGHT,
    Learner as Learner,
)
from lagless.lab.learn._losses import ItemLoss as ItemLoss, cross_entropy as cross_entropy, load_loss as load_loss
from lagless.lab.learn._modes import MODES as MODES, Mode as Mode, is_feasible as is_feasible
from lagless.lab.learn._search import Evaluation as Evaluation, Setting as Setting
from lagless.lab.learn._streamed import StreamedModel as StreamedModel
from lagless.lab.learn._write import write_learned as write_learned
