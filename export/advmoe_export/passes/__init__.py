"""Passes over graphs, one idea per file.

Passes that change the traced graph: `fold_batchnorm`, `two_way` (compare two logits), `interface`
(inputs and outputs), `half` and `quantize`. Each is a `contract.GraphPass`: it states the facts it
needs and the facts it leaves, and they are checked. `rows` and `editing` are their helpers.
`regions` then plans which nodes run in one expert's branch.

From the plan to standard ONNX: `branches` (`If` trees), `dispatch` (sub-batches), `per_image` (a
`Scan`) and `select` (no control flow) write a region; `experts` writes one expert; `write` puts the
steps together. `lower` and `orders` are their helpers.

On the finished graph: `storage` puts the weights beside the graph, each once.
"""
