"""The live page: frames and numbers of a run in the browser, from a server inside the run.

Needs the extra ``serve`` (Starlette, uvicorn, prometheus_client).
"""
