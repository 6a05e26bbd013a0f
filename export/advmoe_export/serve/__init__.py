"""An HTTP server for one exported model, on Starlette and uvicorn.

`batching` joins requests to batches. `protocol` implements the Open Inference Protocol (version 2).
`metrics` implements the metrics for Prometheus. `app` combines them with a page for browsers
(`page.html`). `server` runs the application and stops it gracefully.

The server needs `pip install 'advmoe-export[cpu,serve]'`.
"""
