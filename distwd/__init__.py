"""Weight decay for PyTorch that knows how its parameters are sharded."""

from ._version import __version__
from .attach import Attachment, attach
from .chain import Chain
from .decays.direct import DirectWeightDecay, decay_weights_
from .decays.relative import RelativeWeightDecay
from .decays.weight_decay import CautiousWeightDecay, WeightDecay
from .errors import PlanError
from .layout import Replicated, Sharded
from .lr import LR
from .numbers import global_metric
from .param_groups import param_groups
from .plan.plan import Plan
from .schedulers import CorrectedWeightDecay, CosineWeightDecay, LambdaWeightDecay, LinearWeightDecay
from .wrap import Adam, Wrap

__all__ = [
    "Adam",
    "Attachment",
    "CautiousWeightDecay",
    "Chain",
    "CorrectedWeightDecay",
    "CosineWeightDecay",
    "DirectWeightDecay",
    "LR",
    "LambdaWeightDecay",
    "LinearWeightDecay",
    "Plan",
    "PlanError",
    "RelativeWeightDecay",
    "Replicated",
    "Sharded",
    "WeightDecay",
    "Wrap",
    "__version__",
    "attach",
    "decay_weights_",
    "global_metric",
    "param_groups",
]
