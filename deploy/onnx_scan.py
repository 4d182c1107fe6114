"""A block's minGRUs in an ONNX graph: ONNX has no such cell, so their recurrence is a scan of elementwise operators.

`graph` is an onnx_graph.Graph.
"""

from collections.abc import Sequence

import torch

from models.mingru import MinGRUCell


def scan(graph, name: str, decay: str, added: str, tokens: int, reverse: bool) -> str:
    """`models.mingru.scan` of (N, B, u), for `reverse` from the last token to the first."""
    hop = 1
    while hop < tokens:
        title, left = f"{name}/hop{hop}", tokens - hop
        before, after, ends = ((hop, tokens), (0, left), left) if reverse else ((0, left), (hop, tokens), 0)
        if hop == 1:
            decay = graph.tokens(f"{title}/decay", decay, *after)
        else:  # over twice as many tokens
            halves = [graph.tokens(f"{title}/decay{k}", decay, k, k + left) for k in (0, hop // 2)]
            decay = graph.node("Mul", f"{title}/decay", *halves)
        carried = graph.node("Mul", f"{title}/carried", decay, graph.tokens(f"{title}/before", added, *before))
        moved = graph.node("Add", f"{title}/moved", graph.tokens(f"{title}/after", added, *after), carried)
        kept = graph.tokens(f"{title}/kept", added, ends, ends + hop)
        added = graph.node("Concat", title, *((moved, kept) if reverse else (kept, moved)), axis=0)
        hop *= 2
    return added


def hidden_states(graph, name: str, xs: Sequence[str], cells: Sequence[MinGRUCell], tokens: int, reverse: bool) -> str:
    """All heads' hidden states in one direction, (N, B, sum u): head h's cell reads xs[h] (N, B, d)."""
    gates = []
    for k, gate in enumerate(("z", "n")):
        title, weights = f"{name}/{gate}", [cell.weight_ih.chunk(2)[k] for cell in cells]
        products = [graph.linear(f"{title}/head{h}", xs[h], w, None) for h, w in enumerate(weights)]
        joined = graph.node("Concat", f"{title}/heads", *products, axis=2)
        bias = graph.weight(f"{title}/b", torch.cat([cell.bias_ih.chunk(2)[k] for cell in cells]))
        gates.append(graph.node("Add", title, joined, bias))
    share = graph.node("Sigmoid", f"{name}/share", gates[0])
    added = graph.node("Mul", f"{name}/added", share, gates[1])
    if tokens == 1:
        return added
    decay = graph.node("Sub", f"{name}/decay", graph.weight("one", torch.tensor(1.0)), share)
    return scan(graph, name, decay, added, tokens, reverse)
