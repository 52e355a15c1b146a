"""DeiT-LT: distillation from a flat CNN for data with rare classes, and the teachers that it needs."""

from pyvitfast.distill.analysis import (
    FeatureRanks,
    attention_distance,
    attention_rollout,
    expert_diversity,
    feature_rank,
)
from pyvitfast.distill.config import DeiTLTConfig
from pyvitfast.distill.deit_lt import DeiTLTLoss, LossParts
from pyvitfast.distill.evaluate import HeadLogits, class_groups, group_accuracy, head_logits
from pyvitfast.distill.ldam import CosineClassifier, LDAMLoss
from pyvitfast.distill.long_tail import checked_class_map, class_ranks, long_tail_counts, long_tail_indices
from pyvitfast.distill.mixing import MixedLabels, PairedMixup
from pyvitfast.distill.paco import PaCo, PaCoConfig, PaCoLoss
from pyvitfast.distill.peers import BalancedSoftmaxLoss, ClassWeightedBCE, TwoTokenLoss
from pyvitfast.distill.published import convert_teacher_state_dict
from pyvitfast.distill.sam import ASAM, SAM
from pyvitfast.distill.teacher import TeacherPipeline
from pyvitfast.distill.weights import effective_number_weights

__all__ = [
    "ASAM",
    "SAM",
    "BalancedSoftmaxLoss",
    "ClassWeightedBCE",
    "CosineClassifier",
    "DeiTLTConfig",
    "DeiTLTLoss",
    "FeatureRanks",
    "HeadLogits",
    "LDAMLoss",
    "LossParts",
    "MixedLabels",
    "PaCo",
    "PaCoConfig",
    "PaCoLoss",
    "PairedMixup",
    "TeacherPipeline",
    "TwoTokenLoss",
    "attention_distance",
    "attention_rollout",
    "checked_class_map",
    "class_groups",
    "class_ranks",
    "convert_teacher_state_dict",
    "effective_number_weights",
    "expert_diversity",
    "feature_rank",
    "group_accuracy",
    "head_logits",
    "long_tail_counts",
    "long_tail_indices",
]
