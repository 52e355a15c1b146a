"""Training, evaluation and pruning runs on timm, accelerate and torchmetrics."""

from pyvitfast.distill import long_tail_indices
from pyvitfast.train.data import Data, open_data
from pyvitfast.train.distill import distill
from pyvitfast.train.errors import Interrupted, UserError
from pyvitfast.train.grow import grow
from pyvitfast.train.loop import Accuracy
from pyvitfast.train.quantize import quantize
from pyvitfast.train.run import Outcome, evaluate_model, prune, train
from pyvitfast.train.settings import Settings, resolve
from pyvitfast.train.sparsify import sparsify

__all__ = [
    "Accuracy",
    "Data",
    "Interrupted",
    "Outcome",
    "Settings",
    "UserError",
    "distill",
    "evaluate_model",
    "grow",
    "long_tail_indices",
    "open_data",
    "prune",
    "quantize",
    "resolve",
    "sparsify",
    "train",
]
