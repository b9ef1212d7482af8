"""A neural network as a small, exact file: minimal random code learning for Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from miracle_hub._autoload import activate as _activate
from miracle_hub.code import Code as Code

if TYPE_CHECKING:
    from miracle_hub.api import compress as compress
    from miracle_hub.api import decompress as decompress
    from miracle_hub.api import inspect as inspect
    from miracle_hub.api import load_state_dict as load_state_dict
    from miracle_hub.api import verify as verify
    from miracle_hub.codec.certificate import Certificate as Certificate
    from miracle_hub.codec.inspection import Inspection as Inspection
    from miracle_hub.codec.modules import load as load
    from miracle_hub.codec.report import Report as Report
    from miracle_hub.codec.token_certificate import TokenCertificate as TokenCertificate
    from miracle_hub.codec.verification import Verification as Verification
    from miracle_hub.evaluate.certify import certify as certify
    from miracle_hub.evaluate.certify import certify_network as certify_network
    from miracle_hub.evaluate.compare import Comparison as Comparison
    from miracle_hub.evaluate.compare import compare as compare
    from miracle_hub.finetune.fit import FitReport as FitReport
    from miracle_hub.finetune.fit import fit as fit
    from miracle_hub.finetune.mixin import MiracleHubMixin as MiracleHubMixin
    from miracle_hub.finetune.models import compress_model as compress_model
    from miracle_hub.finetune.models import make_variational as make_variational
    from miracle_hub.finetune.models import save as save
    from miracle_hub.finetune.penalty import UpdatePenalty as UpdatePenalty
    from miracle_hub.finetune.trainer import MiracleTrainer as MiracleTrainer
    from miracle_hub.hub.push import PushReport as PushReport
    from miracle_hub.hub.push import push as push
    from miracle_hub.options import CompressOptions as CompressOptions
    from miracle_hub.options import DecompressOptions as DecompressOptions
    from miracle_hub.options import FitOptions as FitOptions
    from miracle_hub.options import LoadOptions as LoadOptions
    from miracle_hub.plugin.config import MiracleConfig as MiracleConfig
    from miracle_hub.training.checkpoint import Checkpoint as Checkpoint
    from miracle_hub.training.coder import code_model as code_model
    from miracle_hub.training.coding_options import CodingOptions as CodingOptions
    from miracle_hub.training.config import VariationalConfig as VariationalConfig
    from miracle_hub.training.convert import posterior_mean as posterior_mean
    from miracle_hub.training.convert import posterior_samples as posterior_samples
    from miracle_hub.training.convert import remove_variational as remove_variational
    from miracle_hub.training.journal import Journal as Journal
    from miracle_hub.training.model import anneal as anneal
    from miracle_hub.training.model import kl_penalty as kl_penalty

__all__ = [
    "Certificate",
    "Checkpoint",
    "Code",
    "CodingOptions",
    "Comparison",
    "CompressOptions",
    "DecompressOptions",
    "FitOptions",
    "FitReport",
    "Inspection",
    "Journal",
    "LoadOptions",
    "MiracleConfig",
    "MiracleHubMixin",
    "MiracleTrainer",
    "PushReport",
    "Report",
    "TokenCertificate",
    "UpdatePenalty",
    "VariationalConfig",
    "Verification",
    "anneal",
    "certify",
    "certify_network",
    "code_model",
    "compare",
    "compress",
    "compress_model",
    "decompress",
    "fit",
    "inspect",
    "kl_penalty",
    "load",
    "load_state_dict",
    "make_variational",
    "posterior_mean",
    "posterior_samples",
    "push",
    "remove_variational",
    "save",
    "verify",
]
__version__ = "0.1.0"

# Imported on first use: transformers imports this package for everybody who has it installed, and
# numba alone takes half a second.
_HOMES = {
    "Certificate": "miracle_hub.codec.certificate",
    "Checkpoint": "miracle_hub.training.checkpoint",
    "CodingOptions": "miracle_hub.training.coding_options",
    "Comparison": "miracle_hub.evaluate.compare",
    "CompressOptions": "miracle_hub.options",
    "DecompressOptions": "miracle_hub.options",
    "FitOptions": "miracle_hub.options",
    "FitReport": "miracle_hub.finetune.fit",
    "Inspection": "miracle_hub.codec.inspection",
    "Journal": "miracle_hub.training.journal",
    "LoadOptions": "miracle_hub.options",
    "MiracleConfig": "miracle_hub.plugin.config",
    "MiracleHubMixin": "miracle_hub.finetune.mixin",
    "MiracleTrainer": "miracle_hub.finetune.trainer",
    "PushReport": "miracle_hub.hub.push",
    "Report": "miracle_hub.codec.report",
    "TokenCertificate": "miracle_hub.codec.token_certificate",
    "UpdatePenalty": "miracle_hub.finetune.penalty",
    "VariationalConfig": "miracle_hub.training.config",
    "Verification": "miracle_hub.codec.verification",
    "anneal": "miracle_hub.training.model",
    "certify": "miracle_hub.evaluate.certify",
    "certify_network": "miracle_hub.evaluate.certify",
    "code_model": "miracle_hub.training.coder",
    "compare": "miracle_hub.evaluate.compare",
    "compress": "miracle_hub.api",
    "compress_model": "miracle_hub.finetune.models",
    "decompress": "miracle_hub.api",
    "fit": "miracle_hub.finetune.fit",
    "inspect": "miracle_hub.api",
    "kl_penalty": "miracle_hub.training.model",
    "load": "miracle_hub.codec.modules",
    "load_state_dict": "miracle_hub.api",
    "make_variational": "miracle_hub.finetune.models",
    "posterior_mean": "miracle_hub.training.convert",
    "posterior_samples": "miracle_hub.training.convert",
    "push": "miracle_hub.hub.push",
    "remove_variational": "miracle_hub.training.convert",
    "save": "miracle_hub.finetune.models",
    "verify": "miracle_hub.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'miracle_hub' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


_activate()
