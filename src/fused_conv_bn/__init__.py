"""Conv -> BatchNorm -> scale -> activation for PyTorch at the speed of memory."""

from . import _interrupt

if _interrupt.is_imported_by_python_m():
    _interrupt.end_at_once_from_here()

from . import _loader  # noqa: E402  (it imports torch)

try:
    _loader.load()
except ImportError as error:
    if _interrupt.is_imported_by_python_m():  # the sentence, without a traceback
        raise SystemExit(str(error)) from None
    raise

from . import _choices, _register, conditions, reference  # noqa: E402, F401  (the ops exist from here on)
from ._conv_mean import conv_bn_scale_mean  # noqa: E402
from ._fuse import Report, fuse, report, thaw, unfuse  # noqa: E402
from ._gated import gate_conv_bn_scale  # noqa: E402
from ._register import onnx_translations  # noqa: E402
from .algorithms import explain, use_algorithm  # noqa: E402
from .conditions import export_ops  # noqa: E402
from .graphs import graphed  # noqa: E402
from .modules import (  # noqa: E402
    ConvBnScale1d,
    ConvBnScale2d,
    ConvBnScale3d,
    ConvTransposeBnScale1d,
    ConvTransposeBnScale2d,
    ConvTransposeBnScale3d,
    LinearBnScale,
)
from .ops import (  # noqa: E402
    bn_scale,
    bn_scale_,
    bn_scale_cat,
    bn_scale_train,
    conv_bn_scale,
    conv_bn_scale_train,
    conv_scale_shift,
    fold_bn,
    gate,
    max_pool2d,
    scale_shift,
    scale_shift_,
    spatial_mean,
    squeeze_excite,
)
from .profiling import name_algorithms  # noqa: E402

__version__ = "0.1.0"
_choices.load()
__all__ = [
    "ConvBnScale1d",
    "ConvBnScale2d",
    "ConvBnScale3d",
    "ConvTransposeBnScale1d",
    "ConvTransposeBnScale2d",
    "ConvTransposeBnScale3d",
    "LinearBnScale",
    "Report",
    "bn_scale",
    "bn_scale_",
    "bn_scale_cat",
    "bn_scale_train",
    "conditions",
    "conv_bn_scale",
    "conv_bn_scale_mean",
    "conv_bn_scale_train",
    "conv_scale_shift",
    "explain",
    "export_ops",
    "fold_bn",
    "fuse",
    "gate",
    "gate_conv_bn_scale",
    "graphed",
    "max_pool2d",
    "name_algorithms",
    "onnx_translations",
    "reference",
    "report",
    "scale_shift",
    "scale_shift_",
    "spatial_mean",
    "squeeze_excite",
    "thaw",
    "unfuse",
    "use_algorithm",
]
