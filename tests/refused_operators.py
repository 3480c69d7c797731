"""What deterministic mode refuses on a GPU: the operators of PyTorch 2.11 to 2.13, and a watch.

Sources: the documentation of `torch.use_deterministic_algorithms`, and PyTorch's calls of
`alertNotDeterministic` in `aten/src/ATen/native/cuda/` with their tests
(`test_nondeterministic_alert_*` in `test/test_torch.py`).

Attention is in no row: in strict mode flash attention takes its deterministic backward pass, and
memory-efficient attention does not split the keys (`transformers/cuda/attention_backward.cu`);
cuDNN's is not chosen (`check_cudnn_deterministic` in `transformers/cuda/sdp_utils.cpp`). With
`warn_only` all three stay as they are, and add gradients in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode


class Refused(NamedTuple):
    """Operators that refuse for some arguments; names of overloads do not matter."""

    named: (
        str  # in the documentation of torch.use_deterministic_algorithms; "": only in the sources
    )
    operators: str  # of aten, separated by spaces
    # Whether a call refuses, by its arguments in the order of the operator's schema.
    when: Callable[[dict[str, Any]], bool] = lambda arguments: True


def _floating(arguments: dict[str, Any]) -> bool:
    dtype = arguments["dtype"] or arguments["self"].dtype
    return dtype.is_floating_point or dtype.is_complex


REFUSED = (
    Refused("AvgPool3d", "avg_pool3d_backward"),
    Refused("AdaptiveAvgPool2d", "_adaptive_avg_pool2d_backward"),
    Refused("AdaptiveAvgPool3d", "_adaptive_avg_pool3d_backward"),
    Refused("AdaptiveMaxPool2d", "adaptive_max_pool2d_backward"),
    Refused("FractionalMaxPool2d", "fractional_max_pool2d_backward"),
    Refused("FractionalMaxPool3d", "fractional_max_pool3d_backward"),
    # `MaxPool3d` itself is computed by others in deterministic mode.
    Refused("", "max_pool3d_with_indices_backward"),
    Refused("MaxUnpool1d", "max_unpool2d"),
    Refused("MaxUnpool2d", "max_unpool2d"),
    Refused("MaxUnpool3d", "max_unpool3d"),
    # `interpolate` computes bilinear and trilinear by others in deterministic mode.
    Refused(
        "interpolate",
        "upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward "
        "upsample_trilinear3d_backward _upsample_bilinear2d_aa_backward "
        "_upsample_bicubic2d_aa_backward",
    ),
    Refused("ReflectionPad1d", "reflection_pad1d_backward"),
    Refused("ReflectionPad2d", "reflection_pad2d_backward"),
    Refused("ReflectionPad3d", "reflection_pad3d_backward"),
    # The padding itself is computed by others in deterministic mode.
    Refused("", "replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward"),
    # Where it adds up: atomically. Without a reduction, and in its backward pass, it does not.
    Refused("NLLLoss", "nll_loss2d_forward", lambda a: a["reduction"] != 0),
    Refused("CTCLoss", "_ctc_loss_backward"),
    Refused("EmbeddingBag", "_embedding_bag_backward", lambda a: a["mode"] == 2),
    Refused("put_", "put_ put"),
    Refused("histc", "histc"),
    Refused("bincount", "bincount", lambda a: a["weights"] is not None),
    Refused("median", "median nanmedian", lambda a: "dim" in a),
    Refused("", "kthvalue"),
    Refused("grid_sample", "grid_sampler_2d_backward grid_sampler_3d_backward"),
    Refused("cumsum", "cumsum cumsum_", _floating),
    Refused("scatter_reduce", "scatter_reduce scatter_reduce_", lambda a: a["reduce"] == "prod"),
    Refused("", "index_reduce index_reduce_"),
    Refused("resize_", "resize_", lambda a: a["self"].is_quantized),
)
BY_OPERATOR = {name: row for row in REFUSED for name in row.operators.split()}


class RefusalWatch(TorchDispatchMode):
    """Counts the operators that run inside, forward and backward, and notes what would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.refused: set[str] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = operator.overloadpacket.__name__
        self.seen[name] += 1
        if name in BY_OPERATOR:
            schema = operator._schema.arguments
            arguments = {a.name: a.default_value for a in schema}
            arguments |= dict(zip((a.name for a in schema), args, strict=False)) | (kwargs or {})
            if BY_OPERATOR[name].when(arguments):
                self.refused.add(name)
        return operator(*args, **(kwargs or {}))
