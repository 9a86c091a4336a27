"""What the families of diffusers' models share: donors and costs of its modules, its call of them, recording.

Axes: B batch, N tokens, D width, H heads, F hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from grafting.operators import AttentionDonor, Cost, MLPDonor


def take_host_call(operator: nn.Module) -> nn.Module:
    """`operator`, which from now on ignores all that a host passes beside the tokens; its state dict stays as it is.

    diffusers' blocks call their attention with `encoder_hidden_states`, `attention_mask` and whatever the user gave as
    `cross_attention_kwargs`; some pass the tokens by name.
    """
    operator.register_forward_pre_hook(_tokens_only, with_kwargs=True)
    return operator


def _tokens_only(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any], dict[str, Any]]:
    return (args[0] if args else kwargs["hidden_states"],), {}


def is_attention(module: nn.Module) -> bool:
    """Whether this is diffusers' `Attention`."""
    return _is(module, "Attention")


def is_feed_forward(module: nn.Module) -> bool:
    """Whether this is diffusers' `FeedForward`."""
    return _is(module, "FeedForward")


def _is(module: nn.Module, name: str) -> bool:
    """By class name along the bases: nothing of diffusers is imported for a model of another kind."""
    return any(
        cls.__name__ == name and cls.__module__.startswith("diffusers.") for cls in type(module).__mro__
    )


def attention_donor(attention: Any, num_heads: int) -> AttentionDonor | None:
    """The weights of diffusers' `Attention` as self-attention, or None if it does more than softmax attention."""
    extras = (getattr(attention, name, None) for name in ("norm_q", "norm_k", "group_norm", "spatial_norm"))
    if any(extra is not None for extra in extras) or attention.heads != num_heads:
        return None
    q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
    return AttentionDonor(
        q_weight=q.weight, k_weight=k.weight, v_weight=v.weight, q_bias=q.bias, k_bias=k.bias, v_bias=v.bias,
        out_weight=out.weight, out_bias=out.bias, num_heads=num_heads,
    )  # fmt: skip


def queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, N, D / H] of diffusers' `Attention` on its input x [B, N, D]."""
    heads = (attention.heads, -1)
    q, k = attention.to_q(x), attention.to_k(x)
    return q.unflatten(2, heads).transpose(1, 2), k.unflatten(2, heads).transpose(1, 2)


def attention_cost(attention: Any, num_tokens: int, num_heads: int) -> Cost:
    """Cost of diffusers' `Attention` as self-attention, counted as the operator `mha` is."""
    layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    width = attention.to_q.weight.shape[0]
    return Cost(
        operator=4.0 * num_tokens**2 * width + 2.0 * num_tokens**2 * num_heads,
        featurizer=2.0 * num_tokens * sum(layer.weight.numel() for layer in layers),
        params=sum(p.numel() for layer in layers for p in (layer.weight, layer.bias) if p is not None),
    )


def mlp_donor(feed_forward: Any) -> MLPDonor | None:
    """The weights of diffusers' `FeedForward`, or None if it is not linear, tanh-GELU, linear."""
    first, last = feed_forward.net[0], feed_forward.net[-1]
    if getattr(first, "approximate", None) != "tanh" or not isinstance(last, nn.Linear):
        return None
    proj = first.proj
    return MLPDonor(in_weight=proj.weight, in_bias=proj.bias, out_weight=last.weight, out_bias=last.bias)


def mlp_cost(feed_forward: nn.Module, num_tokens: int) -> Cost:
    """Cost of diffusers' `FeedForward`, counted as the operator `mlp` is."""
    params = list(feed_forward.parameters())
    return Cost(
        operator=2.0 * num_tokens * sum(p.numel() for p in params if p.ndim == 2),
        featurizer=0.0,
        params=sum(p.numel() for p in params),
    )


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While inside, what these modules see and make, by their names: (input, output), each [B, N, D].

    The block is called as a whole, so that whatever shards or compiles it does its work.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"], output)

        return note

    handles = [
        module.register_forward_hook(noting(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
