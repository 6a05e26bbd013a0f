"""An HTTP server for one exported model, on Starlette and uvicorn.

`batching` joins requests to batches, `protocol` speaks the Open Inference Protocol (version 2), `metrics` counts for
Prometheus, `app` wires them together with a page for people (`page.html`), `server` runs it and stops gracefully.

Needs `pip install 'advmoe-export[cpu,serve]'`.
"""
