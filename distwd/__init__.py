"""Weight decay for PyTorch that knows how its parameters are sharded."""

from ._version import __version__
from .attach.attach import Attachment, attach
from .chain.chain import Chain
from .errors import PlanError
from .groups.param_groups import param_groups
from .groups.schedulers import CorrectedWeightDecay, CosineWeightDecay, LambdaWeightDecay, LinearWeightDecay
from .metrics.plan import Plan, global_metric
from .optimizers.lr import LR
from .optimizers.wrap import Adam, Wrap
from .rules.direct import DirectWeightDecay, decay_weights_
from .rules.relative import RelativeWeightDecay
from .rules.weight_decay import CautiousWeightDecay, WeightDecay
from .sharding.layout import Replicated, Sharded

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
