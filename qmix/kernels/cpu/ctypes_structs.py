"""The structures that cross the C interface: csrc/structs.h field by field, under the same names.

A structure keeps nothing alive: whoever fills one keeps the tensors that it points to. Knows
nothing of weights.
"""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


class GroupValues(Structure):
    _fields_ = (
        ("values", c_void_p),
        ("outer", c_void_p),
        ("map", c_void_p),
        ("block", c_int64),
        ("start", c_float),
        ("step", c_float),
        ("offset", c_float),
        ("kind", c_int32),
        ("outer_kind", c_int32),
    )


class Matrix(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("table", c_void_p),
        ("scales", GroupValues),
        ("zeros", GroupValues),
        ("biases", GroupValues),
        ("rows", c_int64),
        ("inputs", c_int64),
        ("block", c_int64),
        ("bits", c_int32),
        ("high_first", c_int32),
    )


class Matmul(Structure):
    _fields_ = (
        ("weight", Matrix),
        ("x", c_void_p),
        ("y", c_void_p),
        ("tokens", c_int64),
        ("quantize_activations", c_int32),
    )


class DenseMatmul(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("x", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("inputs", c_int64),
        ("tokens", c_int64),
    )


class TiledMatrix(Structure):
    _fields_ = (
        ("tiles", c_void_p),
        ("powers", c_void_p),
        ("table", c_void_p),
        ("byte_rows", c_int64),
        ("inputs", c_int64),
        ("tile_inputs", c_int64),
        ("group_inputs", c_int64),
        ("bits", c_int32),
        ("zeros", c_int32),
    )


class ExpertMatrices(Structure):
    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("gate_perm", c_void_p),
        ("up_perm", c_void_p),
        ("down_perm", c_void_p),
    )


class TokenLayer(Structure):
    _fields_ = (
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("o", Matrix),
        ("perms", c_void_p * 4),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("router", c_void_p),
        ("experts", c_void_p),
        ("hidden", c_int64),
        ("head_dim", c_int64),
        ("num_experts", c_int64),
        ("experts_per_token", c_int64),
        ("eps", c_float),
    )


class ExpertTokens(Structure):
    _fields_ = (
        ("counts", c_void_p),
        ("tokens", c_void_p),
        ("routing_weights", c_void_p),
    )


class TokenRoute(Structure):
    _fields_ = (
        ("residual", c_void_p),
        ("normed", c_void_p),
        ("logits", c_void_p),
        ("ids", c_void_p),
        ("routing_weights", c_void_p),
    )


class TokenCache(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("pitch", c_int64),
        ("slot", c_int64),
        ("positions", c_int64),
        ("codes", c_int32),
    )


class TokenStep(Structure):
    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("caches", c_void_p),
        ("x", c_void_p),
        ("logits", c_void_p),
        ("tokens", c_int64),
    )


class TokenAttention(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("out", c_void_p),
        ("heads", c_int64),
        ("groups", c_int64),
        ("width", c_int64),
        ("positions", c_int64),
        ("pitch", c_int64),
        ("codes", c_int32),
    )


# In the order of csrc/structs.h.
STRUCTURES = (
    GroupValues,
    Matrix,
    Matmul,
    DenseMatmul,
    TiledMatrix,
    ExpertMatrices,
    TokenLayer,
    ExpertTokens,
    TokenRoute,
    TokenCache,
    TokenStep,
    TokenAttention,
)
