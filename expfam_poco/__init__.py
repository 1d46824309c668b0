"""expfam_poco: name an exponential family, get its posterior-corrected optimizer.

Example:
    >>> import torch, expfam_poco as poco
    >>> model = torch.nn.Linear(4, 1)
    >>> opt = poco.PosteriorCorrected(model.parameters(), "diagonal_gaussian", lr=0.1, ess=100, weight_decay=1e-2)
    >>> opt.param_groups[0]["family"]
    DiagonalGaussian()
"""

from . import blr, checks, correction, estimators, family, gradient_model, noise
from .alpha_svrg import AlphaSVRG
from .batched import BatchedDraws, PerExample
from .batchnorm import recalibrate_batchnorm
from .binary import binarize_groups, export_binary, load_binary, save_binary
from .checkpoint import CheckpointError
from .checks import LawError, check_family
from .conversion import load_ivon_opt
from .data import megabatches
from .errors import NonFiniteError
from .estimators import Draws, Estimator
from .family import ExponentialFamily
from .optimizer import PosteriorCorrected
from .optimizers import IVON, SVRG, VON, BayesBiNN, BayesBiNNPoCo, IVONPoCo, IVONPoCoMo, VONPoCo, VSGDPoCo
from .posterior import Objective
from .prediction import ClassPrediction, predict, predict_classes, predict_samples
from .registry import families_available, get_family, register, resolve_family
from .saving import load, save
from .schedules import AdaptiveAlpha, BurnIn, CosineAlpha, LinearAlpha
from .tracking import log_diagnostics
from .vsgd import VSGD, ConstantVSGD

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
    "check_family",
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
    "megabatches",
    "predict",
    "binarize_groups",
    "export_binary",
    "save_binary",
    "load_binary",
    "predict_samples",
    "predict_classes",
    "ClassPrediction",
    "recalibrate_batchnorm",
    "Objective",
    # checkpoint files
    "save",
    "load",
    "load_ivon_opt",
    # errors
    "CheckpointError",
    "LawError",
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
