"""Weight decay for PyTorch that knows how its parameters are sharded."""

from .attach.attach import Attachment, attach
from .chain import Chain
from .errors import PlanError
from .groups.param_groups import param_groups
from .groups.schedulers import (
    CorrectedWeightDecay,
    CosineWeightDecay,
    InverseTimeWeightDecay,
    LambdaWeightDecay,
    LinearWeightDecay,
)
from .metrics.clip import clip_grad_norm_
from .metrics.metric import Measure
from .metrics.plan import Plan, global_metric
from .optimizers.lr import LR
from .optimizers.wrap import Adam, Wrap
from .rules.base import Rule
from .rules.norms import ConstrainedWeightDecay, Hyperball, NormControl, RadialBrake
from .rules.relative import RelativeWeightDecay
from .rules.weight_decay import CautiousWeightDecay, DirectWeightDecay, WeightDecay, decay_weights_
from .sharding.layout import Replicated, Sharded

__version__ = "0.1.0"  # read by the build, too

__all__ = [
    "Adam",
    "Attachment",
    "CautiousWeightDecay",
    "Chain",
    "ConstrainedWeightDecay",
    "CorrectedWeightDecay",
    "CosineWeightDecay",
    "DirectWeightDecay",
    "Hyperball",
    "InverseTimeWeightDecay",
    "LR",
    "LambdaWeightDecay",
    "LinearWeightDecay",
    "Measure",
    "NormControl",
    "Plan",
    "PlanError",
    "RadialBrake",
    "RelativeWeightDecay",
    "Replicated",
    "Rule",
    "Sharded",
    "WeightDecay",
    "Wrap",
    "__version__",
    "attach",
    "clip_grad_norm_",
    "decay_weights_",
    "global_metric",
    "param_groups",
]
