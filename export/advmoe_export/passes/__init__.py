"""Passes over graphs, one idea per file.

Passes that change the traced graph: `fold_batchnorm`, `two_way` (compare two logits), `interface`
(inputs and outputs), `half` and `quantize`. Each is a `contract.GraphPass`, which declares the
facts that it requires and ensures. `rows` and `editing` are their helpers. `regions` then decides
which nodes run in the branch of one expert.

Modules that write the plan as standard ONNX: `branches` (`If` trees), `dispatch` (sub-batches),
`per_image` (a `Scan`) and `select` (no control flow) write a region. `experts` writes one expert.
`write` combines the steps. `lower` and `orders` are their helpers.

For the finished graph, `storage` writes the weights to a file, each tensor once.
"""
