"""aten operators by their role for the matcher and the passes: data."""

from __future__ import annotations

import torch

aten = torch.ops.aten

ADDS = {aten.add.Tensor, aten.add_.Tensor}
LINEARS = {aten.linear.default}
NORMS = {aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default}
# Same values, same shape, in eval mode.
IDENTITIES = {aten.dropout.default, aten.dropout_.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
              aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
              aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default}  # fmt: skip
ALIASES = IDENTITIES - {aten._to_copy.default, aten.clone.default, aten.lift_fresh_copy.default}
NONLINEAR = {aten.gelu.default, aten.gelu_.default, aten.silu.default, aten.silu_.default, aten.relu.default,
             aten.relu_.default, aten.sigmoid.default, aten.tanh.default, aten.hardswish.default, aten.elu.default,
             aten.leaky_relu.default, aten.erf.default, aten.softplus.default, aten.mish.default, aten.exp.default,
             aten.relu6.default, aten.hardtanh.default, aten.hardsigmoid.default}  # fmt: skip
POINTWISE = (
    NONLINEAR
    | {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.mul_.Tensor,
        aten.div.Tensor,
        aten.pow.Tensor_Scalar,
        aten.add.Scalar,
        aten.neg.default,
        aten.rsqrt.default,
    }
    | ADDS
)
SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
EMBEDDINGS = {aten.embedding.default}
CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding, aten.convolution.default, aten.conv3d.default}
ATTENTIONS = {aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default}
# Of two tensors, as in attention that is written out.
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
# --- what the token axis may reach -----------------------------------------------------------------------------------

RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
EXPANDS = {aten.expand.default}
SLICES = {aten.slice.Tensor}
# Operators that tell tokens apart by their position.
POSITIONAL = {aten.select.int, aten.index.Tensor, aten.index_select.default, aten.split.Tensor, aten.chunk.default,
              aten.unbind.int, aten.flip.default, aten.roll.default, aten.gather.default,
              aten.narrow.default, aten.cumsum.default, aten.conv1d.default, aten.conv2d.default,
              aten.convolution.default, aten.unfold.default, aten.avg_pool2d.default, aten.unflatten.int,
              aten.pixel_shuffle.default, aten.constant_pad_nd.default, aten.pad.default}  # fmt: skip
# Which of their arguments is the axis.
DIM_ARGUMENT: dict[object, int] = {
    aten.select.int: 1, aten.unflatten.int: 1, aten.unbind.int: 1, aten.narrow.default: 1, aten.index_select.default: 1,
    aten.cumsum.default: 1, aten.gather.default: 1,
    aten.split.Tensor: 2, aten.chunk.default: 2,
}  # fmt: skip
