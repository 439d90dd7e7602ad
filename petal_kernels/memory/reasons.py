"""Why an operation keeps a tensor, in words: by the name of its node in autograd's graph and the
argument it keeps.
"""

from __future__ import annotations

import re

_WEIGHT = "the other factor of a product: the gradient of one needs the other"
_RESULT = "its own result: the derivative is written in terms of it"
_INPUT = "its input: the derivative is taken there"
CHECKPOINT = "checkpoint"  # of a region whose own node is not in the graph
HELD = "held by the graph"  # past every hook
_INDEX = "indices: where the gradient goes back to"

# node -> argument -> reason; "" is any other argument.
_TABLE: dict[str, dict[str, str]] = {
    "Addmm": {
        "mat1": "input of a linear layer: its weight is trained",
        "mat2": "weight of a linear layer: the input's gradient needs it",
    },
    "Mm": {
        "self": "input of a linear layer: its weight is trained",
        "mat2": "weight of a linear layer: the input's gradient needs it",
    },
    "Bmm": {"": "both factors of a batched product (eager attention: q, k, v, probabilities)"},
    "Baddbmm": {"": "both factors of a batched product"},
    "UnsafeView": {"": _WEIGHT},
    "Mul": {"": _WEIGHT},
    "Addcmul": {"": _WEIGHT},
    "Div": {"self": "dividend: the divisor needs a gradient", "other": "divisor"},
    "Pow": {"self": "input of x^n, derivative n x^(n-1) (the square in RMSNorm)"},
    "Softmax": {"result": "probabilities: softmax's derivative is written in terms of them"},
    "LogSoftmax": {"result": "log-probabilities of the loss, one per word of the vocabulary"},
    "NllLoss": {"": "targets and weight of the loss"},
    "NativeLayerNorm": {
        "input": "input of a norm: normalised again in backward",
        "result1": "mean of every row",
        "result2": "reciprocal deviation of every row",
        "": "weight of a norm",
    },
    "Rsqrt": {"result": "reciprocal root mean square of every row (RMSNorm)"},
    "NativeDropout": {"result1": "dropout mask, one byte per number"},
    "Gelu": {"self": "input of the activation: its derivative is taken there"},
    "Silu": {"self": "input of the activation: its derivative is taken there"},
    "Relu": {"result": "output of ReLU: zero where the gradient is"},
    "Tanh": {"result": _RESULT},
    "Sigmoid": {"result": _RESULT},
    "Exp": {"result": _RESULT},
    "Sqrt": {"result": _RESULT},
    "Embedding": {"indices": _INDEX},
    "Index": {"": _INDEX},
    "IndexPut": {"": _INDEX},
    "IndexSelect": {"": _INDEX},
    "Gather": {"": _INDEX},
    "MaskedFill": {"mask": "mask: where no gradient passes"},
    "MaskedScatter": {"mask": "mask: which places took other values"},
    "Where": {"condition": "condition: which side takes the gradient"},
    "Convolution": {
        "input": "input of a convolution: its weight is trained",
        "weight": "weight of a convolution: the input's gradient needs it",
    },
    "ScaledDotProductFlashAttentionForCpu": {
        "query": "q of the attention: scores are computed again in backward",
        "key": "k of the attention: scores are computed again in backward",
        "value": "v of the attention",
        "output": "output of the attention: it replaces the probabilities",
        "logsumexp": "normaliser of every row of scores",
        "attn_mask": "mask of the attention",
    },
    "KeptAttentionFunction": {"": "q, k, v, output, mask and row normaliser of fused attention"},
    "LowRankLinearFunction": {
        "": "fused low-rank update: its input once, x U^T, the generator's state and factors"
    },
    "GatedBottleneckFunction": {
        "": "fused bottleneck: what its backward reads, r-wide pre-activations, row statistics"
    },
    "ExpertDispatchFunction": {"": "fused experts: their input once, r-wide middles, routing"},
    "ModeContractFunction": {"": "fused mode contraction: its factors"},
    "UpdateFunction": {"": "fused update in place: r-wide middle and factors"},
    "CheckpointFunction": {"": "input of a checkpointed region: the rest is computed again"},
    CHECKPOINT: {
        "cache": "what a checkpointed region holds beside its inputs: chosen results, arguments",
        "": "input of a checkpointed region: the rest is computed again",
    },
    HELD: {"": "the graph holds it past save_for_backward: the closure of a hook, a cache"},
    "CompiledFunction": {"": "what the compiled graph keeps for its backward"},
}
for _flash in ("Flash", "Efficient", "Cudnn"):
    _TABLE[f"ScaledDotProduct{_flash}Attention"] = {
        **_TABLE["ScaledDotProductFlashAttentionForCpu"],
        "log_sumexp": "normaliser of every row of scores",
        "attn_bias": "mask of the attention",
        "": "state of the generator of the attention's dropout",
    }
_BY_ARGUMENT = {"result": _RESULT, "self": _INPUT, "other": _WEIGHT}
# AddmmBackward0 -> Addmm; overloads and in-place forms read alike.
_SUFFIX = re.compile(r"Backward\d*$")


def short_name(operation: str) -> str:
    """The node's name without `Backward0`, with a leading underscore of ATen's kept out."""
    return _SUFFIX.sub("", operation)


def display_name(operation: str, argument: str) -> str:
    """`FlashAttention.key`: the operation without what all names have, and its argument."""
    if not operation:
        return "?"
    name = short_name(operation).removeprefix("ScaledDotProduct").removesuffix("Function")
    return f"{name}.{argument}"


def why(operation: str, argument: str) -> str:
    """The reason in words; for an unknown operation, what its argument's name says."""
    if not operation:
        return "a part of the graph that the loss does not reach"
    rows = _TABLE.get(short_name(operation)) or {}
    known = rows.get(argument) or rows.get("")
    if known:
        return known
    if argument.startswith("ctx."):
        return f"{argument} of a custom operation ({short_name(operation)}), not save_for_backward"
    if argument.startswith("tensor "):
        return f"a custom operation ({short_name(operation)}) asked for it"
    return _BY_ARGUMENT.get(argument.rstrip("0123456789"), f"{argument} of the operation")
