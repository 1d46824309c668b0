"""expfam_poco: name an exponential family, get its posterior-corrected optimizer.

Example:
    >>> import torch, expfam_poco as poco
    >>> model = torch.nn.Linear(4, 1)
    >>> opt = poco.PosteriorCorrected(model.parameters(), "diagonal_gaussian", lr=0.1, ess=100, weight_decay=1e-2)
    >>> opt.param_groups[0]["family"]
    DiagonalGaussian()
"""

from expfam_poco import blr, checks, correction, estimators, family, gradient_model, noise
from expfam_poco.checks import check_correction, check_family
from expfam_poco.closures.batched import BatchedDraws, PerExample
from expfam_poco.closures.linear import GeneralisedLinear
from expfam_poco.closures.rows import Rows
from expfam_poco.correction.alpha import AdaptiveAlpha, BurnIn, CosineAlpha, LinearAlpha, MegaBatchAlpha
from expfam_poco.errors import CheckpointError, LawError, NonFiniteError
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws, Estimator
from expfam_poco.family.from_torch import from_torch
from expfam_poco.family.registry import families_available, get_family, register, resolve_family
from expfam_poco.family.written import family_from
from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.inspection import Objective
from expfam_poco.optim.named import IVON, SVRG, VON, BayesBiNN, BayesBiNNPoCo, IVONPoCo, IVONPoCoMo, VONPoCo, VSGDPoCo
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.optim.vsgd import VSGD, ConstantVSGD
from expfam_poco.tools.batchnorm import recalibrate_batchnorm
from expfam_poco.tools.binary import binarize_groups, export_binary, load_binary, save_binary
from expfam_poco.tools.binary_layers import BinaryActivation, BinaryConv2d, BinaryLinear
from expfam_poco.tools.ivon_opt import load_ivon_opt
from expfam_poco.tools.megabatches import megabatches
from expfam_poco.tools.merging import merge
from expfam_poco.tools.packed import pack_weights
from expfam_poco.tools.predict import ClassPrediction, predict, predict_classes, predict_samples
from expfam_poco.tools.saving import load, save
from expfam_poco.tools.tracking import log_diagnostics
from expfam_poco.tools.tuning import LearningRates, find_lr, suggest_ess
from expfam_poco.tools.worth import Worth, worth

__version__ = "0.1.0"

__all__ = [
    # optimizers
    "PosteriorCorrected",
    "SVRG",
    "AlphaSVRG",
    "VSGDPoCo",
    "VON",
    "VONPoCo",
    "IVON",
    "IVONPoCo",
    "IVONPoCoMo",
    "BayesBiNN",
    "BayesBiNNPoCo",
    "VSGD",
    "ConstantVSGD",
    # families
    "ExponentialFamily",
    "register",
    "families_available",
    "get_family",
    "resolve_family",
    "family_from",
    "from_torch",
    "check_family",
    "check_correction",
    # estimators
    "Estimator",
    "Draws",
    # around training
    "BurnIn",
    "LinearAlpha",
    "CosineAlpha",
    "AdaptiveAlpha",
    "log_diagnostics",
    "BatchedDraws",
    "PerExample",
    "Rows",
    "GeneralisedLinear",
    "megabatches",
    "find_lr",
    "LearningRates",
    "suggest_ess",
    "worth",
    "Worth",
    "predict",
    "binarize_groups",
    "export_binary",
    "save_binary",
    "load_binary",
    "pack_weights",
    "BinaryActivation",
    "BinaryLinear",
    "BinaryConv2d",
    "predict_samples",
    "predict_classes",
    "ClassPrediction",
    "recalibrate_batchnorm",
    "Objective",
    "merge",
    # checkpoint files
    "save",
    "load",
    "load_ivon_opt",
    # errors
    "CheckpointError",
    "LawError",
    "MegaBatchAlpha",
    "NonFiniteError",
    # modules for research
    "blr",
    "correction",
    "estimators",
    "family",
    "gradient_model",
    "noise",
    "checks",
    "__version__",
]
