"""Passes over graphs, one idea per file.

On the traced graph: `fold_batchnorm`, `two_way` (compare two logits), `interface` (inputs and outputs), `half`,
`quantize`, and `regions` (what belongs into one expert's branch), with `rows` and `editing` to serve them.
From the traced graph to standard ONNX: `branches` (`If` trees), `dispatch` (sub-batches), `per_image` (a `Scan`) and
`select` (no control flow), with `lower` and `orders` to serve them.
On the finished graph: `storage` (weights beside the graph, once).
"""
