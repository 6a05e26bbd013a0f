"""A run as plain data: the model, the attack, the training. Checkpoints store all of it as plain dicts.

Each part of the system has its own class here. `ModelConfig` and `TrainConfig` inherit from these
classes, so a part can take the whole configuration and read its own fields. To add an option, add a
field. The library checks its type and bounds, checkpoints store it, and the command line offers it
with its help and default.
"""

from advmoe.config.attack import AttackConfig, AttackStart, TrainingAttack, check_eps
from advmoe.config.model import (
    KINDS,
    ROUTER_GRADIENTS,
    Arch,
    BackboneConfig,
    ExpertFilters,
    ExpertsConfig,
    Granularity,
    Kind,
    ModelConfig,
    ModelSettings,
    RouterGradient,
    RoutersConfig,
    Triple,
    model_config,
    routed_part,
)
from advmoe.config.training import (
    CHECKPOINT_MINUTES,
    AttackRouting,
    Compile,
    Dispatch,
    ImagesConfig,
    Loss,
    MethodName,
    ObjectiveConfig,
    Precision,
    RouterStatistics,
    RouterStep,
    RouterStepConfig,
    ScheduleConfig,
    TrainConfig,
    Upcycling,
    check_together,
)
from advmoe.schema import check, differences, from_dict, one_of, to_dict

__all__ = [
    "CHECKPOINT_MINUTES",
    "KINDS",
    "ROUTER_GRADIENTS",
    "Arch",
    "AttackConfig",
    "AttackRouting",
    "AttackStart",
    "BackboneConfig",
    "Compile",
    "Dispatch",
    "ExpertFilters",
    "ExpertsConfig",
    "Granularity",
    "ImagesConfig",
    "Kind",
    "Loss",
    "MethodName",
    "ModelConfig",
    "ModelSettings",
    "ObjectiveConfig",
    "Precision",
    "RouterGradient",
    "RouterStatistics",
    "RouterStep",
    "RouterStepConfig",
    "RoutersConfig",
    "ScheduleConfig",
    "TrainConfig",
    "TrainingAttack",
    "Triple",
    "Upcycling",
    "check",
    "check_eps",
    "check_together",
    "differences",
    "from_dict",
    "model_config",
    "one_of",
    "routed_part",
    "to_dict",
]
