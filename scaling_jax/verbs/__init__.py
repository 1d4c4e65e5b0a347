"""The verbs of the command line: the flags of each, and what it does."""

from scaling_jax.verbs.branch import BRANCH
from scaling_jax.verbs.common import Verb
from scaling_jax.verbs.coord_check import COORD_CHECK
from scaling_jax.verbs.parametrization import PARAMETRIZATION
from scaling_jax.verbs.tokenize import TOKENIZE
from scaling_jax.verbs.train import TRAIN

VERBS: dict[str, Verb] = {
    "train": TRAIN,
    "tokenize": TOKENIZE,
    "parametrization": PARAMETRIZATION,
    "coord-check": COORD_CHECK,
    "branch": BRANCH,
}
