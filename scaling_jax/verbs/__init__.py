"""The verbs of the command line: the flags of each, and what it does."""

from scaling_jax.verbs.branch import BRANCH
from scaling_jax.verbs.common import Verb
from scaling_jax.verbs.compile import COMPILE
from scaling_jax.verbs.coord_check import COORD_CHECK
from scaling_jax.verbs.eval import EVAL
from scaling_jax.verbs.export import EXPORT
from scaling_jax.verbs.fit import FIT
from scaling_jax.verbs.parametrization import PARAMETRIZATION
from scaling_jax.verbs.plan import PLAN
from scaling_jax.verbs.report import REPORT
from scaling_jax.verbs.sample import SAMPLE
from scaling_jax.verbs.status import STATUS
from scaling_jax.verbs.sweep import SWEEP
from scaling_jax.verbs.tokenize import TOKENIZE
from scaling_jax.verbs.train import TRAIN
from scaling_jax.verbs.train_tokenizer import TRAIN_TOKENIZER

VERBS: dict[str, Verb] = {
    "train": TRAIN,
    "tokenize": TOKENIZE,
    "train-tokenizer": TRAIN_TOKENIZER,
    "parametrization": PARAMETRIZATION,
    "coord-check": COORD_CHECK,
    "compile": COMPILE,
    "branch": BRANCH,
    "sweep": SWEEP,
    "status": STATUS,
    "fit": FIT,
    "report": REPORT,
    "plan": PLAN,
    "eval": EVAL,
    "sample": SAMPLE,
    "export": EXPORT,
}
