"""Passes over graphs, one per file.

On the traced graph: `fold_batchnorm`, `half`, `quantize`, `regions` (what belongs into one expert's branch).
From the traced graph to standard ONNX: `lower`, with `branches` (`If` trees), `dispatch` (sub-batches) and `select`
(no control flow).
On the finished graph: `storage` (weights beside the graph, once).
"""
